"""What the tests of training share: one tiny model and one text for the whole run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipes import tiny


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("model"))
