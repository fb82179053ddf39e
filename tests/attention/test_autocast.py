"""Attention calls under autocast, on every path that a CPU has: one dtype for q, k and v, and none for fp64."""

from __future__ import annotations

import pytest
import torch

import ropemods as rm
from ropemods.attention import autocast
from ropemods.attention.paths import using
from tests import zoo
from tests.contract import autocast_errors, layouts, stock_autocast_errors

MODS = [rm.TruncatedRoPE(0.5), rm.UnrotatedBos(), rm.LearnedSink(init=0.3, read_bos=True)]
PATHS = ["flash"] if torch.cuda.is_available() else ["flash", "triton", "triton-rows"]
"""Where there is a GPU, the kernels are compiled for it, and these models are on the CPU."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["plain", "padded"])
@pytest.mark.parametrize("path", PATHS)
def test_every_path_errs_at_most_twice_as_much_as_stock(path: str, layout: str, dtype: torch.dtype) -> None:
    model = rm.apply(zoo.build("llama"), *MODS).train()
    with using(path):
        found = autocast_errors(model, layouts()[layout], dtype)
    wanted = stock_autocast_errors(("llama", "sdpa"), layout, dtype)
    assert all(own <= 2 * stock for own, stock in zip(found, wanted, strict=True))


@pytest.mark.parametrize("path", PATHS)
def test_a_temperature_reads_its_entropy_on_every_path(path: str) -> None:
    model, ids = rm.apply(zoo.build("llama"), rm.AdaptiveTemperature(spare_bos=True)), zoo.tokens(rows=4)
    with torch.no_grad(), using(path):
        exact = model(ids, use_cache=False).logits
        with torch.autocast("cpu", torch.bfloat16):
            found = model(ids, use_cache=False).logits.float()
    stock = stock_autocast_errors(("llama", "sdpa"), "plain", torch.bfloat16)[0]
    assert (found - exact).pow(2).mean().sqrt() <= 2 * stock


def test_fp64_and_what_autocast_is_off_for_stay_as_they_are() -> None:
    x = torch.ones(2)
    with torch.autocast("cpu", torch.bfloat16):
        dtypes = [each.dtype for each in autocast.cast(x, x.double(), x.half())]
        assert dtypes == [torch.bfloat16, torch.float64, torch.bfloat16]
        assert autocast.cast(x.to("meta"))[0].dtype == torch.float32
        with autocast.suspended(x.device):
            assert autocast.cast(x)[0] is x
        assert torch.is_autocast_enabled("cpu")
    assert autocast.cast(x)[0] is x
