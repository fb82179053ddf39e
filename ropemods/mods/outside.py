"""Modifications that live outside the package, found by where they are or by the entry point of an installed package.

    my_module:MyMod                                  # in a module that is installed, or in the working folder

    [project.entry-points."ropemods.mods"]           # in the pyproject.toml of a package
    my_kind = "my_module:MyMod"

What a user names, or has installed, is imported. What a checkpoint alone names is not: it says where the class was.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Any

GROUP = "ropemods.mods"
PLACE = re.compile(r"[A-Za-z_][\w.]*:[A-Z]\w*")
"""`module:Class`. Classes begin with a capital, options do not: that tells `module:Class` from `kind:option`."""


def at(place: str) -> Any:
    """What stands at `module:Class`."""
    module, _, name = place.partition(":")
    here = os.getcwd()
    if not {"", here} & set(sys.path):  # an installed `ropemods` does not look in the working folder, `python -m` does
        sys.path.append(here)
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise ImportError(f"{place}: importing {module} failed: {error}") from None
        raise ImportError(
            f"{place}: there is no module {error.name!r}, neither installed nor in {here}; install it, or go to "
            "its folder"
        ) from None
    if not hasattr(found, name):
        raise ImportError(f"{place}: {module} ({getattr(found, '__file__', 'a folder')}) has no {name}")
    return getattr(found, name)


def installed() -> dict[str, EntryPoint]:
    """The modifications that installed packages offer, by kind; none of them imported."""
    return {point.name: point for point in entry_points(group=GROUP)}
