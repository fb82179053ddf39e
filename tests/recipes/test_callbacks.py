"""What callbacks add to a log reaches reporters and people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ropemods.schedule import StrengthSchedule
from ropemods.training import reporters
from ropemods.training.progress import Progress
from tests.test_schedule import model, trainer


class Recorder(TrainerCallback):
    """A reporter that remembers."""

    logs: list[dict[str, float]] = []

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        Recorder.logs.append(dict(logs))


def test_reporters_behind_the_callbacks_see_the_strength(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(
        reporters, "get_reporting_integration_callbacks", lambda names: asked.append(names) or [Recorder] * len(names)
    )
    monkeypatch.setattr(reporters, "PACKAGES", {})  # it need not be installed here
    Recorder.logs = []
    run = trainer(tmp_path, model(), StrengthSchedule(steps=2, shape="linear"))
    reporters.add_reporters(run, "none")
    reporters.add_reporters(run, None)
    reporters.add_reporters(run, ["tensorboard"])
    run.train()
    assert asked == [[], [], ["tensorboard"]]
    assert [log["strength"] for log in Recorder.logs if "loss" in log] == [0.5, 1, 1, 1, 1, 1]


def test_a_run_prints_a_line_a_log_on_the_first_rank_only(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = trainer(tmp_path, model(), StrengthSchedule(steps=2), Progress(), max_steps=2)
    run.remove_callback(PrinterCallback)
    run.train()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("  step 1/2 \u00b7 loss ") and "strength 0.500" in lines[0] and "lr 5.00e-05" in lines[0]
    state = TrainerState(is_world_process_zero=False)
    Progress().on_log(run.args, state, TrainerControl(), {"loss": 1.0})
    assert capsys.readouterr().out == ""
