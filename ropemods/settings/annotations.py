"""Plain values held to annotations: the one place that says what is a number, a text, a choice or a list of such.

What is read from files and flags, what a modification is given in Python, and what a record holds all go by it; each
says in its own words where the value stood.
"""

from __future__ import annotations

import math
import numbers
import types
import typing
from typing import Any, Literal, Union


class Unfit(TypeError):
    """A value is none of what its annotation admits."""


def alternatives(hint: Any) -> tuple[Any, ...]:
    """`int | None` as (int, NoneType); any other annotation alone."""
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def is_plain(hint: Any) -> bool:
    """Whether it is one of those known here; an annotation of someone's own is not."""
    return hint in (bool, int, float, str, types.NoneType) or typing.get_origin(hint) in (Literal, tuple)


def fitted(hint: Any, value: Any, *, finite: bool = False, others: bool = False) -> Any:
    """`value` in the stored form of the annotation: numbers as int or float, lists as tuples; `Unfit` where it is none.

    A whole number is also a float, and `true` is never a number. `finite` refuses nan and infinities; `others` lets
    annotations that are not plain admit everything, for who checks these himself.
    """
    for each in alternatives(hint):
        try:
            return _as(each, value, finite, others)
        except (Unfit, OverflowError):
            continue
    raise Unfit


def _as(hint: Any, value: Any, finite: bool, others: bool) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in (bool, str, types.NoneType) and type(value) is hint:
        return value
    if hint is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if hint is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
        if finite and not math.isfinite(float(value)):
            raise Unfit
        return float(value)
    if origin is Literal:
        for choice in arguments:
            if type(choice) is type(value) and choice == value:
                return value
    if origin is tuple and isinstance(value, list | tuple):
        each = (arguments[0],) * len(value) if arguments[-1] is Ellipsis else arguments
        if len(each) == len(value):
            return tuple(fitted(h, v, finite=finite, others=others) for h, v in zip(each, value, strict=True))
    if others and hint is not Any and not is_plain(hint):
        return value
    raise Unfit
