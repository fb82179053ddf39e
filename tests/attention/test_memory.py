"""No tensor with heads × T² elements on the sdpa path, found by looking at every tensor that is made."""

from __future__ import annotations

import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ropemods as rm
from ropemods.attention import sdpa
from ropemods.attention.rows import Rows
from ropemods.mods import AdaptiveTemperature, LearnedSink, UnrotatedBos
from ropemods.mods.base import Call, Site
from tests import zoo


class Largest(TorchDispatchMode):
    """Remembers the most elements that any operation, forward or backward, returned in one tensor."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
        return result


def largest(length: int, mods) -> int:
    model = zoo.build("llama", max_position_embeddings=4096)
    if mods:
        rm.apply(model, *mods)
    ids = zoo.tokens(rows=1, length=length)
    with Largest() as seen:
        model.model(ids, use_cache=False).last_hidden_state.sum().backward()
    return seen.elements


@pytest.mark.parametrize(
    "mods",
    [[AdaptiveTemperature()], [UnrotatedBos()], [LearnedSink()], [AdaptiveTemperature(spare_bos=True), LearnedSink()]],
    ids=["temperature", "unrotated", "sink", "both"],
)
def test_the_largest_tensor_grows_with_length_and_not_its_square(mods) -> None:
    short, long = largest(512, mods), largest(1024, mods)
    assert long <= 2 * short + 1024
    assert long < 1024 * 1024
    # The stock model's own largest tensor, the hidden layer of its MLP, is nearly as large.
    assert long <= 4 * largest(1024, [])


def step(q, k, v, stage) -> None:
    for tensor in (q, k, v):
        tensor.grad = None
    if stage is None:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        rows = Rows(q, k, v, mask=None, causal=True, scale=q.shape[-1] ** -0.5)
        out = sdpa.attend(stage(rows, Call()))[0]
    out.sum().backward()


@pytest.mark.slow
def test_a_training_step_costs_little_more_than_the_floor_of_two() -> None:
    """AdaptiveTemperature at T = 2048: forward and backward at most 2.1 times stock, pairs measured side by side."""
    stage = AdaptiveTemperature().stage(Site(0, 4, 8, 32, 8))
    stage.set_strength(1.0)
    q, k, v = (torch.randn(1, 4, 2048, 64, requires_grad=True) for _ in range(3))
    ratios = []
    for _ in range(9):
        times = []
        for which in (None, stage):
            start = time.perf_counter()
            step(q, k, v, which)
            times.append(time.perf_counter() - start)
        ratios.append(times[1] / times[0])
    assert sorted(ratios)[len(ratios) // 2] <= 2.1, ratios
