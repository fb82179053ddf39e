"""The version of ropemods, and those of the packages that a result depends on."""

from __future__ import annotations

import importlib.util
import platform
from importlib.metadata import version

VERSION = "0.2.0"

OLDEST = {"torch": "2.11", "transformers": "5.17"}
"""As pyproject.toml asks for."""


def versions_of(*packages: str) -> dict[str, str]:
    """Of ropemods, Python, and those packages that are installed; another had no part in a result."""
    installed = [package for package in packages if importlib.util.find_spec(package) is not None]
    return {"ropemods": VERSION, **{name: version(name) for name in installed}, "python": platform.python_version()}
