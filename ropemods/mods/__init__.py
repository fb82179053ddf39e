"""The modifications. This tuple is the only list of them."""

from __future__ import annotations

import dataclasses
from typing import Any

from ropemods.mods.adaptive_temperature import AdaptiveTemperature
from ropemods.mods.base import Mod
from ropemods.mods.learned_sink import LearnedSink
from ropemods.mods.replaced_bos import ReplacedBos
from ropemods.mods.truncated_rope import TruncatedRoPE
from ropemods.mods.unrotated_bos import UnrotatedBos

MODS: tuple[type[Mod], ...] = (TruncatedRoPE, AdaptiveTemperature, ReplacedBos, UnrotatedBos, LearnedSink)


def mod_from_json(record: dict[str, Any]) -> Mod:
    """The modification that `Mod.to_json` described; unknown kinds and options are errors that name the known ones."""
    kinds = {mod.kind: mod for mod in MODS}
    options = dict(record)
    kind = options.pop("kind", None)
    if kind not in kinds:
        raise ValueError(f"unknown modification {kind!r}; known are {', '.join(kinds)}")
    known = [field.name for field in dataclasses.fields(kinds[kind])]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"{kind} has no option {', '.join(unknown)}; it has {', '.join(known)}")
    return kinds[kind](**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})


__all__ = [
    "MODS",
    "AdaptiveTemperature",
    "LearnedSink",
    "Mod",
    "ReplacedBos",
    "TruncatedRoPE",
    "UnrotatedBos",
    "mod_from_json",
]
