"""Comparisons are paired where they may be, refuse what is not alike, and claim no more than noise."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ropemods.leakage.draws import multipliers, pair_draws
from ropemods.leakage.protocol import Protocol
from ropemods.report.comparison import Change, compare, compare_arms
from ropemods.report.records import Estimate
from ropemods.report.report import Report
from tests.leakage.fake_reports import PROTOCOL, fake_report, four_arms, shared_noise


def _with_early(report: Report, early: Estimate) -> Report:
    residual = dataclasses.replace(report.terms["residual"], early=early)
    return dataclasses.replace(report, terms={**report.terms, "residual": residual})


SMALL = fake_report(optional=False, layers=1, heads=1)


def _early(before: Estimate, after: Estimate) -> Change:
    comparison = compare(_with_early(SMALL, before), _with_early(SMALL, after))
    change = comparison.headline.find("residual", "early")
    assert change is not None
    return change


def _estimate(value: float, replicates: list[float]) -> Estimate:
    low, high = np.quantile(replicates, (0.025, 0.975))
    return Estimate(value, float(low), float(high), tuple(replicates))


def test_noise_that_both_arms_share_cancels_exactly() -> None:
    noise = np.array(shared_noise())
    change = _early(_estimate(5.0, list(5.0 + 0.5 * noise)), _estimate(3.0, list(3.0 + 0.5 * noise)))
    assert change.delta.value == -2.0
    assert change.delta.low == pytest.approx(-2.0, abs=1e-12)
    assert change.delta.high == pytest.approx(-2.0, abs=1e-12)
    assert change.clear


def test_a_common_factor_cancels_in_the_ratio() -> None:
    factor = np.exp(0.2 * np.array(shared_noise()))
    change = _early(_estimate(5.0, list(5.0 * factor)), _estimate(2.0, list(2.0 * factor)))
    assert change.ratio is not None
    assert change.ratio.value == pytest.approx(0.4, abs=1e-12)
    assert (change.ratio.low, change.ratio.high) == pytest.approx((0.4, 0.4), abs=1e-12)
    assert change.delta.high - change.delta.low > 0.5


def test_the_interval_is_the_middle_of_the_replicates() -> None:
    before, after = [10.0] * 201, [10.0 + k for k in range(201)]
    delta = _early(_estimate(10.0, before), _estimate(110.0, after)).delta
    assert (delta.low, delta.value, delta.high) == pytest.approx((5.0, 100.0, 195.0), abs=1e-12)


def test_confidence_of_the_protocol_is_honoured() -> None:
    wide, narrow = (
        compare(*(fake_report(arm_seed=s, protocol=p) for s in (1, 2))).headline.changes[0].delta
        for p in (PROTOCOL, dataclasses.replace(PROTOCOL, confidence=0.5))
    )
    assert narrow.high - narrow.low < 0.5 * (wide.high - wide.low)


def test_paired_intervals_are_narrower_on_correlated_replicates() -> None:
    before, after = fake_report(arm_seed=1), fake_report(arm_seed=2, residual=0.005)
    elsewhere = dataclasses.replace(after, text=dataclasses.replace(after.text, digest="another text"))
    paired = compare(before, after).headline
    unpaired = compare(before, elsewhere, allow_different_protocols=True).headline
    assert paired.paired and not unpaired.paired
    for quantity, scope in (("residual", "early"), ("mask", "all"), ("held_out_loss", "all")):
        a, b = paired.find(quantity, scope), unpaired.find(quantity, scope)
        assert a is not None and b is not None
        assert a.delta.value == b.delta.value
        assert a.delta.high - a.delta.low < 0.7 * (b.delta.high - b.delta.low)


@pytest.mark.parametrize(("size_before", "size_after"), [(0.0, 0.0), (0.3, 0.3), (0.3, 0.15)])
def test_paired_intervals_cover_a_planted_difference(size_before: float, size_after: float) -> None:
    """Two arms whose maps share most of their noise; the documents' draws are the real ones."""
    protocol, repetitions, shared = Protocol(), 600, 0.9
    K, D = protocol.groups, 100
    noise = torch.Generator().manual_seed(1)
    x_RK = multipliers(protocol)
    map_D = torch.randn(D, generator=noise, dtype=torch.float64)
    map_D /= map_D.square().mean().sqrt()
    covered = {"delta": 0, "ratio": 0}
    for _ in range(repetitions):
        common_KD = torch.randn(K, D, generator=noise, dtype=torch.float64)
        arms = []
        for size in (size_before, size_after):
            own_KD = torch.randn(K, D, generator=noise, dtype=torch.float64)
            maps_KD = size * map_D + shared * common_KD + math.sqrt(1 - shared**2) * own_KD
            value, draws_R = pair_draws(maps_KD @ maps_KD.T / D, x_RK)
            arms.append(_estimate(float(value), draws_R.tolist()))
        change = _early(*arms)
        covered["delta"] += change.delta.low <= size_after**2 - size_before**2 <= change.delta.high
        if change.ratio is not None:
            ratio = size_after**2 / size_before**2 if size_before else math.nan
            covered["ratio"] += change.ratio.low <= ratio <= change.ratio.high
    assert 0.90 <= covered["delta"] / repetitions <= 0.99
    if size_before:
        assert 0.90 <= covered["ratio"] / repetitions <= 0.99


