"""Reports survive the way to a file and back, refuse what is damaged, and say the right numbers."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropemods.report.records import Estimate, Intervention
from ropemods.report.report import Report
from ropemods.settings.json_records import RecordError, decode, encode
from tests.leakage.fake_reports import fake_report, four_arms


def _edited(report: Report, path: Path, **changes: Any) -> Path:
    """The report's file with top-level keys replaced; None removes a key."""
    data = json.loads(report.to_json(path).read_text())
    for key, value in changes.items():
        if value is None:
            del data[key]
        else:
            data[key] = value
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize("arm", ["base", "untrained", "control", "modified"])
def test_json_round_trip_is_exact(arm: str, tmp_path: Path) -> None:
    report = four_arms()[arm]
    assert Report.from_json(report.to_json(tmp_path / "r.json")) == report


def test_round_trip_without_optional_sections(tmp_path: Path) -> None:
    report = fake_report(optional=False)
    again = Report.from_json(report.to_json(tmp_path / "r.json"))
    assert again == report
    assert again.sink is None and again.interventions == ()


def test_undefined_values_come_back_undefined(tmp_path: Path) -> None:
    nan = math.nan
    report = dataclasses.replace(fake_report(), closure_gap=Estimate(nan, nan, nan, (nan, 1.0)))
    text = report.to_json(tmp_path / "r.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    gap = Report.from_json(tmp_path / "r.json").closure_gap
    assert gap is not None
    assert math.isnan(gap.value) and math.isnan(gap.replicates[0]) and gap.replicates[1] == 1.0


def test_a_band_that_does_not_rotate_keeps_its_infinite_wavelength(tmp_path: Path) -> None:
    report = fake_report(dropped_bands=4)
    again = Report.from_json(report.to_json(tmp_path / "r.json"))
    assert again.usage is not None
    assert [math.isinf(w) for w in again.usage.wavelengths[0]] == [False] * 12 + [True] * 4


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=3, max_size=8))
def test_every_finite_number_survives(numbers: list[float]) -> None:
    low, value, high = sorted(numbers[:3])
    estimate = Estimate(value, low, high, tuple(numbers))
    assert decode(Estimate, json.loads(json.dumps(encode(estimate))), "x") == estimate


def test_an_interval_that_runs_backwards_is_refused() -> None:
    with pytest.raises(ValueError, match=r"found 2\.0 to 1\.0"):
        Estimate(1.5, 2.0, 1.0)


