"""Running sums: batches, ranks, memory, and what they refuse."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ropemods.leakage.estimate import estimate
from ropemods.leakage.layer_sums import one_per_group
from ropemods.leakage.protocol import Protocol
from ropemods.leakage.sums import Sums
from ropemods.settings.json_records import encode
from tests.leakage import two_ranks
from tests.leakage.synthetic import Causal, LargestTensor, Windowed, band_of

PLAIN = Protocol(sequences=16, length=32, groups=8, early=(8, 16), grid_rows=12, mask_term=False)


def numbers(sums: Sums) -> list[float]:
    """Every number of every estimate, flat."""
    found = estimate(sums)
    sections = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}

    def flat(value: object) -> list[float]:
        if isinstance(value, dict):
            return [x for item in value.values() for x in flat(item)]
        if isinstance(value, list):
            return [x for item in value for x in flat(item)]
        return [float(value)] if isinstance(value, int | float) else []

    return flat(encode(sections))


@pytest.mark.slow
def test_two_ranks_give_the_numbers_of_one(tmp_path: Path):
    alone, batches_alone = two_ranks.measure(two_ranks.crops(), distributed=False)
    wanted = torch.tensor(numbers(alone))
    states = two_ranks.on_two_ranks(tmp_path)
    assert int(states[0]["batches"]) == int(states[1]["batches"]) < batches_alone
    for state in states:
        merged = Sums(two_ranks.PROTOCOL)
        merged.load({k: v for k, v in state.items() if k != "batches"})
        found = torch.tensor(numbers(merged))
        assert len(wanted) > 1000
        # Differences near 0 (a leakage of 0) are held to the size of the terms.
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    for key in states[0]:
        assert torch.equal(states[0][key], states[1][key]), key


def test_batch_size_does_not_change_the_numbers():
    def measure(batch_size: int) -> Tensor:
        protocol = Protocol(**{**two_ranks.PROTOCOL.to_dict(), "batch_size": batch_size})
        crops = dataclasses.replace(two_ranks.crops(), protocol=protocol)
        return torch.tensor(numbers(two_ranks.measure(crops, distributed=False)[0]))

    torch.testing.assert_close(measure(1), measure(5), rtol=1e-5, atol=1e-6)


def test_group_minus_one_counts_for_nothing():
    source = torch.Generator().manual_seed(0)
    band = Windowed(PLAIN, 1.0).draw(5, 2, source)
    q = torch.randn(5, 2, 32, 4, generator=source)

    def state(chosen: list[int], groups: list[int]) -> dict[str, Tensor]:
        sums, x = Sums(PLAIN), band[chosen]
        sums.add(0, groups, band_BHTW=x, lse_BHT=x.logsumexp(-1), entropy_BHT=x[..., 0])
        sums.add_usage(0, groups, q_BHTD=q[chosen], k_BGTD=q[chosen])
        sums.add_loss(groups, x[:, 0, :, 0])
        return sums.state()

    with_filler, without = state([0, 1, 2, 3, 4], [0, -1, 3, 3, -1]), state([0, 2, 3], [0, 3, 3])
    assert with_filler.keys() == without.keys()
    for key in without:
        torch.testing.assert_close(with_filler[key], without[key], rtol=1e-6, atol=1e-6)


def test_state_taken_midway_goes_on_as_if_nothing_had_happened():
    causal = Causal(two_ranks.PROTOCOL, planted=1.0)
    whole = causal.sums(heads=2)
    p, source = two_ranks.PROTOCOL, torch.Generator().manual_seed(0)
    sums = Sums(p)
    mean, planted, content = causal.parts()
    s_PTS = (mean + planted + content).float()
    s_PTS = s_PTS.masked_fill(~torch.ones(p.length, p.length).tril().bool(), -torch.inf)
    for fold in p.folds():
        groups = [g for g in fold for _ in range(p.per_group)]
        for start in range(0, len(groups), p.batch_size):
            part = groups[start : start + p.batch_size]
            s = s_PTS[torch.randint(causal.patterns, (len(part), 2), generator=source)]
            sums.add(0, part, band_BHTW=band_of(s, 8), lse_BHT=s.logsumexp(-1), rows_BHRS=s[:, :, list(p.grid())])
            resumed = Sums(p)
            resumed.load(sums.state())
            sums = resumed
        sums.close_fold()
    torch.testing.assert_close(torch.tensor(numbers(sums)), torch.tensor(numbers(whole)), rtol=1e-6, atol=1e-7)


def test_memory_is_linear_in_length():
    """Kept sums and the largest tensor on the way both double with T (an offset for the window aside)."""
    kept, largest = [], []
    for length in (256, 512, 1024):
        protocol = Protocol(sequences=8, groups=8, length=length, early=(8, 64), mask_term=False)
        band = torch.randn(2, 3, length, 8)
        curve = band[..., 0]
        sums = Sums(protocol)
        with LargestTensor() as probe:
            sums.add(
                0,
                [0, 1],
                band_BHTW=band,
                lse_BHT=band.logsumexp(-1),
                bos_mass_BHT=curve,
                bos_logit_BHT=curve,
                position1_mass_BHT=curve,
                entropy_BHT=curve,
            )
        kept.append(sum(x.numel() for x in sums.state().values()))
        largest.append(probe.numel)
    assert kept[2] - kept[1] == 2 * (kept[1] - kept[0])
    assert largest[2] - largest[1] == 2 * (largest[1] - largest[0])
    # K · H · (T − w) · (w + 1) for the two maps, 4 · H · T for the curves, and little else.
    assert kept[2] < 1.01 * (8 * 3 * 1016 * 9 + 4 * 3 * 1024)


def test_sums_are_kept_on_the_device_that_was_asked_for():
    band = Windowed(PLAIN, 1.0).draw(4, 2, torch.Generator().manual_seed(0))
    sums = Sums(PLAIN, device="meta")
    sums.add(0, [0, 3, 3, 1], band_BHTW=band, lse_BHT=band.logsumexp(-1))
    kept = sums.state()["0.residual"]
    assert kept.device.type == "meta" and kept.shape == (8, 2, 24, 8)


def test_one_sum_per_group_is_sent_to_another_device():
    x = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))
    groups, totals = one_per_group(torch.tensor([4, 0, 4, 4, 1]), x)
    assert groups.tolist() == [0, 1, 4]
    torch.testing.assert_close(totals, torch.stack((x[1], x[4], x[0] + x[2] + x[3])))


def test_groups_out_of_order_are_refused():
    p = two_ranks.PROTOCOL
    sums, band = Sums(p), torch.zeros(1, 2, 32, 8)
    with pytest.raises(ValueError, match=r"group 4 came while fold 0 \(groups 0 to 1\) is open"):
        sums.add(0, [4], band_BHTW=band, lse_BHT=band[..., 0])
    for _ in p.folds():
        sums.close_fold()
    with pytest.raises(RuntimeError, match="3 folds"):
        sums.close_fold()
    with pytest.raises(RuntimeError, match="complete"):
        sums.add(0, [0], band_BHTW=band, lse_BHT=band[..., 0])


def test_merging_twice_is_refused():
    sums = Windowed(PLAIN, 0.0).sums(heads=1)
    sums.merge()
    with pytest.raises(RuntimeError, match="count twice"):
        sums.merge()


def test_rows_that_come_late_are_refused():
    p = two_ranks.PROTOCOL
    sums, band = Sums(p), torch.zeros(1, 2, 32, 8)
    sums.add(0, [0], band_BHTW=band, lse_BHT=band[..., 0])
    sums.close_fold()
    with pytest.raises(RuntimeError, match="from the first fold on"):
        sums.add(0, [2], band_BHTW=band, lse_BHT=band[..., 0], rows_BHRS=torch.zeros(1, 2, 12, 32))


@pytest.mark.parametrize("wrong", ["band_BHTW", "lse_BHT", "rows_BHRS"])
def test_shapes_other_than_the_protocols_are_refused(wrong):
    given = {
        "band_BHTW": torch.zeros(1, 2, 32, 8),
        "lse_BHT": torch.zeros(1, 2, 32),
        "rows_BHRS": torch.zeros(1, 2, 12, 32),
    }
    given[wrong] = given[wrong][:, :, :-1]
    with pytest.raises(ValueError, match=wrong.split("_")[0]):
        Sums(two_ranks.PROTOCOL).add(0, [0], **given)
