"""One decoder reads records of every kind: what is damaged or edited is named with the file and the place in it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from ropemods.bench.grid import from_json
from ropemods.settings.annotations import Unfit, fitted
from ropemods.settings.json_records import RecordError, decode
from ropemods.training.arms import ArmResult, read_result
from tests.cli.program import refused

RESULT = ArmResult(
    arm="modified",
    seed=0,
    identity={"a": [1]},
    loss=float("nan"),
    perplexity=float("inf"),
    held_out_tokens=3,
    report=None,
    model="here",
    curve=((1, 2.5), (2, 2.0)),
    probes=((4, 0.1, 0.0, 0.2),),
)


def written(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps(asdict(RESULT) | changes))
    return path


def test_a_result_comes_back_as_it_was(tmp_path: Path) -> None:
    assert str(read_result(written(tmp_path / "result.json"))) == str(RESULT)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": "8"}, r"result.json.steps: expected an integer, found \"8\""),
        ({"curve": [[1, 2.0], [2]]}, r"result.json.curve\[1\]: expected a list of 2, found \[2\]"),
        ({"probes": [[4, 0.1, True, 0.2]]}, r"result.json.probes\[0\]\[2\]: expected a number or null, found true"),
        ({"stepps": 8}, r"unknown keys \['stepps'\]"),
    ],
)
def test_a_result_that_was_edited_says_where(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecordError, match=said):
        read_result(written(tmp_path / "result.json", **changes))


def test_a_file_that_was_cut_short_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = written(tmp_path / "result.json")
    path.write_text(path.read_text()[:-20])
    with pytest.raises(RecordError, match=r"result.json is not JSON \(line 1: .*Delete it to run its arm again"):
        read_result(path)
    assert "is not JSON" in refused(f"bench --redraw {path}", capsys)


def test_the_rows_of_a_bench_are_checked(tmp_path: Path) -> None:
    committed = json.loads((Path(__file__).parents[2] / "evals" / "results" / "bench_cpu.json").read_text())
    assert from_json(committed, "bench.json")
    committed["rows"][0]["shape"]["heads"] = "8"
    with pytest.raises(RecordError, match=r"bench.json: rows\[0\].shape.heads: expected an integer"):
        from_json(committed, "bench.json")
    with pytest.raises(ValueError, match="has no rows"):
        from_json([], "other.json")


@pytest.mark.parametrize(
    ("hint", "value", "stored"),
    [
        (float, 1, 1.0),
        (int | None, None, None),
        (tuple[float, ...], [1, 2.5], (1.0, 2.5)),
        (tuple[tuple[int, float], ...], [[1, 2]], ((1, 2.0),)),
        (str | tuple[str, ...], ["a"], ("a",)),
    ],
)
def test_plain_values_take_their_stored_form(hint: Any, value: Any, stored: Any) -> None:
    found = fitted(hint, value)
    assert found == stored and str(found) == str(stored)


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (int, True),
        (float, "1"),
        (int, 1.0),
        (bool, 1),
        (tuple[int, int], [1]),
        (tuple[int, ...], "12"),
        (float, 10**400),
    ],
)
def test_what_is_another_type_is_none(hint: Any, value: Any) -> None:
    with pytest.raises(Unfit):
        fitted(hint, value)


def test_a_number_that_json_cannot_hold_is_nan() -> None:
    assert str(decode(tuple[float, ...], [None, 1], "x")) == "(nan, 1.0)"
