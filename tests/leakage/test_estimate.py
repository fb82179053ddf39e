"""Residual and total: planted values are recovered, without bias and within their intervals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ropemods.leakage.draws import interval, multipliers, pair_draws, pair_mean
from ropemods.leakage.estimate import ALL, EARLY, estimate, grams, group_maps
from ropemods.leakage.protocol import Protocol
from ropemods.leakage.sums import Sums
from tests.leakage.synthetic import Causal, Windowed, far_spread, measured, spread

REPETITIONS = 200
WINDOWED = Protocol(sequences=64, length=96, early=(8, 48), window=8, mask_term=False, batch_size=64, grid_rows=16)
CAUSAL = Protocol(sequences=64, length=48, early=(8, 24), mask_term=False, batch_size=64, grid_rows=16)


def all_grams(sums: Sums, term: str, heads: int) -> Tensor:
    """[H, M, K, K]: every head is one repetition."""
    maps = (group_maps(sums, 0, head, term) for head in range(heads))
    return torch.stack([grams(*sides, sums.protocol) for sides in maps if sides is not None])


@pytest.mark.parametrize("measure", [ALL, EARLY])
@pytest.mark.parametrize("planted", [0.0, 0.3, 1.0])
def test_planted_value_is_unbiased_and_covered(planted, measure):
    """200 repetitions: the mean within 3 standard errors, the 95% interval right in 90 to 99%."""
    windowed = Windowed(WINDOWED, planted, block=2)
    truth_IW = windowed.truth()
    truth = spread(truth_IW) if measure == ALL else far_spread(truth_IW, WINDOWED, *WINDOWED.early)
    assert truth > 5e-4 if planted else truth < 1e-20
    gram = all_grams(windowed.sums(heads=REPETITIONS), "residual", REPETITIONS)[:, measure]
    value, draws = pair_draws(gram, multipliers(WINDOWED))
    assert abs(float(value.mean()) - truth) < 3 * float(value.std()) / REPETITIONS**0.5
    low, high = interval(draws, 0.95)
    assert 0.90 <= float(((low <= truth) & (truth <= high)).double().mean()) <= 0.99


def test_square_of_a_plain_mean_would_be_biased():
    """What the pairs are for: with the noise of each group's own square, 0 is far from 0."""
    gram = all_grams(Windowed(WINDOWED, 0.0).sums(heads=50), "residual", 50)[:, ALL]
    plain = gram.mean((-1, -2))
    assert float(plain.mean()) > 10 * float(pair_mean(gram).mean().abs())


def test_report_terms_recover_the_planted_value():
    windowed = Windowed(WINDOWED, planted=1.0)
    found, truth = estimate(windowed.sums(heads=4)), windowed.truth()
    for name in ("residual", "total"):
        term = found.terms[name]
        assert 0 < term.all.low <= spread(truth) <= term.all.high
        assert 0 < term.early.low <= far_spread(truth, WINDOWED, *WINDOWED.early) <= term.early.high
        for bin in term.bins[:2]:
            assert bin.low <= far_spread(truth, WINDOWED, bin.start, bin.stop) <= bin.high
        assert term.layers[0].all.value == pytest.approx(term.all.value, rel=1e-12)
        assert sum(term.heads.all[0]) / 4 == pytest.approx(term.all.value, rel=1e-12)
        assert term.layer_bins[0][0] == pytest.approx(term.bins[0].value, rel=1e-12)
        assert len(term.all.replicates) == WINDOWED.replicates
    # All mass is inside the window, so the two are one and the same.
    assert found.terms["total"].all.value == pytest.approx(found.terms["residual"].all.value, rel=1e-5)
    assert "mask" not in found.terms and found.closure_gap is None and found.share is None


@pytest.mark.parametrize("name", ["residual", "total"])
def test_causal_rows_with_a_planted_departure_are_recovered(name):
    causal = Causal(CAUSAL, planted=1.5, patterns=100)
    truth = spread(causal.maps()[name])
    gram = all_grams(causal.sums(heads=REPETITIONS), name, REPETITIONS)[:, ALL]
    value, draws = pair_draws(gram, multipliers(CAUSAL))
    assert abs(float(value.mean()) - truth) < 3 * float(value.std()) / REPETITIONS**0.5
    low, high = interval(draws, 0.95)
    assert 0.90 <= float(((low <= truth) & (truth <= high)).double().mean()) <= 0.99


def test_queries_reindexed_at_random_give_nothing():
    """The same logits, the queries of each sequence in random order: no position is left to tell."""
    windowed, source = Windowed(WINDOWED, planted=1.0), torch.Generator().manual_seed(9)

    def give(sums: Sums, groups: list[int]) -> None:
        band = windowed.draw(len(groups), 30, source)
        order = torch.rand(len(groups), WINDOWED.length, generator=source).argsort(1)
        band = band.gather(2, order[:, None, :, None].expand_as(band))
        sums.add(0, groups, band_BHTW=band, lse_BHT=band.logsumexp(-1))

    found = estimate(measured(WINDOWED, give)).terms["residual"]
    for e in (found.all, found.early):
        assert e.low <= 0 <= e.high < 0.05 * spread(windowed.truth())


