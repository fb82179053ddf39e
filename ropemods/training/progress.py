"""What a run prints while it trains, on the first rank only: a line a log, and a bar where someone watches."""

from __future__ import annotations

import sys
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

SHOWN = {
    "loss": ("loss", "{:.4f}"),
    "strength": ("strength", "{:.3f}"),
    "penalty": ("of which penalty", "{:.4f}"),
    "leakage": ("leakage of the batch", "{:.4f}"),
    "early_residual": ("early residual", "{:.5f}"),
    "eval_loss": ("held-out loss", "{:.4f}"),
    "grad_norm": ("gradient norm", "{:.2f}"),
    "learning_rate": ("lr", "{:.2e}"),
}


class Progress(ProgressCallback):
    """transformers' own bar, with readable lines in place of dictionaries."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not args.disable_tqdm:
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is not None:
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs or not ("loss" in logs or "eval_loss" in logs):
            return
        shown = [f"{name} {form.format(logs[key])}" for key, (name, form) in SHOWN.items() if key in logs]
        line = f"  step {state.global_step}/{state.max_steps} · {' · '.join(shown)}"
        if self.training_bar is not None:
            self.training_bar.write(line)
        else:
            print(line, flush=True)


def watched() -> bool:
    """Whether a person is likely to see a progress bar."""
    return sys.stderr.isatty()