def test_no_ratio_to_a_value_that_may_be_zero() -> None:
    noise = np.array(shared_noise())
    change = _early(_estimate(0.1, list(0.1 + 0.5 * noise)), _estimate(3.0, list(3.0 + 0.5 * noise)))
    assert change.ratio is None
    assert change.delta.value == pytest.approx(2.9)


def test_a_difference_within_noise_is_not_claimed() -> None:
    comparison = compare(fake_report(arm_seed=1), fake_report(arm_seed=2))
    early = comparison.headline.find("residual", "early")
    assert early is not None and not early.clear
    first = comparison.to_markdown().splitlines()[2]
    assert "cannot be told from 0" in first
    assert "falls" not in first and "rises" not in first


def test_sink_mass_without_replicates_has_no_interval() -> None:
    reports = []
    for mass in (0.4, 0.1):
        report = fake_report(bos_mass=mass)
        assert report.sink is not None
        sink = dataclasses.replace(report.sink, bos_mass_all=None, position1_mass_all=None)
        reports.append(dataclasses.replace(report, sink=sink))
    change = compare(*reports).headline.find("bos_mass")
    assert change is not None
    assert change.delta.value < -0.2 and math.isnan(change.delta.low)
    assert not change.clear
    assert compare(*reports).headline.find("position1_mass") is None


def test_different_protocols_are_refused_by_field() -> None:
    other = dataclasses.replace(PROTOCOL, window=6, groups=16, batch_size=1)
    with pytest.raises(ValueError, match="not measured alike") as error:
        compare(fake_report(), fake_report(protocol=other))
    text = str(error.value)
    assert "protocol.window is 8 in before, 6 in after" in text
    assert "protocol.groups is 32 in before, 16 in after" in text
    assert "length" not in text and "batch_size" not in text and "allow_different_protocols=True" in text


def test_a_batch_size_is_no_difference() -> None:
    other = dataclasses.replace(PROTOCOL, batch_size=1)
    assert compare(fake_report(), fake_report(protocol=other, arm_seed=2)).headline.paired


def test_different_protocols_may_be_compared_when_asked_and_say_so(tmp_path: Path) -> None:
    other = dataclasses.replace(PROTOCOL, window=6)
    comparison = compare(fake_report(), fake_report(protocol=other), allow_different_protocols=True)
    assert not comparison.headline.paired
    assert comparison.differences == ("protocol.window is 8 in before, 6 in after",)
    assert "**Measured differently**: protocol.window is 8" in comparison.to_markdown()
    page = comparison.to_html(tmp_path / "c.html").read_text()
    assert "Measured differently: protocol.window is 8 in before, 6 in after." in page


@pytest.mark.parametrize("allowed", [False, True])
def test_different_lengths_are_always_refused(allowed: bool) -> None:
    other = dataclasses.replace(PROTOCOL, length=256)
    with pytest.raises(ValueError, match="sequence length is 512 in before and 256 in after"):
        compare(fake_report(), fake_report(protocol=other), allow_different_protocols=allowed)


@pytest.mark.parametrize(("name", "value"), [("source", "other.txt"), ("digest", "ffff"), ("tokens", 17)])
def test_another_text_is_refused(name: str, value: object) -> None:
    report = fake_report()
    other = dataclasses.replace(report, text=dataclasses.replace(report.text, **{name: value}))
    with pytest.raises(ValueError, match=rf"text\.{name} is .* in before, .* in after"):
        compare(report, other)


