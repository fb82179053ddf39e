"""The penalty in transformers' Trainer: logged beside the loss, its running mean kept with checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

FILE = "ropemods_penalty.safetensors"
"""In a Trainer's checkpoint: the running mean. A saved model has no such file."""


class RunningPenalty(Protocol):
    """A penalty as the callback sees it: a state to keep, and figures to log."""

    def state(self) -> dict[str, Tensor]: ...
    def load(self, state: dict[str, Tensor]) -> None: ...
    def said(self) -> dict[str, float]: ...


class PenaltyCallback(TrainerCallback):
    """Logs the penalty and the leakage beside the loss, and keeps the running mean in a Trainer's checkpoints."""

    def __init__(self, penalized: RunningPenalty) -> None:
        self.penalized = penalized

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        path = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / FILE
        if state.global_step and not path.is_file():
            raise FileNotFoundError(
                f"this run goes on from step {state.global_step}, and {path} is not there: it was begun without this "
                "callback, or was moved. Copy the file, or leave the callback out to begin with a new running mean"
            )
        if state.global_step:
            self.penalized.load(load_file(path))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            save_file({name: x.cpu().contiguous() for name, x in self.penalized.state().items()}, folder / FILE)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        if "loss" not in logs:
            return
        said = self.penalized.said()
        logs |= said
        if state.log_history:  # the Trainer has put a copy of `logs` there
            state.log_history[-1] |= said
