"""Modifications as they are written on the command line and in YAML.

As text, `kind:option=value,option=value`, or as a mapping, `{kind: truncated_rope, keep: 0.75}`:

    truncated_rope:keep=0.75,which=lowest
    learned_sink:layers=[0, 1]
    my_module:MyMod:by=2              # one of your own, by where its class is: it is imported and registered
"""

from __future__ import annotations

import dataclasses
import re
import typing
from typing import TYPE_CHECKING, Any

from ropemods.settings.options import converted, did_you_mean, in_words, option
from ropemods.settings.strict_yaml import scalar

if TYPE_CHECKING:
    from ropemods.mods import Mod

EXAMPLE = (
    "write for example truncated_rope:keep=0.75, or in YAML {kind: truncated_rope, keep: 0.75}; one of your own as "
    "my_module:MyMod:option=value"
)
COMMA = re.compile(r",(?![^\[]*\])")
"""One that is not inside brackets."""
NEXT = re.compile(r",(?![^\[]*\])(?=\s*[A-Za-z_][\w.]*\s*(?::|,|$))")
"""A comma before another modification: what follows is a word alone, or one with a colon, and no option=value."""
PLACED = re.compile(r"\s*([A-Za-z_][\w.]*:[A-Z]\w*)\s*(?::(.*))?", re.DOTALL)
"""One of a user's own, `module:Class:options`; `ropemods.mods.outside` says why the capital."""


def mod_records(written: Any) -> list[dict[str, Any]]:
    """The records of one word: a modification, or several with commas between them."""
    return (
        [mod_record(each.strip()) for each in NEXT.split(written)]
        if isinstance(written, str)
        else [mod_record(written)]
    )


def mod_record(written: Any) -> dict[str, Any]:
    """The record {"kind": …, option: value, …} of a modification, however it was written; checked no further."""
    if isinstance(written, dict) and isinstance(written.get("kind"), str):
        return written
    if not isinstance(written, str) or not written:
        raise ValueError(f"a modification is text or a mapping with a kind, not {written!r}; {EXAMPLE}")
    if placed := PLACED.fullmatch(written):
        kind, options = placed[1], placed[2]
    else:
        kind, colon, options = written.partition(":")
        options = options if colon else None
    record: dict[str, Any] = {"kind": kind.strip()}
    for part in COMMA.split(options) if options is not None else ():
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not (name and equals and value):
            raise ValueError(f"{written!r}: {part!r} is not option=value; {EXAMPLE}")
        if name in record:
            raise ValueError(f"{written!r}: {name} stands there twice")
        record[name] = scalar(value)
    return record


def mod_from(record: dict[str, Any]) -> Mod:
    """The modification of a record; a wrong kind, option or type is an error that names the known ones."""
    from ropemods.mods import kinds, mod_from_json, of_kind, outside, registered_at

    options = dict(record)
    kind, place = options.pop("kind"), options.pop("class", None)
    mod = registered_at(kind) if outside.PLACE.fullmatch(kind) else of_kind(kind)
    if mod is None and place is not None:
        mod = registered_at(place)
    if mod is None:
        known = [*kinds(), *(name for name in outside.installed() if name not in kinds())]
        raise ValueError(f"there is no modification {kind!r}{did_you_mean(kind, known)}")
    hints = typing.get_type_hints(mod)
    known = [field.name for field in dataclasses.fields(mod)]
    for name in options:
        if name not in known:
            raise ValueError(f"{mod.kind} has no option {name!r}{did_you_mean(name, known)}")
    given = {name: converted(value, hints[name], f"{mod.kind}: {name}") for name, value in options.items()}
    return mod_from_json({"kind": mod.kind} | given)


def registered(place: Any) -> str:
    """`place` once the modification there is known; what reads an item of --register."""
    from ropemods.mods import outside, registered_at

    if not isinstance(place, str) or not outside.PLACE.fullmatch(place):
        raise ValueError(f"a modification of your own is named as my_module:MyMod; give that, not {place!r}")
    registered_at(place)
    return place


def registering() -> Any:
    """The option of commands that read modified checkpoints, for modifications from outside the package."""
    return option((), "modifications of your own to know, as module:Class", metavar="MODULE:CLASS", parse=registered)


def known_mods() -> str:
    """Every modification with its options and defaults, for a help text."""
    from ropemods.mods import MODS, outside

    lines = ["modifications, as kind:option=value,option=value"]
    for mod in MODS:
        lines.append(f"  {mod.kind:<22}{' '.join((mod.__doc__ or '').split())}")
        hints = typing.get_type_hints(mod)
        for field in dataclasses.fields(mod):
            if field.name != "layers":
                lines.append(f"{'':24}{field.name}={_written(field.default)} ({in_words(hints[field.name])})")
    without = [mod.kind for mod in MODS if not _takes_layers(mod)]
    lines.append(f"  all but {', '.join(without)}: layers=[0,1,-1] for these layers only")
    lines += [f"  {kind:<22}from the installed {point.value}" for kind, point in outside.installed().items()]
    return "\n".join([*lines, "  my_module:MyMod:option=value for one of your own, by where its class is"])


def _takes_layers(mod: type[Mod]) -> bool:
    try:
        mod(layers=(0,))
    except ValueError:
        return False
    return True


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
