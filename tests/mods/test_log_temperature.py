from __future__ import annotations

import math

import pytest
import torch

import ropemods as rm
from ropemods.attention.rows import Rows, visible_keys
from ropemods.mods import LogTemperature
from ropemods.mods.base import Site
from tests import zoo
from tests.contract import ModContract, close


class TestContract(ModContract):
    everywhere = False
    variants = {
        "head": [LogTemperature(neutral=4)],
        "log": [LogTemperature("layer", start="log", neutral=16)],
        "shared": [LogTemperature("shared", neutral=3, layers=[0])],
        "steps": [LogTemperature(0.3, neutral=3, steps=True), rm.AdaptiveTemperature(spare_bos=True)],
    }


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_it_starts_at_the_model_with_a_gradient(backend: str) -> None:
    ids, model = zoo.tokens(), rm.apply(zoo.build("llama", backend), LogTemperature(neutral=4))
    close(model(ids).logits, zoo.build("llama", backend)(ids).logits, 1e-6)
    model(input_ids=ids, labels=ids).loss.backward()
    moved = [p for name, p in model.named_parameters() if name.endswith("moved")]
    assert len(moved) == 2 and all((p.grad.abs() > 0).all() for p in moved)


def test_ssmax_starts_where_the_paper_does() -> None:
    assert LogTemperature(start="log").first == pytest.approx(0.168, abs=5e-4)


def test_llama_4s_rule_leaves_short_rows_and_sharpens_long_ones() -> None:
    """β = 1 + 0.1 · log(⌊n / 8192⌋ + 1), as in its attention layers."""
    stage = LogTemperature(0.1, neutral=8192, steps=True).stage(Site(0, 1, 8, 8, 8))
    count = torch.tensor([1.0, 8191, 8192, 16384, 100000])
    wanted = [0.0, 0.0, math.log(2), math.log(3), math.log(13)]
    assert stage.growth(count).tolist() == pytest.approx(wanted)


def test_keys_are_counted_as_the_mask_shows_them() -> None:
    q, k = torch.zeros(2, 2, 3, 4), torch.zeros(2, 2, 5, 4)
    rows = Rows(q, k, k, mask=None, causal=True, scale=1.0)
    assert visible_keys(rows).tolist() == [[[3, 4, 5]]]
    assert visible_keys(rows._replace(causal=False)).tolist() == [[[5, 5, 5]]]
    mask = torch.ones(2, 1, 3, 5).tril(2).bool()
    mask[1, :, :, 0] = False
    for each in (mask, torch.zeros(2, 1, 3, 5).masked_fill(~mask, float("-inf"))):
        found = visible_keys(rows._replace(mask=each, causal=False))
        assert found.tolist() == [[[3, 4, 5]], [[2, 3, 4]]]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"neutral": 1}, "a length above 1"),
        ({"start": "log", "steps": True}, "counted from the model"),
        ({"scale": 0.0}, "nothing would change"),
        ({"scale": "heads"}, "scale"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        LogTemperature(**options)
