"""Build HTML and SVG from nested calls, with every string from data escaped.

    element("td", name)                      -> <td>...</td>, whatever characters `name` holds
    element("rect", x=1.5, class_="cell")    -> <rect x="1.5" class="cell"></rect>

Plain strings are data and are escaped; only a `Markup`, which nothing but this module makes, is
taken as it is. So a page cannot be broken, or made to run anything, by the name of a model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape
from typing import Final


class Markup(str):
    """Text that is markup already."""


Child = str | Iterable[str]

_VOID: Final = frozenset({"meta", "link", "br"})


def element(name: str, /, *children: Child | None, **attributes: str | float | None) -> Markup:
    """One element. `class_` becomes class, `stroke_width` stroke-width; None leaves out."""
    parts = [f"<{name}"]
    for key, value in attributes.items():
        if value is not None:
            text = value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")
            parts.append(f' {key.rstrip("_").replace("_", "-")}="{escape(text)}"')
    if name in _VOID:
        return Markup("".join(parts) + ">")
    return Markup(f"{''.join(parts)}>{join(*children)}</{name}>")


def join(*children: Child | None) -> Markup:
    """The children one after another: strings escaped, markup kept, sequences flattened."""
    parts: list[str] = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, Markup):
            parts.append(child)
        elif isinstance(child, str):
            parts.append(escape(child))
        else:
            parts.append(join(*child))
    return Markup("".join(parts))


def minus(text: str) -> str:
    """The text with a true minus sign before every number that has a hyphen there."""
    return re.sub(r"(?<![\w.])-(?=\d|inf)", "\N{MINUS SIGN}", text)


def trusted(text: str) -> Markup:
    """Text of this package that is markup: the style sheet and the script. Never data."""
    return Markup(text)
