"""Products of disjoint groups: unbiased, with variances and intervals that are right."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from ropemods.leakage.draws import (
    hoeffding,
    interval,
    mean_draws,
    multipliers,
    pair_draws,
    pair_mean,
    variances,
)
from ropemods.leakage.protocol import Protocol

PROTOCOL = Protocol()


def noisy_grams(repetitions: int, groups: int, features: int, planted: float) -> Tensor:
    """Gram matrices of groups of noisy vectors whose mean has the square `planted`."""
    source = torch.Generator().manual_seed(int(1000 * planted) + features)
    noise = torch.randn(repetitions, groups, features, generator=source, dtype=torch.float64)
    x = noise / features**0.5 + (planted / features) ** 0.5
    return x @ x.mT


def test_value_is_the_mean_over_all_pairs_of_different_groups():
    gram = noisy_grams(1, 6, 5, 1.0)[0]
    pairs = [float(gram[g, h]) for g, h in itertools.permutations(range(6), 2)]
    assert float(pair_mean(gram)) == pytest.approx(sum(pairs) / len(pairs), rel=1e-12)


def test_parts_put_together_are_the_gram_matrix():
    gram = noisy_grams(2, 9, 5, 1.0)
    value, a, b = hoeffding(gram)
    again = value[:, None, None] + a[:, :, None] + a[:, None, :] + b
    off = ~torch.eye(9, dtype=torch.bool)
    torch.testing.assert_close(again[:, off], gram[:, off], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(b.sum(-1), torch.zeros(2, 9).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(a.sum(-1), torch.zeros(2).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("planted", [0.0, 0.05, 1.0])
def test_value_and_variance_are_unbiased(planted):
    repetitions, K = 4000, 16
    value, a, b = hoeffding(noisy_grams(repetitions, K, 40, planted))
    standard_error = float(value.std()) / repetitions**0.5
    assert abs(float(value.mean()) - planted) < 3 * standard_error
    zeta_a, zeta_b = variances(a, b)
    predicted = (4 * zeta_a / K + 2 * zeta_b / (K * (K - 1))).mean()
    # The sample variance of 4000 values scatters by √(2/4000) = 2.2%.
    assert float(predicted) == pytest.approx(float(value.var()), rel=0.07)


@pytest.mark.parametrize("planted", [0.0, 0.01, 0.2, 5.0])
def test_interval_covers_in_90_to_99_percent(planted):
    gram = noisy_grams(1000, PROTOCOL.groups, 200, planted)
    _, draws = pair_draws(gram, multipliers(PROTOCOL))
    low, high = interval(draws, 0.95)
    covered = ((low <= planted) & (planted <= high)).double().mean()
    assert 0.90 <= float(covered) <= 0.99


def test_replicates_average_to_the_value_and_a_wider_confidence_contains_a_narrower():
    value, draws = pair_draws(noisy_grams(20, PROTOCOL.groups, 30, 0.3), multipliers(PROTOCOL))
    torch.testing.assert_close(draws.mean(-1), value, rtol=1e-12, atol=1e-12)
    low, high = interval(draws, 0.95)
    low_50, high_50 = interval(draws, 0.5)
    assert (low < low_50).all() and (high_50 < high).all()


def test_multipliers_follow_from_the_protocol_alone():
    x = multipliers(PROTOCOL)
    assert x.shape == (PROTOCOL.replicates, PROTOCOL.groups)
    assert torch.equal(x, multipliers(Protocol(length=256, batch_size=1)))
    assert not torch.equal(x, multipliers(Protocol(seed=1)))
    torch.testing.assert_close(x.sum(1), torch.zeros(len(x)).double(), rtol=0, atol=1e-12)
    # 400 · 31 free normals: their variance scatters by 1.3%.
    assert float(x.var(correction=0)) == pytest.approx(1.0, abs=0.05)


def test_some_groups_share_their_multipliers_with_all_groups():
    some, every = multipliers(PROTOCOL, range(12, 32)), multipliers(PROTOCOL)[:, 12:]
    torch.testing.assert_close(some.sum(1), torch.zeros(len(some)).double(), rtol=0, atol=1e-12)
    assert float(torch.corrcoef(torch.stack((some.flatten(), every.flatten())))[0, 1]) > 0.95


def test_paired_difference_is_far_narrower_than_an_unpaired_one():
    source = torch.Generator().manual_seed(3)
    x = 1 + torch.randn(PROTOCOL.groups, 50, generator=source, dtype=torch.float64)
    (_, before), (_, after) = (pair_draws(v @ v.T / 50, multipliers(PROTOCOL)) for v in (x, 0.95 * x))
    paired = (after - before).std()
    unpaired = (before.var() + after.var()).sqrt()
    assert float(paired) < 0.15 * float(unpaired)


def test_plain_mean_has_the_classical_standard_error():
    values = torch.randn(PROTOCOL.groups, generator=torch.Generator().manual_seed(1)).double()
    mean, draws = mean_draws(values, multipliers(Protocol(replicates=20_000)))
    assert float(mean) == pytest.approx(float(values.mean()), rel=1e-12)
    assert float(draws.std()) == pytest.approx(float(values.std()) / 32**0.5, rel=0.03)
