"""The options of a modification held to their annotations, so that no description of one can hold a value it cannot be.

An option takes its value in the form in which it is stored: numbers as float or int, never nan or infinite; lists of
any kind (a range, a generator, what JSON gives) as tuples.
"""

from __future__ import annotations

import contextlib
import math
import types
import typing
from collections.abc import Iterable, Mapping, Set
from typing import Any, Literal

from ropemods.settings.annotations import Unfit, alternatives, fitted

PLAIN = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "None"}
SEVERAL = {int: "a list of whole numbers", float: "a list of numbers", str: "a list of texts"}


def held_to(hint: Any, value: Any, name: str, *, words: str | None = None) -> Any:
    """`value` in the stored form of the annotation, or a ValueError that starts with `name`.

    `words` says in the error what the option must be, where the annotation alone would say too little.
    """
    admitted = alternatives(hint)
    listed = any(typing.get_origin(each) is tuple for each in admitted)
    if listed and isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping | Set):
        value = tuple(value)  # once: a generator is empty when it is read again
    with contextlib.suppress(Unfit):
        return fitted(hint, value, finite=True, others=True)
    words = words or " or ".join(map(_in_words, admitted))
    finite = ", and finite" if any(map(_not_finite, value if isinstance(value, tuple) else (value,))) else ""
    raise ValueError(f"{name} must be {words}{finite}, not {list(value) if isinstance(value, tuple) else value!r}")


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
