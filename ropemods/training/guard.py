"""LossGuard: a run whose loss diverges stops, keeps its last good checkpoint, and says what to try.

    Trainer(..., callbacks=[LossGuard(factor=3.0, patience=20)])

The first logged loss is the start. The run stops at once when a loss or a gradient norm is not a number, and when the
loss has stayed at `factor` × start or above for `patience` steps. It does not save the weights of that moment, so the
last checkpoint is from before. `verdict` then holds the message; a training script should end with an error of its own.

The losses it has seen are the recovery curve: how far the loss rose while the strength did, and whether it came back.

The Trainer leaves losses that are not numbers out of its log by default. The guard has to see them, so it switches that
off (`logging_nan_inf_filter`) when training begins.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

ADVICE = (
    "Try a lower learning_rate (at 1e-3 a change of positions needs QK-norm, at 3e-4 it does not), a longer schedule "
    "(schedule: {steps: ...}), a tighter max_grad_norm, or fewer modifications at once; in fp16, try bf16."
)


class Diverged(RuntimeError):
    """The loss of a run left for good; the message says where, what was kept and what to try."""


class LossGuard(TrainerCallback):
    """Watch the logged loss."""

    def __init__(self, *, factor: float = 3.0, patience: int = 20) -> None:
        if factor <= 1:
            raise ValueError(f"LossGuard: factor={factor}: above 1, or every run would be stopped")
        if patience < 1:
            raise ValueError(f"LossGuard: patience={patience}: at least 1 step")
        self.factor, self.patience = factor, patience
        self.curve: list[tuple[int, float]] = []
        """(step, loss) of every log, oldest first."""
        self.verdict: str | None = None

    @property
    def start(self) -> float | None:
        return self.curve[0][1] if self.curve else None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        args.logging_nan_inf_filter = False
        # A resumed run goes on with the curve that its checkpoint remembers, start and all.
        self.curve = [
            (entry["step"], entry["loss"])
            for entry in state.log_history
            if "loss" in entry and entry["step"] <= state.global_step
        ]
        self.verdict = None

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        if "loss" not in logs:
            return
        self.curve.append((state.global_step, logs["loss"]))
        problem = self._problem(logs)
        if problem is not None:
            self.verdict = f"{problem} {_kept(args)} {ADVICE}"
            control.should_training_stop = True
            control.should_save = False

    def _problem(self, logs: dict[str, float]) -> str | None:
        step, loss = self.curve[-1]
        norm = logs.get("grad_norm", 0.0)
        if not math.isfinite(loss) or not math.isfinite(norm):
            what = "loss" if not math.isfinite(loss) else "gradient norm"
            return f"The {what} became {loss if what == 'loss' else norm} at step {step}."
        limit = self.factor * self.curve[0][1]
        below = [at for at, value in self.curve if value < limit]
        since = max(below)  # the start itself is below the limit
        if step - since < self.patience:
            return None
        return (
            f"The loss has been at {self.factor:g} times its start ({self.curve[0][1]:.3f}) or above since step "
            f"{since}; at step {step} it is {loss:.3f}."
        )

    def recovery(self, points: int = 9) -> str:
        """The curve in a line: the first loss, the highest, the last, and some in between."""
        if not self.curve:
            return "no loss was logged"
        last = len(self.curve) - 1
        chosen = {round(n * last / (points - 1)) for n in range(points)}
        chosen.add(max(range(len(self.curve)), key=lambda n: self.curve[n][1]))
        return " · ".join(f"step {self.curve[n][0]}: {self.curve[n][1]:.3f}" for n in sorted(chosen))


def _kept(args: TrainingArguments) -> str:
    from ropemods.training.checkpoints import last_complete

    checkpoint = last_complete(Path(args.output_dir)) if args.output_dir is not None else None
    if checkpoint is None:
        return "No checkpoint had been saved yet (save_steps)."
    return f"The checkpoint {checkpoint} from before is kept."