def test_total_is_residual_plus_window_mass_plus_twice_their_covariance():
    """log a = log(a/m) + log m, and every product is bilinear: the identity holds to rounding."""
    sums = Causal(CAUSAL, planted=1.0).sums(heads=3)
    for head in range(3):
        residual, _ = group_maps(sums, 0, head, "residual") or ()
        total, _ = group_maps(sums, 0, head, "total") or ()
        log_m = (total - residual)[..., :1].expand_as(total)
        torch.testing.assert_close(total - residual, log_m, rtol=0, atol=1e-6)

        def product(x: Tensor, y: Tensor) -> float:
            return float(pair_mean(grams(x, y, CAUSAL))[ALL])

        parts = product(residual, residual) + product(log_m, log_m) + 2 * product(residual, log_m)
        assert product(total, total) == pytest.approx(parts, rel=1e-5)
        assert abs(2 * product(residual, log_m)) > 1e-4  # the covariance is not negligible here


def test_products_of_two_chains_do_not_care_which_group_gave_which():
    source = torch.Generator().manual_seed(2)
    a, b = torch.randn(2, 6, 40, 1, generator=source, dtype=torch.float64)
    one_way = grams(a, b, CAUSAL)
    torch.testing.assert_close(one_way, grams(b, a, CAUSAL), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one_way, one_way.mT, rtol=1e-12, atol=1e-12)
    x, y = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    wanted = float(((x[0] * y[3]).mean() + (x[3] * y[0]).mean()) / 2)
    assert float(one_way[ALL, 0, 3]) == pytest.approx(wanted, rel=1e-12)


def test_means_over_layers_and_heads_are_means_of_the_parts():
    shallow, deep = Windowed(WINDOWED, 0.5), Windowed(WINDOWED, 1.0)
    source = torch.Generator().manual_seed(1)

    def give(sums: Sums, groups: list[int]) -> None:
        for layer, windowed in ((0, shallow), (3, deep)):
            band = windowed.draw(len(groups), 2, source)
            sums.add(layer, groups, band_BHTW=band, lse_BHT=band.logsumexp(-1))

    term = estimate(measured(WINDOWED, give)).terms["residual"]
    layers = [layer.early.value for layer in term.layers]
    assert term.early.value == pytest.approx(sum(layers) / 2, rel=1e-12)
    assert layers[1] > 2 * layers[0] > 0


def test_a_head_with_a_nan_is_dropped_and_named_and_the_rest_is_kept():
    source = torch.Generator().manual_seed(1)
    whole = Windowed(WINDOWED, 1.0).draw(WINDOWED.sequences, 3, source)

    def measure(band_NHTW: Tensor) -> Sums:
        rows = iter(band_NHTW.split(WINDOWED.batch_size))

        def give(sums: Sums, groups: list[int]) -> None:
            band = next(rows)
            mass = band[..., 0].sigmoid()
            sums.add(0, groups, band_BHTW=band, lse_BHT=band.logsumexp(-1), bos_mass_BHT=mass)

        return measured(WINDOWED, give)

    broken = whole.clone()
    broken[17, 1, 40, 2] = torch.nan
    found, wanted = estimate(measure(broken)), estimate(measure(whole[:, [0, 2]]))
    term, same = found.terms["residual"], wanted.terms["residual"]
    assert term.all == same.all and term.early == same.early
    assert math.isnan(term.heads.all[0][1])
    assert [term.heads.all[0][n] for n in (0, 2)] == list(same.heads.all[0])
    assert found.sink is not None and wanted.sink is not None
    assert found.sink.bos_mass == wanted.sink.bos_mass
    assert found.sink.bos_mass_all == wanted.sink.bos_mass_all
    assert found.notes == (
        "layer 0, head 1: NaN or infinity in local logits, log Z of 1 of 64 sequences; left out of every mean",
    )


def test_a_layer_of_which_nothing_is_left_is_undefined_and_the_others_count():
    source = torch.Generator().manual_seed(1)

    def give(sums: Sums, groups: list[int]) -> None:
        band = Windowed(WINDOWED, 1.0).draw(len(groups), 2, source)
        sums.add(0, groups, band_BHTW=band, lse_BHT=band.logsumexp(-1))
        sums.add(1, groups, band_BHTW=band, lse_BHT=torch.full_like(band[..., 0], torch.inf))

    found = estimate(measured(WINDOWED, give))
    term = found.terms["residual"]
    assert math.isnan(term.layers[1].all.value)
    assert term.all.value == term.layers[0].all.value
    assert len(found.notes) == 2 and all("log Z of 64 of 64" in note for note in found.notes)


def test_incomplete_sums_are_refused():
    sums = Sums(WINDOWED)
    with pytest.raises(ValueError, match="no layer"):
        estimate(sums)
    band = Windowed(WINDOWED, 1.0).draw(1, 2, torch.Generator())
    sums.add(0, [0], band_BHTW=band, lse_BHT=band.logsumexp(-1))
    with pytest.raises(ValueError, match="layer 0 has 1 of the 2 sequences of group 0"):
        estimate(sums)
