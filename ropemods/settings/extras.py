"""Packages that only some uses need. The core runs without them; a use that lacks one says at once what installs it.

    need("peft", f"{path} is a PEFT adapter; reading it")

The extras themselves are declared in pyproject.toml.
"""

from __future__ import annotations

import importlib.util

EXTRAS: dict[str, tuple[str, ...]] = {
    "train": ("accelerate", "peft", "datasets", "pyarrow", "pandas"),
    "deepspeed": ("deepspeed",),
    "gguf": ("gguf",),
    "eval": ("lm_eval",),
}
"""The packages of each extra, by the names they are imported under."""


class MissingPackage(ImportError):
    """A package of an extra is not installed; the message names the command that installs it."""


def need(package: str, use: str) -> None:
    """An error, unless `package` is installed. `use` is what needs it: "a recipe with lora"."""
    if importlib.util.find_spec(package) is None:
        extra = next(name for name, packages in EXTRAS.items() if package in packages)
        raise MissingPackage(f"{use} needs {package}, which is not installed: pip install 'ropemods[{extra}]'")
