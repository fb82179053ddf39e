"""What a cut does over scaled rope: pairs stop turning, and what the scaling does to every logit stays."""

from __future__ import annotations

import math

import pytest
import torch

import ropemods as rm
from tests import zoo
from tests.contract import close


@pytest.mark.parametrize("scaling", ["yarn", "longrope"])
def test_a_dropped_pair_is_not_turned_and_keeps_the_factor_of_the_models_scaling(scaling) -> None:
    stock = zoo.build(rope_parameters=zoo.ROPE_SCALINGS[scaling])
    model = rm.apply(zoo.build(rope_parameters=zoo.ROPE_SCALINGS[scaling]), rm.TruncatedRoPE(keep=0))
    factor = stock.model.rotary_emb.attention_scaling
    assert factor > 1
    if scaling == "yarn":
        assert factor == pytest.approx(0.1 * math.log(4.0) + 1) == pytest.approx(1.1386, abs=1e-4)
    cos, sin = model.model.rotary_emb(torch.ones(1, 1, 1), position_ids=torch.arange(50)[None])
    assert torch.equal(cos, torch.full_like(cos, factor)) and sin.abs().max() == 0


def test_without_any_turning_pair_the_factor_is_a_temperature_on_all_logits() -> None:
    """NoPE whose logits are multiplied by the square of the factor, and nothing else."""
    model = rm.apply(zoo.build(rope_parameters=zoo.ROPE_SCALINGS["yarn"]), rm.TruncatedRoPE(keep=0))
    plain, ids = rm.apply(zoo.build(), rm.TruncatedRoPE(keep=0)), zoo.tokens()
    factor = model.model.rotary_emb.attention_scaling
    for layer in plain.model.layers:
        layer.self_attn.scaling *= factor**2
    close(model(ids).logits, plain(ids).logits, 1e-5)
