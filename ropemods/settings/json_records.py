"""Frozen dataclasses to JSON and back, with errors that name the place.

A result file is read months later, perhaps after someone edited it. So every value is checked
against the annotation of its field, and an error says where it stood: `terms.residual.early.low`.

Annotations may be built from dataclasses, `tuple[X, ...]`, `Mapping[str, X]`, `X | None`,
`float | str`, `float`, `int`, `str`, `bool` and `Any`. A field whose JSON key is no Python name
says so in its metadata: `field(metadata={"key": "from"})`.

JSON has no NaN and no infinity: a float that is not finite is written as null and read back as NaN.
"""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import os
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, get_args, get_origin

from ropemods.settings.annotations import Unfit, fitted
from ropemods.settings.files import read_text
from ropemods.settings.options import in_words


class RecordError(ValueError):
    """A value in a file is not what its field asks for."""


def encode(value: Any) -> Any:
    """The plain JSON value (dict, list, str, number, bool, None) of a record."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {_key(f): encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [encode(item) for item in value]
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    raise TypeError(
        f"a report holds numbers, strings, tuples and mappings; found {type(value).__name__}. "
        "Convert tensors with .tolist() first."
    )


def decode(kind: Any, value: Any, where: str) -> Any:
    """Build a value of the annotated type `kind` from JSON, or raise RecordError naming `where`."""
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _decode_dataclass(kind, value, where)
    if kind is float and value is None:
        return math.nan
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _decode_union(arguments, value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise _mismatch("a list", value, where)
        items = (arguments[0],) * len(value) if arguments[-1] is Ellipsis else arguments
        if len(items) != len(value):
            raise _mismatch(f"a list of {len(items)}", value, where)
        pairs = zip(items, value, strict=True)
        return tuple(decode(item, entry, f"{where}[{i}]") for i, (item, entry) in enumerate(pairs))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise _mismatch("an object", value, where)
        item = arguments[1]
        return {key: decode(item, entry, f"{where}.{key}") for key, entry in value.items()}
    try:
        return fitted(kind, value)
    except Unfit:
        raise _mismatch(_NAMES.get(kind) or in_words(kind), value, where) from None


def read_json(path: str | os.PathLike[str], what: str) -> Any:
    """What a file holds, or an error that names it. `what` says what it should be and how one gets another."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise RecordError(f"{path} is not JSON (line {error.lineno}: {error.msg}). Was it cut short? {what}") from None
    except RecursionError:
        raise RecordError(f"{path} is not JSON of ropemods: its lists are nested too deeply. {what}") from None


def dumps(value: Any) -> str:
    """JSON text of an encoded record: objects indented, every list of numbers on one line."""
    return _lines(value, "") + "\n"


_NAMES = {int: "an integer", str: "a string", bool: "true or false", float: "a number or null"}


def _key(field: dataclasses.Field[Any]) -> str:
    return str(field.metadata.get("key", field.name))


@cache
def _annotations(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _mismatch(wanted: str, value: Any, where: str) -> RecordError:
    found = json.dumps(value)
    found = found if len(found) <= 40 else found[:37] + "..."
    return RecordError(f"{where}: expected {wanted}, found {found}")


def _decode_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    if isinstance(value, str) and str in options:
        return value
    rest = [option for option in options if option not in (type(None), str)]
    return decode(rest[0] if rest else str, value, where)


def _decode_dataclass(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _mismatch("an object", value, where)
    hints = _annotations(kind)
    known = {_key(field): field for field in dataclasses.fields(kind)}
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise RecordError(f"{where}: unknown keys {unknown}; known are {sorted(known)}")
    arguments = {}
    for key, field in known.items():
        if key in value:
            arguments[field.name] = decode(hints[field.name], value[key], f"{where}.{key}")
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise RecordError(f"{where}: the key {key!r} is missing")
    try:
        return kind(**arguments)
    except RecordError:
        raise
    except ValueError as error:
        raise RecordError(f"{where}: {error}") from None


def _lines(value: Any, indent: str) -> str:
    deeper = indent + " "
    if isinstance(value, dict) and value:
        items = [f"{deeper}{json.dumps(k)}: {_lines(v, deeper)}" for k, v in value.items()]
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        items = [deeper + _lines(item, deeper) for item in value]
        return "[\n" + ",\n".join(items) + f"\n{indent}]"
    return json.dumps(value, allow_nan=False)
