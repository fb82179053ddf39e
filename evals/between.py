"""A part of a page that a program writes, between two marks that stay."""

from __future__ import annotations

from pathlib import Path

from ropemods.settings.files import write_text


def marks(name: str) -> tuple[str, str]:
    return f"<!-- {name} -->", f"<!-- end of {name} -->"


def write_between(page: Path, name: str, text: str) -> Path:
    whole = page.read_text(encoding="utf-8")
    start, end = marks(name)
    above, below = whole.index(start) + len(start), whole.index(end)
    return write_text(page, f"{whole[:above]}\n{text}\n{whole[below:]}")
