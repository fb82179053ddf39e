"""Modifications as they are written on the command line and in YAML.

As text, `kind:option=value,option=value`, or as a mapping, `{kind: truncated_rope, keep: 0.75}`:

    truncated_rope:keep=0.75,which=lowest
    learned_sink:layers=[0, 1]
"""

from __future__ import annotations

import dataclasses
import re
import typing
from typing import TYPE_CHECKING, Any

from ropemods.settings.options import converted, did_you_mean, in_words
from ropemods.settings.strict_yaml import scalar

if TYPE_CHECKING:
    from ropemods.mods import Mod

EXAMPLE = "write for example truncated_rope:keep=0.75, or in YAML {kind: truncated_rope, keep: 0.75}"
COMMA = re.compile(r",(?![^\[]*\])")
"""One that is not inside brackets."""


def mod_record(written: Any) -> dict[str, Any]:
    """The record {"kind": …, option: value, …} of a modification, however it was written; checked no further."""
    if isinstance(written, dict) and isinstance(written.get("kind"), str):
        return written
    if not isinstance(written, str) or not written:
        raise ValueError(f"a modification is text or a mapping with a kind, not {written!r}; {EXAMPLE}")
    kind, colon, options = written.partition(":")
    record: dict[str, Any] = {"kind": kind.strip()}
    for part in COMMA.split(options) if colon else ():
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not (name and equals and value):
            raise ValueError(f"{written!r}: {part!r} is not option=value; {EXAMPLE}")
        if name in record:
            raise ValueError(f"{written!r}: {name} stands there twice")
        record[name] = scalar(value)
    return record


def mod_from(record: dict[str, Any]) -> Mod:
    """The modification of a record; a wrong kind, option or type is an error that names the known ones."""
    from ropemods.mods import MODS, mod_from_json

    kinds = {mod.kind: mod for mod in MODS}
    kind = record["kind"]
    if kind not in kinds:
        raise ValueError(f"there is no modification {kind!r}{did_you_mean(kind, kinds)}")
    hints = typing.get_type_hints(kinds[kind])
    known = [field.name for field in dataclasses.fields(kinds[kind])]
    options = {name: value for name, value in record.items() if name != "kind"}
    for name in options:
        if name not in known:
            raise ValueError(f"{kind} has no option {name!r}{did_you_mean(name, known)}")
    return mod_from_json({"kind": kind} | {k: converted(v, hints[k], f"{kind}: {k}") for k, v in options.items()})


def known_mods() -> str:
    """Every modification with its options and defaults, for a help text."""
    from ropemods.mods import MODS

    lines = ["modifications, as kind:option=value,option=value"]
    for mod in MODS:
        lines.append(f"  {mod.kind:<22}{' '.join((mod.__doc__ or '').split())}")
        hints = typing.get_type_hints(mod)
        for field in dataclasses.fields(mod):
            if field.name != "layers":
                lines.append(f"{'':24}{field.name}={_written(field.default)} ({in_words(hints[field.name])})")
    without = [mod.kind for mod in MODS if not _takes_layers(mod)]
    return "\n".join([*lines, f"  all but {', '.join(without)}: layers=[0,1,-1] for these layers only"])


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