def test_another_number_of_replicates_is_refused() -> None:
    report = fake_report()
    terms = report.terms["residual"]
    fewer = dataclasses.replace(terms.early, replicates=terms.early.replicates[:50])
    with pytest.raises(ValueError, match="number of replicates is 200 in before, 50 in after"):
        compare(report, _with_early(report, fewer))


def test_paths_and_reports_compare_alike(tmp_path: Path) -> None:
    arms = four_arms()
    before, after = arms["control"], arms["modified"]
    paths = [r.to_json(tmp_path / f"{i}.json") for i, r in enumerate((before, after))]
    assert compare(*paths) == compare(before, after)
    assert compare(str(paths[0]), after).to_markdown() == compare(before, after).to_markdown()


def test_four_arms_put_modified_against_control_first() -> None:
    comparison = compare_arms(four_arms())
    pairs = [(c.before, c.after) for c in comparison.contrasts]
    assert pairs == [
        ("control", "modified"),
        ("base", "untrained"),
        ("base", "control"),
        ("base", "modified"),
    ]
    assert comparison.headline is comparison.contrasts[0]


def test_other_arms_put_last_against_first_unless_told() -> None:
    arms = {"a": fake_report(), "b": fake_report(arm_seed=2), "c": fake_report(arm_seed=3)}
    assert [(c.before, c.after) for c in compare_arms(arms).contrasts] == [("a", "c"), ("a", "b")]
    told = compare_arms(arms, headline=("b", "a")).contrasts
    assert [(c.before, c.after) for c in told] == [("b", "a"), ("a", "b"), ("a", "c")]


def test_arms_that_make_no_comparison_are_refused() -> None:
    arms = {"a": fake_report(), "b": fake_report()}
    with pytest.raises(ValueError, match=r"at least two arms; found \['a'\]"):
        compare_arms({"a": arms["a"]})
    with pytest.raises(ValueError, match=r"must name two different arms of \['a', 'b'\]"):
        compare_arms(arms, headline=("a", "x"))
    with pytest.raises(ValueError, match="two different arms"):
        compare_arms(arms, headline=("a", "a"))


def test_models_of_other_depth_are_compared_as_wholes() -> None:
    comparison = compare(fake_report(), fake_report(layers=8))
    assert comparison.headline.find("residual", "early") is not None
    assert all(change.layer is None for change in comparison.headline.changes)
    assert "By layer" not in comparison.to_markdown()


def test_markdown_has_the_numbers_beside_their_names() -> None:
    comparison = compare_arms(four_arms())
    change = comparison.headline.find("residual", "early")
    assert change is not None and change.ratio is not None
    text = comparison.to_markdown()
    assert "# Leakage: control to modified" in text
    assert "- The early residual falls from 0.00890 to 0.00320 nats²: -64% [" in text
    assert "- The early total rises from 0.339 to 0.467 nats²: +38% [" in text
    difference = f"| -0.00570 | [{change.delta.low:.5f}, {change.delta.high:.5f}] |"
    assert difference in text
    assert "| attention mass on BOS | 28.0% [" in text
    assert "| | untrained | control | modified |".replace("| |", "|  |") in text
    assert "| residual, layer 3 |" in text
    assert "| modified | prose3M | truncated_rope at 1, learned_sink at 1 |" in text


def test_json_holds_every_contrast_without_replicates(tmp_path: Path) -> None:
    comparison = compare_arms(four_arms())
    data = json.loads(comparison.to_json(tmp_path / "c.json").read_text())
    assert data["kind"] == "comparison" and list(data["arms"]) == list(four_arms())
    assert data["arms"]["base"]["protocol_hash"] == PROTOCOL.hash()
    assert [c["after"] for c in data["contrasts"]] == ["modified", "untrained", "control", "modified"]
    assert "replicates" not in json.dumps(data)
    first, change = data["contrasts"][0]["changes"][0], comparison.headline.changes[0]
    assert first["delta"]["low"] == change.delta.low
    assert len(data["contrasts"][0]["changes"]) == len(comparison.headline.changes)


def test_str_is_one_short_line() -> None:
    text = str(compare_arms(four_arms()))
    expected = "Comparison(control to modified; early residual -0.00570; loss on the measured crops +0.014)"
    assert text == expected
