"""ropemods/API.md is what the docstrings say, of every public name."""

from __future__ import annotations

import ropemods as rm
from tests.release import reference


def test_the_page_is_what_the_script_writes() -> None:
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page(), "run: python tests/release/reference.py"


def test_every_public_name_is_on_it() -> None:
    assert {name for names in reference.PARTS.values() for name in names} == set(rm.__all__)
