"""Banded and grid logits equal the naive T × T ones, without ever making them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ropemods.leakage.logits import banded_logits, grid_logits, pair_norms
from tests.leakage.synthetic import LargestTensor, band_of


def naive(q_BHTD: Tensor, k_BGSD: Tensor, scale: float, softcap: float | None) -> Tensor:
    k_BHSD = k_BGSD.repeat_interleave(q_BHTD.shape[1] // k_BGSD.shape[1], dim=1)
    s_BHTS = torch.einsum("bhtd,bhsd->bhts", q_BHTD, k_BHSD) * scale
    return s_BHTS if softcap is None else softcap * torch.tanh(s_BHTS / softcap)


def draw_qk(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    B, G, heads_per_group, T, D = shape
    source = torch.Generator().manual_seed(sum(shape))
    q = torch.randn(B, G * heads_per_group, T, D, generator=source, dtype=torch.float64)
    k = torch.randn(B, G, T, D, generator=source, dtype=torch.float64)
    return q.to(dtype), k.to(dtype)


SHAPES = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 130), st.integers(1, 9))


@settings(deadline=None)
@given(SHAPES, st.integers(1, 12), st.sampled_from([None, 2.0]))
def test_band_equals_naive(shape, window, softcap):
    q, k = draw_qk(shape)
    band = banded_logits(q, k, scale=0.3, window=window, softcap=softcap)
    wanted = band_of(naive(q, k, 0.3, softcap), window)
    torch.testing.assert_close(band, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [1023, 1024, 1025, 2100])
def test_band_has_no_seam_between_chunks(length):
    q, k = draw_qk((1, 1, 2, length, 4))
    torch.testing.assert_close(
        banded_logits(q, k, scale=1.0, window=8), band_of(naive(q, k, 1.0, None), 8), rtol=1e-12, atol=1e-12
    )


@settings(deadline=None)
@given(SHAPES, st.sampled_from([None, 2.0]), st.sampled_from([None, 1, 5]), st.data())
def test_grid_rows_equal_naive_rows_with_hidden_keys(shape, softcap, sliding_window, data):
    q, k = draw_qk(shape)
    T = shape[3]
    rows = sorted(data.draw(st.sets(st.integers(0, T - 1), min_size=1)))
    found = grid_logits(q, k, rows=rows, scale=0.3, softcap=softcap, sliding_window=sliding_window)
    offset = torch.arange(T)[:, None] - torch.arange(T)
    hidden = (offset < 0) | (offset >= (sliding_window or T))
    wanted = naive(q, k, 0.3, softcap).masked_fill(hidden, -torch.inf)[:, :, rows]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_widened_before_the_product(dtype):
    q, k = draw_qk((2, 2, 2, 70, 64), dtype)
    exact = band_of(naive(q.double(), k.double(), 0.125, None), 8)
    found = banded_logits(q, k, scale=0.125, window=8)
    assert found.dtype == torch.float32
    # fp32 products of the given values: far below what dtype itself could hold (2^-8, 2^-11).
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_band_makes_no_tensor_that_grows_with_the_square_of_length():
    largest = []
    for length in (1024, 4096):
        q, k = draw_qk((1, 1, 2, length, 4), torch.float32)
        with LargestTensor() as probe:
            banded_logits(q, k, scale=1.0, window=8)
        largest.append(probe.numel)
    assert largest[1] <= 4 * largest[0]
    assert largest[1] < 2 * 4096 * 64


@pytest.mark.parametrize("interleaved", [False, True])
def test_pair_norms_are_what_rotation_leaves_alone(interleaved):
    x = torch.randn(2, 3, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    angle = torch.rand(4, dtype=torch.float64) * 6
    first, second = (x[..., 0:8:2], x[..., 1:8:2]) if interleaved else (x[..., :4], x[..., 4:8])
    turned = x.clone()
    a, b = first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()
    if interleaved:
        turned[..., 0:8:2], turned[..., 1:8:2] = a, b
    else:
        turned[..., :4], turned[..., 4:8] = a, b
    norms = pair_norms(x, rotary_dim=8, interleaved=interleaved)
    torch.testing.assert_close(norms, (first**2 + second**2).sqrt())
    torch.testing.assert_close(pair_norms(turned, rotary_dim=8, interleaved=interleaved), norms)


def test_cached_keys_are_refused():
    q, k = draw_qk((1, 1, 2, 6, 4))
    with pytest.raises(ValueError, match="6 queries on 8 keys"):
        banded_logits(q, torch.nn.functional.pad(k, (0, 0, 2, 0)), scale=1.0, window=2)