def test_root_of_a_negative_estimate_is_zero() -> None:
    assert Estimate(-0.1, -0.2, 0.0).root == 0
    assert Estimate(0.09, 0.0, 0.1).root == pytest.approx(0.3)
    assert math.isnan(Estimate(math.nan, math.nan, math.nan).root)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_file(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fake_report(loss=3.0).to_json(tmp_path / "r.json")
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        fake_report(loss=4.0).to_json(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["r.json"]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing does not exist"):
        fake_report().to_json(tmp_path / "missing" / "r.json")


def test_another_schema_names_its_writer(tmp_path: Path) -> None:
    path = _edited(fake_report(), tmp_path / "r.json", schema=2, versions={"ropemods": "0.9.1"})
    with pytest.raises(RecordError, match=r"schema 2, written by ropemods 0\.9\.1.*schema 1") as e:
        Report.from_json(path)
    assert "Measure again" in str(e.value)


def test_half_a_file_is_called_not_json(tmp_path: Path) -> None:
    path = fake_report().to_json(tmp_path / "r.json")
    path.write_text(path.read_text()[:5000])
    with pytest.raises(RecordError, match=r"r\.json is not JSON .*cut short"):
        Report.from_json(path)


@pytest.mark.parametrize("text", ["[1, 2]", '{"model": 1}', "3"])
def test_other_json_is_called_no_report(text: str, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(RecordError, match="is not a ropemods report"):
        Report.from_json(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": "zero"}, r"report\.seed: expected an integer, found \"zero\""),
        ({"seed": True}, r"report\.seed: expected an integer, found true"),
        ({"model": None}, "the key 'model' is missing"),
        ({"colour": "blue"}, r"unknown keys \['colour'\]"),
        ({"terms": {"residual": 3}}, r"report\.terms\.residual: expected an object, found 3"),
        ({"share": {"value": 0.1, "low": "x", "high": 1}}, r"report\.share\.low: expected a number"),
        ({"share": {"value": 0, "low": 1, "high": 0}}, r"report\.share: an interval runs"),
        ({"notes": "one"}, r"report\.notes: expected a list"),
        ({"terms": {"rest": {}}}, r"report\.terms\.rest"),
        ({"protocol": {"length": 512}}, r"protocol has no \['early', 'confidence'\]"),
    ],
)
def test_a_damaged_file_names_the_place(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = _edited(fake_report(), tmp_path / "r.json", **changes)
    with pytest.raises(RecordError, match=message):
        Report.from_json(path)


def test_layers_that_do_not_match_the_model_are_refused() -> None:
    report = fake_report()
    wrong = dataclasses.replace(report.model, layers=7)
    with pytest.raises(ValueError, match=r"terms\.residual\.layers: expected 7 layers, found 6"):
        dataclasses.replace(report, model=wrong)
    wrong = dataclasses.replace(report.model, heads=5)
    with pytest.raises(ValueError, match=r"heads\.all: expected 5 values per layer, found 6"):
        dataclasses.replace(report, model=wrong)


def test_tensors_are_refused_with_the_remedy() -> None:
    with pytest.raises(TypeError, match=r"found object.*\.tolist"):
        encode({"x": object()})


def test_markdown_has_the_numbers_beside_their_names() -> None:
    report = fake_report(residual=0.0089, mask=0.31, loss=3.99)
    early = report.terms["residual"].early
    text = report.to_markdown()
    cells = [f"{x:.5f}" for x in (early.value, early.low, early.high)]
    row = f"| residual, early queries | {cells[0]} | [{cells[1]}, {cells[2]}] | 0.0943 |"
    assert row in text
    layer = report.terms["residual"].layers[3]
    assert f"| 3 | {layer.early.value:.4f} |" in text
    assert "| loss on the measured crops, nats per token | 3.990 |" in text
    assert f"| perplexity on the measured crops | {math.exp(3.99):.1f} |" in text
    assert "| zero embedding | 0.00249 | -72% |" in text
    assert "| positions shifted by 5000 | 0 | 0.00170 | [0.00110, 0.00230] | FAIL |" in text
    assert f"Protocol `{report.protocol_hash}`: sequences 1024, length 512" in text
    assert report.command in text


def test_markdown_leaves_out_what_was_not_measured() -> None:
    text = fake_report(optional=False).to_markdown()
    for absent in ("Interventions", "Controls", "Notes", "BOS", "closure gap"):
        assert absent not in text
    assert "## By layer" in text


def test_markdown_says_when_a_value_cannot_be_told_from_zero() -> None:
    report = fake_report(residual=0.00001)
    assert report.terms["residual"].early.low < 0
    assert "it cannot be told from 0." in report.to_markdown()


def test_a_measurement_without_terms_or_loss_still_has_words() -> None:
    report = dataclasses.replace(fake_report(optional=False), terms={}, held_out_loss=None)
    assert "early residual not measured" in str(report)
    assert "# Leakage of prose3M" in report.to_markdown()


def test_a_pipe_in_a_name_does_not_break_a_table() -> None:
    swap = Intervention(name="a|b\nc", kind="swap", early_residual=Estimate(0, 0, 0), change=Estimate(0, 0, 0))
    text = dataclasses.replace(fake_report(), interventions=(swap,)).to_markdown()
    assert "| a\\|b c |" in text


def test_str_is_one_short_line() -> None:
    text = str(fake_report())
    assert "\n" not in text and len(text) < 130
    assert "prose3M" in text and "0.00890 nats²" in text
    assert repr(fake_report()) == text
