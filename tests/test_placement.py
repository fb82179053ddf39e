"""Models that are not simply in memory: offloaded, without weights, compiled, wrapped, broken, under autocast."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import ropemods as rm
from tests import zoo
from tests.contract import close
from tests.leakage.small import PROTOCOL, apart, documents, tokenizer

PLACES = {
    "a layer": {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
                "model.rotary_emb": "cpu", "lm_head": "cpu"},
    "everything": {"model.embed_tokens": "disk", "model.layers": "disk", "model.norm": "disk",
                   "model.rotary_emb": "cpu", "lm_head": "disk"},
}  # fmt: skip
MODS = {
    "sink": rm.LearnedSink(),
    "unrotated": rm.UnrotatedBos(),
    "zero": rm.ReplacedBos("zero"),
    "mean": rm.ReplacedBos("mean"),
    "layer": rm.TruncatedRoPE(0.5, layers=[1]),
    "shared": rm.AdaptiveTemperature(trainable="shared"),
}


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("name", MODS)
def test_an_offloaded_model_is_modified_saved_and_reloaded(name, places, tmp_path) -> None:
    zoo.build().save_pretrained(tmp_path / "base")
    ids, there = zoo.tokens(), {"device_map": PLACES[places], "offload_folder": str(tmp_path / "disk")}
    start = {"calibration": ids} if name == "sink" else {}
    wanted = rm.apply(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), MODS[name], **start)(ids).logits
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **there)
    close(rm.apply(model, MODS[name], **start)(ids).logits, wanted, 1e-6)
    model.save_pretrained(tmp_path / "modified")
    close(rm.from_pretrained(tmp_path / "modified")(ids).logits, wanted, 1e-6)
    close(rm.from_pretrained(tmp_path / "modified", **there)(ids).logits, wanted, 1e-6)


def test_an_offloaded_model_is_not_exported_in_parts(tmp_path) -> None:
    zoo.build().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=PLACES["a layer"], offload_folder=str(tmp_path / "disk")
    )
    with pytest.raises(ValueError, match=r"offloaded.*without device_map"):
        rm.export(rm.apply(model, rm.TruncatedRoPE(0.5)), tmp_path / "stock")


@pytest.mark.parametrize("name", MODS)
def test_a_model_without_weights_is_refused(name) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(zoo.build().config)
    with pytest.raises(ValueError, match=r"no weights yet \(model.embed_tokens.weight and .* more"):
        rm.apply(model, MODS[name])


def test_a_compiled_model_is_taken_for_the_model_that_was_compiled() -> None:
    model, ids = zoo.build(), zoo.tokens()
    compiled = torch.compile(model, backend="eager")
    assert rm.apply(compiled, rm.LearnedSink(init=0.3)) is compiled
    assert rm.summary(compiled) == rm.summary(model)
    rm.set_strength(compiled, 0.5)
    close(compiled(ids, use_cache=False).logits, model(ids).logits, 1e-6)
    rm.remove(compiled)
    assert torch.equal(model(ids).logits, zoo.build()(ids).logits)
    torch._dynamo.reset()


@pytest.mark.parametrize("call", [rm.summary, lambda m: rm.apply(m, rm.LearnedSink()), lambda m: rm.set_strength(m, 1)])
def test_a_wrapped_model_is_refused_with_what_to_pass(call) -> None:
    with pytest.raises(TypeError, match=r"DataParallel around a LlamaForCausalLM; pass what it wraps: model.module"):
        call(nn.DataParallel(zoo.build()))


def test_weights_that_are_not_finite_are_named() -> None:
    model = zoo.build()
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers.1.self_attn.k_proj.weight and 0 more parameters hold NaN"):
        rm.apply(model, rm.LearnedSink())


@pytest.mark.parametrize("name", MODS)
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_applying_under_autocast_gives_the_same_model(backend, name) -> None:
    ids = zoo.tokens()
    start = {"calibration": ids} if name == "sink" else {}
    wanted = rm.apply(zoo.build("llama", backend), MODS[name], **start)(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        model = rm.apply(zoo.build("llama", backend), MODS[name], **start)
    assert torch.equal(model(ids).logits, wanted)


def test_an_offloaded_model_is_measured(tmp_path) -> None:
    model = zoo.build()
    model.save_pretrained(tmp_path / "base")
    there = {"device_map": PLACES["everything"], "offload_folder": str(tmp_path / "disk")}
    offloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **there)
    one, other = (rm.measure(m, tokenizer(), documents(), protocol=PROTOCOL) for m in (model, offloaded))
    assert apart(one, other) < 1e-4
