"""`ropemods train`: it prints the command that it runs, and runs exactly that."""

from __future__ import annotations

import shlex
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from ropemods.cli import train
from ropemods.cli.command import parse


def options(*words: str) -> Any:
    return parse(train.COMMAND, "train", list(words))


def test_what_stands_behind_the_dashes_goes_to_the_recipe() -> None:
    given = options(
        "r.yaml", "--launcher", "torchrun", "--num_processes", "2", "--", "--learning_rate", "1e-5", "--seeds", "3"
    )
    assert given.recipe == "r.yaml" and given.flags == ("--learning_rate", "1e-5", "--seeds", "3")


def test_the_command_that_is_printed_is_the_one_that_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    ran: list[Any] = []

    def record(words: list[str], **kwargs: Any) -> SimpleNamespace:
        assert "shell" not in kwargs
        ran.append(words)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", record)
    train.run(options("my recipe.yaml", "--launcher", "deepspeed", "--num_processes", "8", "--", "--mods", "[a; rm b]"))
    (words,) = ran
    assert shlex.split(capsys.readouterr().out) == words
    assert words[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"] and words[-2:] == ["--mods", "[a; rm b]"]


def test_printing_only_runs_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it ran"))
    train.run(options("r.yaml", "--print_only"))
    assert "ropemods.training --config r.yaml" in capsys.readouterr().out


def test_a_run_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=3))
    with pytest.raises(OSError, match="exit code 3"):
        train.run(options("r.yaml"))
