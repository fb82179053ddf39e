"""The mask term: interpolation between grid rows, diagonals, and known answers."""

from __future__ import annotations

import pytest
import torch

from ropemods.leakage.draws import interval, multipliers, pair_draws
from ropemods.leakage.estimate import estimate, grams, group_maps
from ropemods.leakage.mask import Geometry, interpolation
from ropemods.leakage.protocol import Protocol
from tests.leakage.synthetic import Causal, Windowed, band_of, far_spread, measured, spread

SMALL = Protocol(sequences=96, length=40, early=(8, 16), grid_rows=32, batch_size=48)
"""A grid of all rows: truth and estimate then mean the same rows."""


def test_interpolation_reproduces_a_line_in_log_i():
    rows = (8, 11, 30, 64, 99)
    weights = interpolation(rows, range(8, 100))
    line = 2 - 3 * torch.arange(8.0, 100.0, dtype=torch.float64).log()
    torch.testing.assert_close(weights @ line[[r - 8 for r in rows]], line, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weights.sum(1), torch.ones(92).double(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("length", [512, 8192])
def test_default_grid_loses_little_of_a_smooth_map(length):
    """−log Z of keys that are all alike, of keys with a local peak, and of a row with a sink."""
    protocol = Protocol(length=length)
    i = torch.arange(8.0, length, dtype=torch.float64)
    at = [row - 8 for row in protocol.grid()]
    weights = interpolation(protocol.grid(), range(8, length))
    for v in (-(i + 1).log(), -(i + 50).log(), -(i + 1 + 20 * torch.exp(-i / 40)).log()):
        full, kept = v[:, None], (weights @ v[at])[:, None]
        assert spread(kept) == pytest.approx(spread(full), rel=2e-3)
        for start, stop in (protocol.early, *protocol.bins()):
            wanted = far_spread(full, protocol, start, stop)
            assert far_spread(kept, protocol, start, stop) == pytest.approx(wanted, rel=5e-3)


def test_departure_is_zero_for_toeplitz_rows_and_sums_to_zero_along_diagonals():
    visible = torch.ones(40, 40).tril().bool()[list(SMALL.grid())]
    geometry = Geometry(SMALL, visible)
    offset = (torch.arange(40)[:, None] - torch.arange(40)).clamp(min=0)
    toeplitz = torch.randn(40, generator=torch.Generator().manual_seed(0))[offset][list(SMALL.grid())]
    y = geometry.by_offset(toeplitz[None, None].masked_fill(~visible, -torch.inf))
    torch.testing.assert_close(geometry.departure(y), torch.zeros_like(y), rtol=0, atol=1e-6)
    noise = geometry.by_offset(torch.randn(1, 1, 32, 40, generator=torch.Generator().manual_seed(1)))
    d = geometry.departure(noise)[0, 0]
    torch.testing.assert_close((d * geometry.weight_RO).sum(0), torch.zeros(40), rtol=0, atol=1e-6)
    bos = geometry.column_RO == 0
    assert (d[bos] == 0).all() and (d[geometry.content_RO] != 0).any()


def test_toeplitz_logits_give_no_residual_and_mask_equal_to_total():
    """Each sequence is Toeplitz, each with its own content: only the causal mask tells position."""
    causal = Causal(SMALL, noise=0.7, toeplitz_content=True)
    found = estimate(causal.sums(heads=8))
    truth = {name: spread(v) for name, v in causal.maps().items()}
    assert truth["residual"] < 1e-20 and truth["mask"] == pytest.approx(truth["total"], rel=1e-12)
    assert abs(found.terms["residual"].all.value) < 1e-10
    for name in ("mask", "total"):
        assert found.terms[name].all.low <= truth["total"] <= found.terms[name].all.high
    assert found.closure_gap is not None and found.closure_gap.low <= 0 <= found.closure_gap.high
    assert found.share is not None and abs(found.share.value) < 1e-8


def test_attention_of_constant_size_has_no_mask_term():
    """A planted departure over a window of w keys, and w of them for every query: mask 0."""
    protocol = Protocol(sequences=384, length=32, early=(8, 16), grid_rows=24, batch_size=48)
    windowed, source = Windowed(protocol, planted=1.0, block=1), torch.Generator().manual_seed(2)

    def give(sums, groups):
        band = windowed.draw(len(groups), 20, source)
        rows = torch.full((len(groups), 20, 32, 32), -torch.inf)
        for offset in range(8):
            i = torch.arange(offset, 32)
            rows[:, :, i, i - offset] = band[:, :, offset:, offset]
        sums.add(0, groups, band_BHTW=band, lse_BHT=band.logsumexp(-1), rows_BHRS=rows[:, :, list(protocol.grid())])

    sums = measured(protocol, give)
    found, planted = estimate(sums).terms, spread(windowed.truth())
    for name in ("residual", "total"):
        assert 0 < found[name].all.low <= planted <= found[name].all.high
    assert found["mask"].all.low <= 0 <= found["mask"].all.high < 1e-3 * planted


@pytest.mark.parametrize("planted", [0.0, 1.0])
def test_mask_is_unbiased_and_covered_whatever_departure_is_planted(planted):
    """200 repetitions: the planted departure is in residual and total, and must not reach the mask."""
    protocol = Protocol(sequences=384, length=24, early=(8, 12), grid_rows=16, batch_size=48)
    causal = Causal(protocol, planted=planted, patterns=100)
    sums, truth = causal.sums(heads=200, seed=4), spread(causal.maps()["mask"])
    gram = torch.stack([grams(*group_maps(sums, 0, h, "mask"), protocol)[0] for h in range(200)])
    value, draws = pair_draws(gram, multipliers(protocol, protocol.folds()[-1]))
    assert abs(float(value.mean()) - truth) < 3 * float(value.std()) / 200**0.5
    low, high = interval(draws, 0.95)
    assert 0.90 <= float(((low <= truth) & (truth <= high)).double().mean()) <= 0.99


def test_a_learned_sink_joins_the_denominator():
    """With a sink logit far above the keys log Z is the sink's, which no mask can move."""

    def measure(sink: float):
        source = torch.Generator().manual_seed(5)

        def give(sums, groups):
            s = torch.randn(len(groups), 2, 40, 40, generator=source)
            s = s.masked_fill(~torch.ones(40, 40).tril().bool(), -torch.inf)
            extra = torch.full((len(groups), 2, 40), sink)
            sums.add(
                0,
                groups,
                band_BHTW=band_of(s, 8),
                lse_BHT=torch.logaddexp(s.logsumexp(-1), extra),
                rows_BHRS=s[:, :, list(SMALL.grid())],
                row_extra_BHR=extra[:, :, list(SMALL.grid())],
            )

        return estimate(measured(SMALL, give)).terms

    low, high = measure(-30.0), measure(12.0)
    assert low["mask"].all.low > 0.1
    assert abs(high["mask"].all.value) < 1e-4 * low["mask"].all.value
    assert high["mask"].all.value == pytest.approx(high["total"].all.value - high["residual"].all.value, abs=0.05)
