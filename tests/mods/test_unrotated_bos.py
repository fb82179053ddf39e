from __future__ import annotations

import pytest
import torch

import ropemods as rm
from evals import tiny_models
from ropemods.model import attention_function
from ropemods.model.attention_layers import attention_layers
from ropemods.mods import AdaptiveTemperature, TruncatedRoPE, UnrotatedBos
from tests import zoo
from tests.contract import ModContract, close


class TestContract(ModContract):
    variants = {
        "alone": [UnrotatedBos()],
        "one-layer": [UnrotatedBos(layers=[0])],
        "over-truncated": [TruncatedRoPE(0.5, layers=[1]), UnrotatedBos(), AdaptiveTemperature()],
    }


LAYOUTS = {
    "llama": (False, 0),
    "gpt_neox": (False, 0),
    "glm4": (True, 0),
    "phi3": (False, 0),
    "qwen3": (False, 0),
}


@pytest.mark.parametrize(("architecture", "layout"), LAYOUTS.items())
def test_the_pairing_of_channels_is_found(architecture: str, layout: tuple[bool, int]) -> None:
    model = rm.apply(zoo.build(architecture), UnrotatedBos())
    assert {tuple(layer.ropemods_site.layout) for _, layer in attention_layers(model)} == {layout}


@pytest.mark.parametrize("architecture", ["llama", "glm4", "gpt_neox", "phi3"])
def test_the_bos_logit_does_not_depend_on_position(architecture: str) -> None:
    """The same token everywhere gives the same query before rotation in the first layer, hence one BOS logit."""
    model = rm.apply(zoo.build(architecture, "eager"), UnrotatedBos())
    ids = torch.full((1, 10), 7)
    ids[:, 0] = zoo.BOS
    seen = []

    def look(site, rows, call, lse):
        if site.layer == 0:
            seen.append(rows.column.logit_BHT[0, :, 1:])

    with attention_function.observed(look, of=model, want_lse=False), torch.no_grad():
        model(ids, use_cache=False)
    close(seen[0], seen[0][:, :1].expand_as(seen[0]), 1e-6)


def test_moving_every_position_changes_nothing() -> None:
    """Only offsets to the BOS are used, so positions that do not start at 0 give the same model."""
    model, ids = rm.apply(zoo.build("llama"), UnrotatedBos()), zoo.tokens()
    moved = torch.arange(ids.shape[1])[None].expand_as(ids) + 30
    close(model(ids, position_ids=moved).logits, model(ids).logits, 5e-5)


def test_a_model_that_changes_queries_after_rotation_is_refused(monkeypatch) -> None:
    monkeypatch.setattr("ropemods.model.rope_tables.find_layout", lambda *_: None)
    model = zoo.build("llama")
    with pytest.raises(ValueError, match="in no way that is known"):
        rm.apply(model, UnrotatedBos())
    assert torch.equal(model(zoo.tokens()).logits, zoo.build("llama")(zoo.tokens()).logits)


def test_a_norm_behind_the_rotation_is_refused_before_its_weights_are_trained_apart() -> None:
    model = tiny_models.build("hunyuan_v1_dense")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm.weight" in name:
                parameter.fill_(1.0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="changes queries after rotating them, as a norm with weights does"):
        rm.apply(model, UnrotatedBos())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
