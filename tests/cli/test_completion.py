"""Completion: a real bash completes commands, options and their choices by the script that is printed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from ropemods.cli import COMMANDS, load
from ropemods.cli.completion import flags_of
from tests.cli.program import refused, run

ASK = """
source ./script
declare -F _ropemods >/dev/null && [[ $(complete -p ropemods) == *"-F _ropemods ropemods" ]] || exit 1
while IFS= read -r line; do
  COMP_WORDS=($line); [[ $line == *" " ]] && COMP_WORDS+=("")
  COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMPREPLY=()
  _ropemods
  echo "${COMPREPLY[*]}"
done
"""


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    run(f"completion {shell}")
    return capsys.readouterr().out


@pytest.fixture
def completed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """What bash proposes at the end of each line."""
    (tmp_path / "script").write_text(script("bash", capsys))

    def ask(*lines: str) -> list[list[str]]:
        given = "".join(f"{line}\n" for line in lines)
        done = subprocess.run(
            ["bash", "--norc", "-c", ASK], input=given, cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert not done.stderr
        return [line.split() for line in done.stdout.splitlines()]

    return ask


def test_bash_completes_commands_options_and_choices(completed) -> None:
    every, meas, dtype, launcher, shells, path, of_none = completed(
        "ropemods ", "ropemods mea", "ropemods measure model --dtype flo", "ropemods train r.yaml --launcher ",
        "ropemods completion ", "ropemods compare before.j", "ropemods nonsense --",
    )  # fmt: skip
    assert every == [*COMMANDS, "--help", "--version"]
    assert meas == ["measure"] and dtype == ["float32", "float64", "float16"]
    assert launcher == ["python", "torchrun", "accelerate", "deepspeed"] and shells == ["bash", "zsh", "fish"]
    assert path == of_none == []  # so bash proposes files


def test_bash_completes_every_option_of_every_command(completed) -> None:
    for name, flags in zip(COMMANDS, completed(*(f"ropemods {name} x --" for name in COMMANDS)), strict=True):
        assert flags == list(flags_of(load(name))) and {"--config", "--help"} <= set(flags)


def test_zsh_runs_the_same_function_and_fish_is_told_of_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert script("zsh", capsys).endswith(script("bash", capsys))
    lines = script("fish", capsys).splitlines()
    for name in COMMANDS:
        told = [line for line in lines if f"__fish_seen_subcommand_from {name}'" in line]
        for flag in flags_of(load(name)):
            assert sum(f" -l {flag.removeprefix('--')} " in line for line in told) == 1, (name, flag)


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "bash, zsh or fish" in refused("completion tcsh", capsys)
