"""The modifications. This tuple is the list of ours; `register` adds those of others."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, TypeVar

from torch import nn

from ropemods.mods import outside
from ropemods.mods.adaptive_temperature import AdaptiveTemperature
from ropemods.mods.anchored_bos import AnchoredBos
from ropemods.mods.base import Mod
from ropemods.mods.dropped_rope import DroppedRoPE
from ropemods.mods.keyed_sink import KeyedSink
from ropemods.mods.learned_sink import LearnedSink
from ropemods.mods.log_temperature import LogTemperature
from ropemods.mods.output_gate import OutputGate
from ropemods.mods.replaced_bos import ReplacedBos
from ropemods.mods.scale_invariant import ScaleInvariant
from ropemods.mods.truncated_rope import TruncatedRoPE
from ropemods.mods.unrotated_bos import UnrotatedBos

MODS: tuple[type[Mod], ...] = (
    TruncatedRoPE,
    DroppedRoPE,
    AdaptiveTemperature,
    LogTemperature,
    ScaleInvariant,
    ReplacedBos,
    UnrotatedBos,
    AnchoredBos,
    LearnedSink,
    KeyedSink,
    OutputGate,
)

_registered: dict[str, type[Mod]] = {}
AnyMod = TypeVar("AnyMod", bound=type[Mod])


def kinds() -> dict[str, type[Mod]]:
    """Every modification that is known by its kind: ours, and what has been registered."""
    return {mod.kind: mod for mod in MODS} | _registered


def of_kind(kind: object) -> type[Mod] | None:
    """The modification of that kind, known or offered by an installed package; None where there is none."""
    if not isinstance(kind, str):
        return None
    if kind not in kinds() and (point := outside.installed().get(kind)) is not None:
        where = f"the entry point {kind} = {point.value} in {outside.GROUP}"
        mod = registered_at(point.value, where)
        if mod.kind != kind:
            raise ValueError(f"{where} names a modification of the kind {mod.kind!r}; the two must be the same")
    return kinds().get(kind)


def registered_at(place: str, source: str | None = None) -> type[Mod]:
    """The class at `module:Class`, imported and registered. `source` is who says so, for an error."""
    try:
        return register(outside.at(place))
    except TypeError as error:
        raise ValueError(f"{source or place}: {error}") from None


def register(mod: AnyMod) -> AnyMod:
    """Make a modification of your own known by its `kind`, so that checkpoints that record it can be read.

        @rm.register
        @dataclasses.dataclass(frozen=True)
        class Damped(rm.Mod):
            kind: ClassVar[str] = "damped"
            by: float = 0.5
            ...

    `ropemods.mods.base` says what it may implement. Registering the same class again (a notebook cell run twice) puts
    the new one in its place; a kind that another class has is an error.
    """
    if not (isinstance(mod, type) and issubclass(mod, Mod)):
        raise TypeError(f"register takes a class derived from ropemods.Mod, not {mod!r}")
    name, kind = mod.__qualname__, getattr(mod, "kind", None)
    if not dataclasses.is_dataclass(mod) or "__dataclass_fields__" not in vars(mod) or not _frozen(mod):
        raise TypeError(f"{name} must be a frozen dataclass; put @dataclasses.dataclass(frozen=True) on it")
    if not isinstance(kind, str) or not kind.isidentifier() or hasattr(nn.Module, kind):
        raise ValueError(f"{name}.kind must be a name such as 'learned_sink', for records and parameters; not {kind!r}")
    other = kinds().get(kind)
    if other is not None and (other.__module__, other.__qualname__) != (mod.__module__, name):
        raise ValueError(f"the kind {kind!r} is {other.__module__}.{other.__qualname__}'s; give {name} another")
    if mod not in MODS:
        _registered[kind] = mod
    return mod


def _frozen(mod: type[Mod]) -> bool:
    return mod.__dataclass_params__.frozen  # type: ignore[attr-defined]


def mod_from_json(record: dict[str, Any]) -> Mod:
    """The modification that `Mod.to_json` described; unknown kinds and options are errors that name the known ones."""
    if not isinstance(record, dict):
        raise ValueError(f"a modification is recorded as its kind and options, {{'kind': …}}, not {record!r}")
    options = dict(record)
    kind, place = options.pop("kind", None), options.pop("class", None)
    mod = of_kind(kind)
    if mod is None:
        raise ValueError(f"unknown modification {kind!r}; known are {', '.join(kinds())}. {_how_to_know(place)}")
    known = [field.name for field in dataclasses.fields(mod)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"{kind} has no option {', '.join(unknown)}; it has {', '.join(known)}")
    return mod(**options)


def _how_to_know(place: object) -> str:
    """What makes a modification known that a record names, where the record says the place of its class."""
    if not isinstance(place, str) or not outside.PLACE.fullmatch(place) or place.startswith("__main__:"):
        was = f"This one was {place}. " if isinstance(place, str) else ""
        return f"{was}One of your own is known once its class is: import it and ropemods.register(it) before loading"
    module, _, name = place.partition(":")
    return (
        f"It was saved by a program that had it from {place}: before loading, `from {module} import {name}` and "
        f"ropemods.register({name}); on the command line --register {place}"
    )


def recordable(mod: Mod) -> str | None:
    """Why a checkpoint of a model with this modification could not be read again; None when it could."""
    if of_kind(mod.kind) is not type(mod):
        return (
            f"{type(mod).__name__} is not registered, so a checkpoint that records it could not be loaded again; put "
            "@ropemods.register on the class, or call ropemods.register on it"
        )
    try:
        again = mod_from_json(json.loads(json.dumps(mod.to_json())))
    except (TypeError, ValueError) as error:
        return f"{mod} cannot be written to a checkpoint and read again: {error}"
    if again != mod:
        return f"{mod}, written to a checkpoint and read again, is {again}; give its options types that JSON has"
    return None


__all__ = [
    "AdaptiveTemperature",
    "AnchoredBos",
    "DroppedRoPE",
    "KeyedSink",
    "LearnedSink",
    "LogTemperature",
    "Mod",
    "OutputGate",
    "ReplacedBos",
    "ScaleInvariant",
    "TruncatedRoPE",
    "UnrotatedBos",
    "register",
]
