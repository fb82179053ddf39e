"""Modify positional encoding at training time in Hugging Face causal LMs, and measure what it does."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ropemods.settings.versions import VERSION

__version__ = VERSION

if TYPE_CHECKING:  # each under its own name, which is how a type checker is told that it is there for users
    from ropemods.attach import apply as apply
    from ropemods.attach import remove as remove
    from ropemods.attach import set_strength as set_strength
    from ropemods.attach import summary as summary
    from ropemods.checkpoint import export as export
    from ropemods.checkpoint import from_pretrained as from_pretrained
    from ropemods.leakage.measurement import measure as measure
    from ropemods.leakage.protocol import Protocol as Protocol
    from ropemods.leakage.suggestion import suggest as suggest
    from ropemods.mods import *  # noqa: F403
    from ropemods.penalty import Penalized as Penalized
    from ropemods.penalty import Penalty as Penalty
    from ropemods.penalty import penalize as penalize
    from ropemods.report.comparison import Comparison as Comparison
    from ropemods.report.comparison import compare as compare
    from ropemods.report.comparison import compare_arms as compare_arms
    from ropemods.report.proposals import Suggestion as Suggestion
    from ropemods.report.report import Report as Report
    from ropemods.schedule import StrengthSchedule as StrengthSchedule

# Where names are that are not among the modifications, which list themselves (`ropemods.mods`).
_HOMES = {
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
    "Suggestion": "report.proposals",
}


if not TYPE_CHECKING:  # a type checker would take any name for one of these

    def __getattr__(name: str) -> Any:
        # Names are imported when they are first used, so that `import ropemods` costs next to nothing.
        if name in _HOMES:
            return getattr(importlib.import_module(f"ropemods.{_HOMES[name]}"), name)
        if name[:1].isupper():  # not a module's name, for which nothing should be imported to answer
            mods = importlib.import_module("ropemods.mods")
            if name in mods.__all__:
                return getattr(mods, name)
        if name == "__all__":
            return __dir__()
        raise AttributeError(f"module 'ropemods' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*importlib.import_module("ropemods.mods").__all__, *_HOMES})
