"""Where a file says what was fastest, that runs; a file that cannot be used says how to make one that can."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ropemods.attention import capabilities, measured_paths, paths
from ropemods.attention.rows import Rows
from ropemods.attention.terms import Slot
from tests.cli.program import refused, run

KEY = "float32/16/forward/Slot"


def rows(training: bool = False, length: int = 20) -> Rows:
    q = torch.randn(1, 2, length, 16, requires_grad=training)
    return Rows(q, q, q, mask=None, causal=True, scale=0.25, slots=(Slot(torch.zeros(2)),))


def written(tmp_path: Path, choices: dict) -> Path:
    file = tmp_path / "choices.json"
    file.write_text(json.dumps({"choices": choices}))
    return file


def test_the_measured_path_runs_where_it_was_measured_and_nowhere_else(tmp_path: Path, monkeypatch) -> None:
    file = written(tmp_path, {"cpu": {KEY: "triton"}, "9.0": {KEY: "triton-rows"}})
    monkeypatch.setenv(paths.VARIABLE, str(file))
    assert measured_paths.best(rows()) == "triton"
    assert measured_paths.best(rows(training=True)) == paths.DEFAULT, "forward was measured, training was not"
    assert measured_paths.best(rows(length=1)) == paths.DEFAULT, "nor was decoding"
    monkeypatch.setattr(capabilities, "limit", lambda path, rows, device: object())
    assert measured_paths.best(rows()) == paths.DEFAULT, "what the path cannot take runs on the default"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cuda = torch.device("cuda")
    assert measured_paths.choice(cuda, KEY) == "triton-rows" and paths.chosen(cuda) == paths.MEASURED
    assert measured_paths.for_rows(rows()) == paths.DEFAULT, "a CPU has no choice"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=r"has choices for cpu, 9\.0, and this device is 8\.0.*--choices"):
        measured_paths.choice(cuda, KEY)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "cannot be read"), ("{", "holds no choices"), ('{"choices": {"9.0": {"a": "fast"}}}', "names fast")],
)
def test_a_file_that_cannot_be_used_names_the_command_that_writes_one(text, message, tmp_path: Path) -> None:
    file = tmp_path / "choices.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=f"{message}.*ropemods bench --device cuda"):
        measured_paths.read(file)


def test_the_fastest_is_that_of_the_mean_over_lengths_among_several_paths() -> None:
    ratios = [("a", "flash", 2.0), ("a", "triton", 1.0), ("a", "flash", 2.0), ("a", "triton", 3.0)]
    assert measured_paths.fastest(ratios) == {"a": "triton"}
    assert measured_paths.fastest([*ratios, ("a", "triton", 9.0)]) == {"a": "flash"}
    assert measured_paths.fastest([("a", "flash", 2.0), ("a", "eager", 1.0)]) == {}, "eager is no choice"


def test_bench_writes_what_is_read_beside_what_is_there(tmp_path: Path, capsys) -> None:
    run(f"bench --lengths 16 --heads 2 --head_dims 16 --group_ratios 1 --pairs 1 --kinds forward --output {tmp_path}")
    bench, file = tmp_path / "bench.json", tmp_path / "choices.json"
    again = f"bench --redraw {bench} --device cpu --choices {file}"
    assert "a choice is between paths" in refused(again, capsys)
    found = json.loads(bench.read_text())
    for row in list(found["rows"]):
        faster = {"median": row["ratio"]["median"] / 2}
        found["rows"].append(row | {"path": "triton", "ratio": row["ratio"] | faster})
    bench.write_text(json.dumps(found))
    written(tmp_path, {"9.0": {KEY: "flash"}})
    run(again)
    choices = measured_paths.read(file)
    assert choices["9.0"] == {KEY: "flash"} and choices["cpu"][KEY] == "triton"
