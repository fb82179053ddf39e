"""The options of a modification held to their annotations, so that no description of one can hold a value it cannot be.

An option takes its value in the form in which it is stored: numbers as float or int, never nan or infinite; lists of
any kind (a range, a generator, what JSON gives) as tuples.
"""

from __future__ import annotations

import math
import numbers
import types
import typing
from collections.abc import Iterable, Mapping, Set
from typing import Any, Literal, Union

PLAIN = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "None"}
SEVERAL = {int: "a list of whole numbers", float: "a list of numbers", str: "a list of texts"}


def held_to(hint: Any, value: Any, name: str, *, words: str | None = None) -> Any:
    """`value` in the stored form of the annotation, or a ValueError that starts with `name`.

    `words` says in the error what the option must be, where the annotation alone would say too little.
    """
    alternatives = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    listed = any(typing.get_origin(alternative) is tuple for alternative in alternatives)
    if listed and isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping | Set):
        value = tuple(value)  # once: a generator is empty when it is read again
    for alternative in alternatives:
        try:
            return _as(alternative, value)
        except (TypeError, OverflowError):
            continue
    words = words or " or ".join(map(_in_words, alternatives))
    finite = ", and finite" if any(map(_not_finite, value if isinstance(value, tuple) else (value,))) else ""
    raise ValueError(f"{name} must be {words}{finite}, not {list(value) if isinstance(value, tuple) else value!r}")


def _as(hint: Any, value: Any) -> Any:
    """`value` as one alternative of an annotation; TypeError where it is none."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
        if not math.isfinite(float(value)):
            raise TypeError
        return float(value)
    if hint is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if hint in (bool, str, types.NoneType) and type(value) is hint:
        return value
    if origin is Literal:
        for choice in arguments:
            if type(choice) is type(value) and choice == value:
                return value
    if origin is tuple and isinstance(value, tuple):
        each = (arguments[0],) * len(value) if arguments[-1] is Ellipsis else arguments
        if len(each) == len(value):
            return tuple(_as(hint, item) for hint, item in zip(each, value, strict=True))
    if hint is not Any and hint not in PLAIN and origin not in (Literal, tuple):
        return value  # an annotation of a modification's own, which checks it itself
    raise TypeError


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _in_words(hint: Any) -> str:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return " or ".join(", ".join(map(repr, arguments)).rsplit(", ", 1))
    if typing.get_origin(hint) is tuple:
        several = SEVERAL.get(arguments[0], "a list")
        return several if arguments[-1] is Ellipsis else f"{several} ({len(arguments)} of them)"
    return PLAIN.get(hint, str(hint))
