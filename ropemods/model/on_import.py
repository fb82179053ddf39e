"""Wrapping what other packages do, once they are imported, so that nobody has to import them for it."""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import inspect
import sys
from collections.abc import Callable
from typing import Any


class _OnImport(importlib.abc.MetaPathFinder):
    def __init__(self, name: str, then: Callable[[Any], None]) -> None:
        self.name, self.then = name, then

    def find_spec(self, name: str, path, target=None):
        if name != self.name:
            return None
        # A spec is also asked for by who only wants to know whether there is one, so this stays until the import.
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module) -> None:
                sys.meta_path.remove(self)
                load(module)
                self.then(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def when_imported(name: str, then: Callable[[Any], None]) -> None:
    """Call `then(module)` now if it is imported, else when it is; `then` may be called again and must not mind."""
    if sys.modules.get(name) is not None:
        then(sys.modules[name])
    elif not any(isinstance(finder, _OnImport) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _OnImport(name, then))


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Put `around(stock, ...)` in the place of a function or method, of a class's as well; once."""
    of_class = inspect.ismethod(getattr(owner, name))
    stock = getattr(owner, name).__func__ if of_class else getattr(owner, name)
    if hasattr(stock, "ropemods"):
        return

    @functools.wraps(stock)
    def wrapped(*args, **kwargs):
        return around(stock, *args, **kwargs)

    wrapped.ropemods = True  # type: ignore[attr-defined]
    setattr(owner, name, classmethod(wrapped) if of_class else wrapped)
