"""Reporters (tensorboard, wandb, ...) that see what callbacks add to a log.

The Trainer calls the reporters it makes from `report_to` before any other callback, so a value that a callback adds
to a log (the strength, the residual leakage) would not reach them. Add them behind the callbacks instead:

    args = TrainingArguments(..., report_to="none")
    trainer = SFTTrainer(..., args=args, callbacks=[StrengthSchedule()])
    add_reporters(trainer, ["tensorboard"])
"""

from __future__ import annotations

from transformers import Trainer
from transformers.integrations import get_reporting_integration_callbacks


def add_reporters(trainer: Trainer, report_to: str | list[str] | None) -> None:
    """Let these reporters see whatever the callbacks that the trainer has now add to its logs."""
    names = [report_to] if isinstance(report_to, str) else list(report_to or [])
    for reporter in get_reporting_integration_callbacks([name for name in names if name != "none"]):
        trainer.add_callback(reporter)
