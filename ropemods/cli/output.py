"""Showing what was found: Markdown on the terminal, JSON and the page into files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol


class Result(Protocol):
    """A report or a comparison."""

    def to_markdown(self) -> str: ...

    @property
    def to_json(self) -> Callable[..., Path]: ...

    @property
    def to_html(self) -> Callable[..., Path]: ...


def show(result: Result, *, output: str | None, html: str | None) -> None:
    # Files first: what reads the printed report may stop early.
    files = ((output, result.to_json), (html, result.to_html))
    written = [write(path) for path, write in files if path is not None]
    print(result.to_markdown())
    for path in written:
        print(f"wrote {path}")
