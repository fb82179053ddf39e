"""The row-statistics kernels: every kind of row against fp64, and never twice as far off as a stock kernel.

Compiled where there is a GPU, in Triton's interpreter where there is none.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from ropemods.attention import flash
from ropemods.attention.triton.blocks import Blocks
from ropemods.attention.triton.row_stats import row_stats
from ropemods.attention.triton.spans import Spans, packed_spans, spans

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Blocks(32, 16)
HALF = torch.finfo(torch.float32).eps


def inputs(batch: int, heads: int, groups: int, queries: int, keys: int, dim: int, dtype: torch.dtype, size=1.0):
    generator = torch.Generator().manual_seed(queries + 100 * keys + dim)
    q = size * torch.randn(batch, heads, queries, dim, generator=generator)
    k = torch.randn(batch, groups, keys, dim, generator=generator)
    return q.to(DEVICE, dtype), k.to(DEVICE, dtype)


def seen(where: Spans, keys: int, mask: Tensor | None = None) -> Tensor:
    """The keys (B, 1 or H, T, S) that the rows see."""
    key = torch.arange(keys, device=where.first_BT.device)
    inside = (key >= where.first_BT[..., None]) & (key < where.past_BT[..., None])
    return inside[:, None] if mask is None else inside[:, None] & mask


def exact(q: Tensor, k: Tensor, visible: Tensor, *, scale: float, softcap: float | None = None):
    """lse and H as the formulas have them."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    s = scale * q @ k.transpose(2, 3)
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    # Far below every other logit and yet finite, so that its gradients are 0 and not NaN.
    s = s.masked_fill(~visible, -1e30)
    log_p = torch.log_softmax(s, -1)
    some = visible.any(-1).expand(s.shape[:-1])
    entropy = torch.where(some, -(log_p.exp() * log_p).sum(-1), 0.0)
    return torch.where(some, torch.logsumexp(s, -1), float("-inf")), entropy


def everything(function, q: Tensor, k: Tensor) -> list[Tensor]:
    """lse, H, dq and dk for fixed random gradients, in fp64."""
    q, k = (x.detach().clone().requires_grad_() for x in (q, k))
    lse, entropy = function(q, k)
    generator = torch.Generator().manual_seed(0)
    d_lse, d_entropy = (torch.randn(lse.shape, generator=generator).to(lse.device, lse.dtype) for _ in range(2))
    total = (torch.where(lse.isfinite(), lse, 0.0) * d_lse).sum() + (entropy * d_entropy).sum()
    grads = torch.autograd.grad(total, (q, k))
    return [x.detach().double() for x in (lse, entropy, *grads)]


