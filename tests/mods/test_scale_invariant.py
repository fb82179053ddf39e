from __future__ import annotations

import math

import pytest
import torch

import ropemods as rm
from ropemods.mods import ScaleInvariant
from ropemods.mods.base import Site
from tests import zoo
from tests.contract import ModContract, close


class TestContract(ModContract):
    everywhere = False
    backends = ("eager",)
    variants = {
        "model": [ScaleInvariant()],
        "paper": [ScaleInvariant(tau=2, start="paper"), rm.LearnedSink(init=0.2)],
    }


def test_it_starts_at_the_model_with_a_gradient() -> None:
    ids, model = zoo.tokens(), rm.apply(zoo.build("llama", "eager"), ScaleInvariant())
    close(model(ids).logits, zoo.build("llama", "eager")(ids).logits, 1e-6)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all((p.grad.abs() > 0).all() for name, p in model.named_parameters() if name.endswith("gate"))


def test_gaussian_logits_weigh_every_range_alike_and_are_as_sparse_in_each() -> None:
    """What the two conditions of the paper say of e^L and L e^L, by their closed forms and by a sample."""
    term = ScaleInvariant(tau=10, start="paper").stage(Site(0, 1, 8, 8, 8))
    term.set_strength(1.0)
    offset = torch.tensor([0.0, 3, 100, 5000], dtype=torch.float64)
    a, m = term.term(offset)
    close(torch.exp(m + a**2 / 2) * (offset / 10 + 1), torch.full((1, 4), math.exp(0.5), dtype=torch.float64), 1e-9)
    close(m + a**2, torch.ones(1, 4, dtype=torch.float64), 1e-9)
    assert a[0, 0] == 1 and m[0, 0] == 0
    draws = torch.randn(2_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean = torch.exp(a[0, 1] * draws + m[0, 1]).mean()
    assert mean.item() == pytest.approx(math.exp(0.5) / 1.3, rel=0.01)


def test_fused_kernels_refuse_it_and_say_what_takes_it() -> None:
    model = rm.apply(zoo.build("llama", "eager"), ScaleInvariant())
    assert "eager" in rm.summary(model)
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        rm.apply(zoo.build("llama", "sdpa"), ScaleInvariant())(zoo.tokens())


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="above 0"):
        ScaleInvariant(tau=0)
