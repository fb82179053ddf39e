"""StrengthSchedule: a fine-tune walks the modifications from strength 0, the stock model, to 1 over its first steps.

    Trainer(..., callbacks=[StrengthSchedule(steps=300, shape="cosine")])

With t = (step − delay) / steps, kept within 0 and 1, where `step` counts the optimizer steps taken so far:

    cosine   strength = (1 − cos(π t)) / 2
    linear   strength = t
    hard     strength = 1 from the step `delay` on, 0 before; `steps` is not used

The strength is a function of the global step and of nothing else, so a run that is resumed from any checkpoint goes on
where it was, and checkpoints and evaluations made at a step see the strength of that step. It is exactly 1 at the end:
a run too short for its schedule is an error before the first step. Where the Trainer ends by loading its best model
(`load_best_model_at_end`), the strength is then the one that the best checkpoint records.

It is a callback of transformers' Trainer, hence of TRL's trainers too, and works on what they wrap: PEFT, DDP, FSDP,
DeepSpeed. The strength is logged beside every loss. Reporters that the Trainer makes itself from `report_to` are called
before any callback of yours and do not see it; `ropemods.training.reporters` tells how to put them behind.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal, get_args

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ropemods.attach import set_strength
from ropemods.checkpoint import recorded_strength
from ropemods.model.wrappers import base_model, unwrapped

Shape = Literal["cosine", "linear", "hard"]


class StrengthSchedule(TrainerCallback):
    """Move the strength of all modifications, or of those of one `kind`, from 0 to 1 as training goes on."""

    def __init__(self, *, steps: int = 300, shape: Shape = "cosine", kind: str | None = None, delay: int = 0) -> None:
        for name, value, least in (("steps", steps, 1), ("delay", delay, 0)):
            if type(value) is not int or value < least:
                raise ValueError(f"StrengthSchedule: {name} must be a whole number from {least} up, not {value!r}")
        if shape not in get_args(Shape):
            raise ValueError(f"StrengthSchedule: shape must be one of {', '.join(get_args(Shape))}, not {shape!r}")
        self.steps, self.shape, self.kind, self.delay = steps, shape, kind, delay
        self._set: float | None = None

    @property
    def end(self) -> int:
        """The first step at full strength."""
        return self.delay + (0 if self.shape == "hard" else self.steps)

    def at(self, step: int) -> float:
        """The strength after `step` optimizer steps."""
        if step >= self.end:
            return 1.0
        if step <= self.delay or self.shape == "hard":
            return 0.0
        t = (step - self.delay) / self.steps
        return t if self.shape == "linear" else (1 - math.cos(math.pi * t)) / 2

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.max_steps < self.end:
            raise ValueError(
                f"StrengthSchedule reaches strength 1 after {self.end} steps (delay {self.delay}, steps {self.steps}) "
                f"and this run has {state.max_steps}, so the model would end half modified; train for longer "
                "(max_steps) or shorten the schedule (steps, delay)"
            )
        self._check_reference(args, kwargs["model"], state.global_step)
        self._set = None  # the same callback may see a second run, on another model
        self._move(state, kwargs["model"])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._move(state, kwargs["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Evaluation, logs and checkpoints come between this and the next step's beginning.
        self._move(state, kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        best = state.best_model_checkpoint
        if not args.load_best_model_at_end or best is None:
            return
        # The Trainer has put the best checkpoint's weights into the model, and they were trained at its strength.
        recorded = recorded_strength(best)
        if recorded is None:
            raise ValueError(
                f"the weights of {best} were loaded at the end, and neither a config.json nor an adapter there says at "
                "which strength they were trained; set it with ropemods.set_strength(model, schedule.at(step)), or "
                "leave load_best_model_at_end out"
            )
        for kind, strength in recorded.items():
            if self.kind in (None, kind):
                set_strength(unwrapped(kwargs["model"]), strength, kind)
        self._set = None

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        name = "strength" if self.kind is None else f"strength_{self.kind}"
        logs[name] = self.at(state.global_step)
        if state.log_history:  # the Trainer has put a copy of `logs` there
            state.log_history[-1][name] = logs[name]

    def _move(self, state: TrainerState, model: nn.Module) -> None:
        strength = self.at(state.global_step)
        if strength != self._set:
            set_strength(unwrapped(model), strength, self.kind)
            self._set = strength

    def __repr__(self) -> str:
        kind = "" if self.kind is None else f", kind={self.kind!r}"
        delay = f", delay={self.delay}" if self.delay else ""
        return f"StrengthSchedule(steps={self.steps}, shape={self.shape!r}{kind}{delay})"

    def _check_reference(self, args: TrainingArguments, model: nn.Module, step: int) -> None:
        """TRL's trainers have made their reference by now, and it is to be what training starts from."""
        if not hasattr(args, "sync_ref_model") or getattr(args, "beta", 0) == 0:
            return
        given, first = base_model(unwrapped(model)).ropemods_attached.strength, self.at(0)
        off = [kind for kind in given if self.kind in (None, kind) and given[kind] != first]
        if step == 0 and off:
            raise ValueError(
                f"the reference model was made with {off[0]} at strength {given[off[0]]:g}, and this schedule starts "
                f"training at {first:g}; make the trainer after ropemods.set_strength(model, {first:g}), or apply with "
                f"strength={first:g}"
            )
        if hasattr(model, "peft_config") and not getattr(args, "precompute_ref_log_probs", False):
            warnings.warn(
                "TRL's reference for an adapter is the model without it, so its strength moves along with the model's "
                "and it does not stay the start; pass ref_model=copy.deepcopy(model) to a trainer that takes one, set "
                "precompute_ref_log_probs=True, or start at the strength that you want and leave the schedule out",
                stacklevel=2,
            )
