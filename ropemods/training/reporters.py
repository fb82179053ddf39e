"""Reporters (tensorboard, wandb, ...) that see what callbacks add to a log.

The Trainer calls the reporters it makes from `report_to` before any other callback, so a value that a callback adds
to a log (the strength, the residual leakage) would not reach them. Add them behind the callbacks instead:

    args = TrainingArguments(..., report_to="none")
    trainer = SFTTrainer(..., args=args, callbacks=[StrengthSchedule()])
    add_reporters(trainer, ["tensorboard"])

A recipe does more: `tracked_arm.py`.
"""

from __future__ import annotations

import importlib.util

from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
    get_reporting_integration_callbacks,
)

from ropemods.settings.extras import MissingPackage
from ropemods.settings.options import did_you_mean, items

ReportTo = str | list[str] | tuple[str, ...] | None

PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",)}
"""Either does. Other reporters say themselves what they lack."""


def add_reporters(trainer: Trainer, report_to: ReportTo) -> None:
    """Let these reporters see whatever the callbacks that the trainer has now add to its logs."""
    for reporter in reporters(report_to):
        trainer.add_callback(reporter)


def reporters(report_to: ReportTo) -> list[type[TrainerCallback]]:
    """The callbacks of `report_to`; an error for one that is unknown or not installed."""
    named = items([report_to]) if isinstance(report_to, str) else list(report_to or [])
    names = get_available_reporting_integrations() if "all" in named else [each for each in named if each != "none"]
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(
                f"report_to: there is no {name!r}{did_you_mean(name, [*INTEGRATION_TO_CALLBACK, 'all', 'none'])}"
            )
        packages = PACKAGES.get(name, ())
        if packages and not any(map(importlib.util.find_spec, packages)):
            raise MissingPackage(f"report_to: {name} is not installed: pip install {packages[0]}")
    return list(get_reporting_integration_callbacks(names))
