"""Curves and averages beside leakage: known inputs come back."""

from __future__ import annotations

import math

import pytest
import torch

from ropemods.leakage.curves import query_points, usage
from ropemods.leakage.estimate import estimate
from ropemods.leakage.protocol import Protocol
from ropemods.leakage.sums import Sums
from tests.leakage.synthetic import Windowed, measured

PROTOCOL = Protocol(sequences=64, length=48, early=(8, 24), mask_term=False, batch_size=16, grid_rows=16)


def test_curves_are_means_over_sequences_and_heads():
    windowed, source = Windowed(PROTOCOL, 0.0), torch.Generator().manual_seed(0)
    i = torch.arange(48.0)

    def give(sums: Sums, groups: list[int]) -> None:
        band = windowed.draw(len(groups), 2, source)
        sign = 1 - 2 * (torch.tensor(groups) % 2)[:, None, None]  # cancels in the mean over groups
        scale = torch.tensor([1.0, 3.0])[None, :, None]
        curve = scale / (1 + i) + 0.01 * sign
        sums.add(
            0,
            groups,
            band_BHTW=band,
            lse_BHT=band.logsumexp(-1),
            bos_mass_BHT=curve,
            bos_logit_BHT=torch.full_like(curve, -torch.inf),
            position1_mass_BHT=curve / 2,
            entropy_BHT=curve + 1,
        )

    found = estimate(measured(PROTOCOL, give))
    sink, entropy = found.sink, found.entropy
    assert sink is not None and entropy is not None
    at = list(sink.query)
    assert sink.bos_mass[0] == pytest.approx([2 / (1 + n) for n in at], rel=1e-5)
    assert sink.position1_mass[0] == pytest.approx([1 / (1 + n) for n in at], rel=1e-5)
    assert all(math.isnan(x) for x in sink.bos_logit[0])  # a closed column has no logit
    mean = float((1 / (1 + i[8:])).mean())
    assert sink.heads_bos_mass[0] == pytest.approx([mean, 3 * mean], rel=1e-5)
    assert sink.bos_mass_all is not None and sink.bos_mass_all.value == pytest.approx(2 * mean, rel=1e-5)
    assert sink.bos_mass_all.low <= 2 * mean <= sink.bos_mass_all.high
    assert entropy.bins == ((8, 16), (16, 32), (32, 48))
    wanted = [1 + 2 * float((1 / (1 + i[a:b])).mean()) for a, b in entropy.bins]
    assert entropy.layers[0] == pytest.approx(wanted, rel=1e-5)
    assert not found.notes


def test_curves_that_no_layer_defines_are_absent():
    found = estimate(Windowed(PROTOCOL, 0.0).sums(heads=1))
    assert found.sink is None and found.entropy is None and found.held_out_loss is None


def test_loss_is_nats_per_token_with_the_interval_of_its_groups():
    source = torch.Generator().manual_seed(3)
    nll = 2 + torch.randn(64, 47, generator=source) * 0.5
    rows = iter(nll.split(16))
    windowed = Windowed(PROTOCOL, 0.0)

    def give(sums: Sums, groups: list[int]) -> None:
        band = windowed.draw(len(groups), 1, source)
        sums.add(0, groups, band_BHTW=band, lse_BHT=band.logsumexp(-1))
        sums.add_loss(groups, next(rows))

    loss = estimate(measured(PROTOCOL, give)).held_out_loss
    assert loss is not None
    assert loss.value == pytest.approx(float(nll.mean()), rel=1e-6)
    half_width = 1.96 * 0.5 / (64 * 47) ** 0.5
    assert (loss.high - loss.low) / 2 == pytest.approx(half_width, rel=0.3)


def test_usage_gives_the_norm_of_every_pair_without_bos():
    sums, source = Sums(PROTOCOL), torch.Generator().manual_seed(1)
    q = torch.randn(16, 2, 48, 8, generator=source)
    k = torch.ones(16, 1, 48, 8)
    k[..., 5] = 7
    q[:, :, 0] = k[:, :, 0] = 1e6  # BOS, which must not count
    sums.add_usage(0, [0] * 8 + [-1] * 8, q_BHTD=q, k_BGTD=k)
    found = usage(sums, [[1.0, 10.0, 100.0, 1000.0]])
    assert found is not None
    kept = q[:8, :, 1:]
    pairs = torch.stack((kept[..., :4], kept[..., 4:])).norm(dim=0).mean((0, 2))
    assert found.query[0][1] == pytest.approx(pairs[1].tolist(), rel=1e-5)
    assert found.key[0] == (pytest.approx((2**0.5, 50**0.5, 2**0.5, 2**0.5), rel=1e-5),)
    assert found.largest_channels["key"][0][0] == [0, 5, pytest.approx(7.0)]


def test_query_points_are_dense_at_the_start_and_end_at_the_last_query():
    for length in (16, 512, 8192):
        points = query_points(length)
        assert points[:8] == tuple(range(1, 9)) and points[-1] == length - 1
        assert list(points) == sorted(set(points)) and len(points) <= 96
