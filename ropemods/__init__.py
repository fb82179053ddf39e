"""Modify positional encoding at training time in Hugging Face causal LMs, and measure what it does."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ropemods.settings.versions import VERSION as __version__

if TYPE_CHECKING:
    from ropemods.attach import apply, remove, set_strength, summary
    from ropemods.checkpoint import export, from_pretrained
    from ropemods.leakage.measurement import measure
    from ropemods.leakage.protocol import Protocol
    from ropemods.leakage.suggestion import Suggestion, suggest
    from ropemods.mods import (
        AdaptiveTemperature,
        LearnedSink,
        Mod,
        ReplacedBos,
        TruncatedRoPE,
        UnrotatedBos,
        register,
    )
    from ropemods.penalty import Penalized, Penalty, penalize
    from ropemods.report.comparison import Comparison, compare, compare_arms
    from ropemods.report.report import Report
    from ropemods.schedule import StrengthSchedule

_HOMES = {
    "TruncatedRoPE": "mods",
    "AdaptiveTemperature": "mods",
    "ReplacedBos": "mods",
    "UnrotatedBos": "mods",
    "LearnedSink": "mods",
    "Mod": "mods",
    "register": "mods",
    "apply": "attach",
    "remove": "attach",
    "set_strength": "attach",
    "summary": "attach",
    "from_pretrained": "checkpoint",
    "export": "checkpoint",
    "StrengthSchedule": "schedule",
    "penalize": "penalty",
    "Penalty": "penalty",
    "Penalized": "penalty",
    "measure": "leakage.measurement",
    "Protocol": "leakage.protocol",
    "Report": "report.report",
    "compare": "report.comparison",
    "compare_arms": "report.comparison",
    "Comparison": "report.comparison",
    "suggest": "leakage.suggestion",
    "Suggestion": "leakage.suggestion",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    # Names are imported when they are first used, so that `import ropemods` costs next to nothing.
    if name not in _HOMES:
        raise AttributeError(f"module 'ropemods' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ropemods.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