def distance(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference; equal infinities are no difference."""
    return torch.where(found == wanted, 0.0, found - wanted).square().mean().sqrt().item()


@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    batch=st.integers(1, 2),
    groups=st.sampled_from([1, 1, 2]),
    repeats=st.sampled_from([1, 2]),
    queries=st.integers(1, 35),
    past=st.sampled_from([0, 0, 5]),
    dim=st.sampled_from([2, 16, 20, 40]),
    window=st.sampled_from([None, 1, 7, 18]),
    padding=st.sampled_from([0, 3, 17]),
    softcap=st.sampled_from([None, 2.0, 30.0]),
    masked=st.booleans(),
    causal=st.booleans(),
)
def test_fp32_rows_and_gradients_equal_fp64(
    batch, groups, repeats, queries, past, dim, window, padding, softcap, masked, causal
) -> None:
    keys = queries + past
    q, k = inputs(batch, groups * repeats, groups, queries, keys, dim, torch.float32)
    first = torch.tensor([padding, 0][:batch], device=DEVICE)
    where = spans(queries, keys, causal=causal, offset=past, window=window, first_key_B=first, device=DEVICE)
    generator = torch.Generator().manual_seed(7)
    mask = (torch.rand(batch, 1, queries, keys, generator=generator) < 0.8).to(DEVICE) if masked else None
    visible = seen(where, keys, mask)
    found = everything(lambda q, k: row_stats(q, k, where, mask=mask, scale=0.4, softcap=softcap, blocks=SMALL), q, k)
    wanted = everything(lambda q, k: exact(q, k, visible, scale=0.4, softcap=softcap), q.double(), k.double())
    for actual, expected in zip(found, wanted, strict=True):
        size = expected[expected.isfinite()].abs().max().item() if expected.isfinite().any() else 0.0
        # A logit is a sum of `dim` products, each rounded; a cap multiplies what rounding leaves by itself.
        assert (torch.where(actual == expected, 0.0, actual - expected)).abs().max() <= 64 * HALF * (
            size + 1 + (softcap or 0.0)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 6.0])
def test_error_is_at_most_twice_that_of_a_stock_kernel(dtype: torch.dtype, size: float) -> None:
    q, k = inputs(1, 4, 2, 48, 48, 32, dtype, size)
    where = spans(48, 48, device=DEVICE)
    scale = 32**-0.5

    def stock(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        k_all = flash._like_queries(k, q)
        entropy = flash.row_entropy(q, k, mask=None, causal=True, scale=scale)
        # The log-sum-exp that stock kernels return has no gradient; the one compared here has none either.
        _, lse = flash.attend_with_slots(q, k_all, k_all, None, mask=None, causal=True, scale=scale)
        return lse.detach(), entropy

    def ours(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        lse, entropy = row_stats(q, k, where, scale=scale, blocks=Blocks(32, 32))
        return lse.detach(), entropy

    def truth(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        lse, entropy = exact(q, k, seen(where, 48), scale=scale)
        return lse.detach(), entropy

    wanted = everything(truth, q.double(), k.double())
    for found, by_stock, expected in zip(everything(ours, q, k), everything(stock, q, k), wanted, strict=True):
        assert distance(found, expected) <= 2 * distance(by_stock, expected)


@pytest.mark.parametrize("dim", [16, 48, 80, 128, 256])
def test_head_dims_to_256_at_the_default_blocks(dim: int) -> None:
    q, k = inputs(1, 1, 1, 70, 70, dim, torch.float32)
    where = spans(70, 70, window=40, device=DEVICE)
    found = everything(lambda q, k: row_stats(q, k, where, scale=dim**-0.5), q, k)
    wanted = everything(lambda q, k: exact(q, k, seen(where, 70), scale=dim**-0.5), q.double(), k.double())
    for actual, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


def test_packed_sequences_are_rows_of_their_own() -> None:
    lengths = [5, 1, 19, 8]
    q, k = inputs(1, 2, 1, 33, 33, 16, torch.float32)
    found = row_stats(q, k, packed_spans(lengths, device=DEVICE), scale=0.25, blocks=SMALL)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        alone = row_stats(q[:, :, part], k[:, :, part], spans(length, length, device=DEVICE), scale=0.25, blocks=SMALL)
        for whole, apart in zip(found, alone, strict=True):
            torch.testing.assert_close(whole[:, :, part], apart, rtol=1e-6, atol=1e-6)
        start += length


def test_an_additive_mask_is_added_after_the_cap() -> None:
    q, k = inputs(1, 2, 2, 9, 12, 16, torch.float32)
    bias = torch.randn(1, 1, 9, 12, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    bias[..., 3] = float("-inf")
    where = spans(9, 12, causal=False, device=DEVICE)
    found = everything(lambda q, k: row_stats(q, k, where, mask=bias, scale=0.5, softcap=3.0, blocks=SMALL), q, k)

    def truth(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        s = 3 * torch.tanh(0.5 * q @ k.transpose(2, 3) / 3) + bias
        p = s.softmax(-1)
        return s.logsumexp(-1), -torch.where(p > 0, p * p.clamp(min=1e-300).log(), 0.0).sum(-1)

    for actual, expected in zip(found, everything(truth, q.double(), k.double()), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_rows_that_see_nothing_have_no_entropy_and_no_gradient() -> None:
    q, k = inputs(1, 2, 1, 20, 20, 16, torch.float32)
    where = spans(20, 20, first_key_B=torch.tensor([6], device=DEVICE), device=DEVICE)
    lse, entropy, dq, dk = everything(lambda q, k: row_stats(q, k, where, scale=0.25, blocks=SMALL), q, k)
    assert (lse[:, :, :6] == float("-inf")).all() and lse[:, :, 6:].isfinite().all()
    assert (entropy[:, :, :6] == 0).all() and (dq[:, :, :6] == 0).all() and (dk[:, :, :6] == 0).all()
    assert entropy.isfinite().all() and dq.isfinite().all() and dk.isfinite().all()


def test_one_key_leaves_nothing_to_choose() -> None:
    q, k = inputs(1, 2, 2, 1, 1, 16, torch.float32)
    lse, entropy, dq, _ = everything(
        lambda q, k: row_stats(q, k, spans(1, 1, device=DEVICE), scale=0.25, blocks=SMALL), q, k
    )
    torch.testing.assert_close(lse, 0.25 * (q * k).sum(-1).double(), rtol=1e-6, atol=1e-6)
    assert (entropy == 0).all() and dq.isfinite().all()


@pytest.mark.parametrize("sign", [-1, 1])
def test_logits_of_ten_thousand_neither_overflow_nor_blur_the_entropy(sign: int) -> None:
    q, k = torch.full((1, 1, 1, 16), 100.0, device=DEVICE), torch.full((1, 1, 40, 16), sign * 25.0, device=DEVICE)
    k[:, :, 8:, 0] -= 1e-2  # 32 of the 40 keys have logits of 0.25 less than the other 8
    lse, entropy = row_stats(q, k, spans(1, 40, causal=False, device=DEVICE), scale=0.25, blocks=SMALL)
    p = torch.tensor([0.0] * 8 + [-0.25] * 32, dtype=torch.float64).softmax(0)
    # What is left is the rounding of the logits themselves, 2^-10 at 1e4.
    assert abs(entropy.item() + (p * p.log()).sum().item()) <= 2**-10
    assert abs(lse.item() - sign * 1e4) < 4


def test_nan_stays_in_its_row() -> None:
    q, k = inputs(1, 2, 1, 20, 20, 16, torch.float32)
    q[0, 1, 4] = torch.nan
    for found in row_stats(q, k, spans(20, 20, device=DEVICE), scale=0.25, blocks=SMALL):
        assert found.isnan().nonzero().tolist() == [[0, 1, 4]]


def test_the_same_input_gives_the_same_bits() -> None:
    q, k = inputs(1, 4, 2, 30, 30, 16, torch.bfloat16)
    where = spans(30, 30, device=DEVICE)
    runs = [everything(lambda q, k: row_stats(q, k, where, scale=0.25, blocks=SMALL), q, k) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_opcheck_finds_nothing() -> None:
    q, k = (x.requires_grad_() for x in inputs(1, 2, 1, 5, 5, 16, torch.float32))
    mask = torch.ones(1, 2, 5, 5, dtype=torch.bool, device=DEVICE).tril()
    for given_mask in (None, mask):
        arguments = (q, k, *spans(5, 5, device=DEVICE), given_mask, 0.25, 0.0, 16, 16)
        torch.library.opcheck(torch.ops.ropemods.row_stats, arguments)
