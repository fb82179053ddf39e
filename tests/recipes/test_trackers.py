"""What a user finds in tensorboard, wandb and trackio after a recipe, read from the files that they wrote.

Where a tracker is not installed its test is skipped: pip install tensorboard wandb trackio.
"""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ropemods.settings.extras import MissingPackage
from ropemods.training import session
from ropemods.training.__main__ import main
from ropemods.training.arms import run_arm
from ropemods.training.guard import Diverged
from ropemods.training.recipe_file import from_values
from tests.recipes import tiny

PROTOCOL = {"sequences": 32, "length": 48, "groups": 8, "early": [8, 16], "grid_rows": 16, "replicates": 100}
ARMS = ["base", "untrained", "control-0", "modified-0"]
Curve = list[tuple[int, float]]
Runs = dict[str, dict[str, Curve]]
"""(step, value) of every metric by run and name."""


def tensorboard_runs(here: Path) -> Runs:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runs: Runs = {}
    for folder in (here / "out" / "tensorboard").iterdir():
        events = EventAccumulator(str(folder)).Reload()
        runs[folder.name] = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return runs


def wandb_records(file: Path) -> Iterator[Any]:
    """What an offline run's file holds: blocks of LevelDB's log format behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last of several parts
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def wandb_runs(here: Path) -> Runs:
    runs: Runs = {}
    for file in here.glob("wandb/offline-run-*/*.wandb"):
        records = list(wandb_records(file))
        name = next(r.run.display_name for r in records if r.HasField("run"))
        rows = [
            {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for record in records
            if record.HasField("history")
        ]
        runs[_arm(name)] = _curves(rows)
    return runs


def trackio_runs(here: Path) -> Runs:
    from trackio.sqlite_storage import SQLiteStorage

    names = SQLiteStorage.get_runs("ropemods")
    return {_arm(name): _curves(SQLiteStorage.get_logs("ropemods", name)) for name in names}


def _arm(name: str) -> str:
    return name.removeprefix("out-").rpartition("-")[0]


def _curves(rows: list[dict[str, Any]]) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    for row in rows:
        for key, value in row.items():
            curves.setdefault(key, []).append((row.get("train/global_step", 0), value))
    return curves


READERS: dict[str, Callable[[Path], Runs]] = {
    "tensorboard": tensorboard_runs,
    "wandb": wandb_runs,
    "trackio": trackio_runs,
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in [n for n in sys.modules if n.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)  # it reads its folder when it is first imported
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    yield tmp_path
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()  # it keeps the folder in which it was set up


@pytest.mark.slow
@pytest.mark.parametrize("tracker", READERS)
def test_a_tracker_shows_leakage_before_while_and_after_training(
    tracker: str, model: Path, text: Path, here: Path
) -> None:
    pytest.importorskip(tracker)
    recipe = tiny.write_recipe(
        here / "recipe.yaml", model, text, here / "out", report_to=tracker, protocol=PROTOCOL, probe_steps=4,
        probe={**PROTOCOL, "mask_term": False},
    )  # fmt: skip
    main(["--config", str(recipe)])
    runs = READERS[tracker](here)
    assert sorted(runs) == sorted([*ARMS, "comparison"])
    measured = {
        name: json.loads((here / "out" / name / "report.json").read_text())["terms"] for name in ("base", "modified-0")
    }
    modified = runs["modified-0"]
    for quantity in ("residual", "mask", "total"):
        for end, key in (("", "value"), ("_low", "low"), ("_high", "high")):
            curve = modified[f"eval/early_{quantity}{end}"]
            before, after = (measured[name][quantity]["early"][key] for name in ("base", "modified-0"))
            assert [step for step, _ in curve] == [0, 8]
            assert [value for _, value in curve] == pytest.approx([before, after], rel=1e-6)
    assert len(modified["eval/held_out_loss"]) == len(modified["eval/crops_loss"]) == 2
    assert [step for step, _ in modified["train/early_residual"]] == [0, 4, 8]
    assert {"train/early_residual_low", "train/early_residual_high"} <= set(modified)
    assert {step for step, _ in modified["train/strength"]} == {step for step, _ in modified["train/loss"]}
    assert modified["train/strength"][-1] == (8, 1.0) and "train/strength" not in runs["control-0"]
    for name in ("base", "untrained"):
        assert [step for step, _ in runs[name]["eval/early_residual"]] == [0]
    for name, curves in runs.items():
        for key, curve in curves.items():
            steps = [step for step, _ in curve]
            assert steps == sorted(steps), (name, key)
    assert tracker != "tensorboard" or _texts_and_images(here) == (1 + 1, len(ARMS))
    assert tracker == "tensorboard" or {"arms", "comparison"} <= {key.partition("/")[0] for key in runs["comparison"]}
    if tracker == "wandb":
        (page,) = here.glob("wandb/offline-run-*/files/media/html/*.html")
        assert "early residual" in page.read_text().lower()
        import wandb

        assert wandb.run is None


def _texts_and_images(here: Path) -> tuple[int, int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tags = EventAccumulator(str(here / "out" / "tensorboard" / "comparison")).Reload().Tags()
    return sum(tag.endswith("/text_summary") and "custom" not in tag for tag in tags["tensors"]), len(tags["images"])


@pytest.mark.slow
def test_a_run_that_diverges_is_closed_in_wandb_as_failed(model: Path, text: Path, here: Path) -> None:
    wandb = pytest.importorskip("wandb")
    this = session.begin(
        tiny.recipe(
            model, text, here / "out", arms=["control"], learning_rate=30.0, guard_patience=2, max_steps=20,
            report_to=["wandb"],
        ),
        command="test",
    )  # fmt: skip
    with pytest.raises(Diverged):
        run_arm(this, *next(this.plan()))
    assert wandb.run is None
    wandb.teardown()  # the file is whole now
    (file,) = here.glob("wandb/offline-run-*/*.wandb")
    assert [r.exit.exit_code for r in wandb_records(file) if r.HasField("exit")] == [1]


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_the_tracker_run_that_it_began(model: Path, text: Path, here: Path) -> None:
    pytest.importorskip("trackio")
    recipe = tiny.write_recipe(
        here / "recipe.yaml", model, text, here / "out", arms=["control"], report_to="trackio", save_strategy="steps",
        save_steps=4,
    )  # fmt: skip
    main(["--config", str(recipe)])
    arm = here / "out" / "control-0"
    (arm / "result.json").unlink()
    os.rename(arm / "checkpoint-8", arm / "kept")
    main(["--config", str(recipe), "--resume_from_checkpoint"])
    assert list(trackio_runs(here)).count("control-0") == 1
    assert [step for step, _ in trackio_runs(here)["control-0"]["train/loss"]] == [*range(1, 9), *range(5, 9)]


def test_a_tracker_that_is_unknown_or_not_installed_is_refused_before_anything_is_done(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"test: report_to: there is no 'tensorbord' \(did you mean 'tensorboard'\?\)"):
        from_values(tiny.values(model, text, tmp_path, report_to="tensorbord"), source="test")
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else find(name, *a))
    with pytest.raises(MissingPackage, match="test: report_to: wandb is not installed: pip install wandb"):
        from_values(tiny.values(model, text, tmp_path, report_to=["wandb"]), source="test")
    assert from_values(tiny.values(model, text, tmp_path, report_to="none"), source="test")
