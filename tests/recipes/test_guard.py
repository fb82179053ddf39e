"""The loss guard: what it lets pass, what it stops, and what it says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerControl, TrainerState, TrainingArguments

from ropemods.training.guard import LossGuard
from tests.test_schedule import model, trainer


def feed(guard: LossGuard, losses: list[float], folder: str = "out", **logs: float) -> int | None:
    """The step at which the guard stopped a run with these losses."""
    args, state = TrainingArguments(folder, use_cpu=True), TrainerState()
    guard.on_train_begin(args, state, TrainerControl())
    for step, loss in enumerate(losses, 1):
        state.global_step = step
        control = TrainerControl(should_save=True)
        guard.on_log(args, state, control, {"loss": loss, **logs})
        if control.should_training_stop:
            assert not control.should_save  # these weights must not replace the good checkpoint
            return step
    return None


@given(st.lists(st.floats(0.01, 2.99), max_size=50))
def test_a_loss_below_the_limit_never_stops_a_run(losses: list[float]) -> None:
    assert feed(LossGuard(factor=3, patience=1), [1.0, *losses]) is None


@given(st.integers(1, 30), st.integers(0, 20))
def test_it_stops_after_exactly_the_steps_of_patience(patience: int, good: int) -> None:
    guard = LossGuard(factor=3, patience=patience)
    assert feed(guard, [1.0] * (1 + good) + [3.0] * (patience + 5)) == 1 + good + patience


def test_a_loss_that_comes_back_in_time_starts_the_count_anew() -> None:
    assert feed(LossGuard(factor=3, patience=3), [1, 4, 4, 1, 4, 4, 1]) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_a_number_stops_at_once(bad: float) -> None:
    guard = LossGuard()
    assert feed(guard, [1.0, bad, 1.0]) == 2
    assert guard.verdict is not None and f"became {bad} at step 2" in guard.verdict
    assert feed(guard, [1.0], grad_norm=bad) == 1
    assert guard.verdict is not None and "gradient norm" in guard.verdict


def test_the_message_says_what_is_kept_and_what_to_try(tmp_path: Path) -> None:
    guard = LossGuard(patience=1)
    feed(guard, [1.0, 9.0], str(tmp_path))
    assert guard.verdict is not None
    for words in ("3 times its start (1.000)", "No checkpoint had been saved yet", "learning_rate", "schedule"):
        assert words in guard.verdict
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "complete.json").write_text("{}")
    feed(guard, [1.0, 9.0], str(tmp_path))
    assert f"{tmp_path / 'checkpoint-5'} from before is kept" in guard.verdict


@pytest.mark.parametrize("wrong", [{"factor": 1.0}, {"patience": 0}])
def test_a_guard_that_stops_everything_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LossGuard(**wrong)


def test_a_real_run_with_a_broken_weight_stops_and_keeps_its_checkpoint(tmp_path: Path) -> None:
    made = model()
    guard = LossGuard()
    run = trainer(tmp_path, made, guard, max_steps=20, save_strategy="steps", save_steps=2)

    def break_it(module: torch.nn.Module, inputs: Any) -> None:
        if run.state.global_step == 4 and module.training:
            next(module.parameters()).data.fill_(math.nan)

    made.register_forward_pre_hook(break_it)
    run.train()
    assert guard.verdict is not None and "nan at step 5" in guard.verdict
    assert run.state.global_step == 5
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


def test_a_resumed_run_measures_against_its_first_start(tmp_path: Path) -> None:
    first, second = LossGuard(), LossGuard()
    trainer(tmp_path, model(), first, save_strategy="steps", save_steps=3).train()
    trainer(tmp_path, model(), second).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert second.curve == first.curve and len(second.curve) == 6


def test_the_recovery_shows_the_first_the_highest_and_the_last() -> None:
    guard = LossGuard()
    feed(guard, [2.0] * 10 + [5.5] + [2.0] * 40 + [1.25])
    said = guard.recovery()
    assert said.startswith("step 1: 2.000") and "step 11: 5.500" in said and said.endswith("step 52: 1.250")
