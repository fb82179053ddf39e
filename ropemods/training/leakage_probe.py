"""LeakageProbe: the early residual on a small set, every N steps, beside the loss.

    Trainer(..., callbacks=[LeakageProbe(tokenizer, documents, Protocol(sequences=64, length=128), every=100)])

It tells whether leakage falls with the strength or only later, and costs one short measurement each time. The numbers
that a claim rests on are those measured after training, with the recipe's own protocol.

Measuring runs forward passes on every rank at the same step. They change nothing of the run: parameters, optimizer and
random numbers are left as they were.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import ropemods
from ropemods.leakage.documents import Documents
from ropemods.leakage.protocol import Protocol


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Measure inside, and training goes on as if nobody had: the model's mode and all random numbers are put back."""
    was_training = model.training
    cpu = torch.get_rng_state()
    gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
        torch.set_rng_state(cpu)
        if gpu:
            torch.cuda.set_rng_state_all(gpu)


def with_ends(name: str, value: float, low: float, high: float) -> dict[str, float]:
    """A value under its name, and the ends of its interval where they are known."""
    ends = {name: value, f"{name}_low": low, f"{name}_high": high}
    return {key: end for key, end in ends.items() if not math.isnan(end)}


class LeakageProbe(TrainerCallback):
    """Measure the early residual every `every` steps and log it."""

    def __init__(
        self,
        tokenizer: Any,
        documents: Sequence[str] | Documents,
        protocol: Protocol,
        *,
        every: int,
        bos_token_id: int | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"LeakageProbe: every={every}: at least 1 step")
        self.tokenizer, self.documents, self.protocol, self.every = tokenizer, documents, protocol, every
        self.bos_token_id = bos_token_id
        self.curve: list[tuple[int, float, float, float]] = []
        """(step, early residual, low, high)."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        self.curve = []
        if state.global_step == 0:
            self._measure(state, model)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if state.global_step % self.every == 0:
            self._measure(state, model)
            control.should_log = True  # so that it stands beside the loss of its step

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        if "loss" in logs and self.curve and self.curve[-1][0] == state.global_step:
            logs |= self.logged()
            state.log_history[-1] |= self.logged()

    def logged(self) -> dict[str, float]:
        """The last point as it stands in a log: empty before the first."""
        return with_ends("early_residual", *self.curve[-1][1:]) if self.curve else {}

    def _measure(self, state: TrainerState, model: nn.Module) -> None:
        with undisturbed(model):
            report = ropemods.measure(
                model, self.tokenizer, self.documents, self.protocol, bos_token_id=self.bos_token_id, progress=False
            )
        early = report.terms["residual"].early
        self.curve.append((state.global_step, early.value, early.low, early.high))
