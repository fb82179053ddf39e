"""Help texts: complete, and their examples run."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import textwrap
import typing
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import ropemods as rm
from ropemods.cli import COMMANDS, load, main
from ropemods.mods import MODS
from ropemods.settings.options import REQUIRED, fields, spelt
from tests.cli.program import run, save_tiny, save_tokenizer, start


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_every_option_with_its_default(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(f"{name} --help")
    text = " ".join(capsys.readouterr().out.split()).partition("[options]")[2]
    for option, field in fields(load(name).options).items():
        positional = field.metadata["option"].positional
        flag = option.upper() if positional else f"--{spelt(option)}"
        shown = re.search(rf"{flag}\b.*?\((required|default: [^)]+)\)", text)
        assert shown is not None, option
        if field.default is REQUIRED:
            assert shown[1] == "required"
        elif not isinstance(field.default, bool) and field.default is not None:
            value = field.default
            assert (
                shown[1] == f"default: {(' '.join(map(str, value)) or 'none') if isinstance(value, tuple) else value}"
            )


@pytest.mark.parametrize("name", COMMANDS)
def test_options_of_every_command_have_types_that_flags_and_yaml_can_give(name: str) -> None:
    hints = typing.get_type_hints(load(name).options)
    for option, field in fields(load(name).options).items():
        assert field.metadata["option"].help
        assert field.default is not None or field.metadata["option"].unset, f"{option}: what does None do?"
        assert hints[option] is not bool or field.default is False, f"{option}: flags turn something on"


def test_overview_names_every_command_and_version_what_a_bug_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    run("--help")
    overview = capsys.readouterr().out
    assert all(re.search(rf"^  {name} +\w", overview, re.MULTILINE) for name in COMMANDS)
    assert all(f"{code} " in overview.partition("exit codes: ")[2] for code in (0, 1, 2, 130))
    run("--version")
    version = capsys.readouterr().out
    assert version.startswith(f"ropemods {rm.__version__} (torch {torch.__version__}")


def test_apply_help_lists_every_modification_with_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    run("apply --help")
    listed = capsys.readouterr().out.partition("modifications, as")[2]
    for mod in MODS:
        assert mod.kind in listed
        for field in dataclasses.fields(mod):
            assert f"{field.name}=" in listed


def example(name: str) -> list[list[str]]:
    """The command lines of a help text, as words behind the program's name."""
    lines = [shlex.split(line) for line in textwrap.dedent(load(name).example).strip().splitlines()]
    assert all(words[:1] == ["ropemods"] for words in lines)
    return [words[1:] for words in lines]


def test_the_examples_in_the_help_texts_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tokenizer(save_tiny(tmp_path / "HuggingFaceTB" / "SmolLM2-135M"))
    for name in ("apply", "show"):
        for line in example(name):
            assert main(line) == 0, line


def test_the_export_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "HuggingFaceTB" / "SmolLM2-135M")
    for line in example("export"):
        assert main(line) == 0, line
    AutoModelForCausalLM.from_pretrained("smollm2-stock")


def test_a_reader_that_stops_early_is_no_error(here: Path) -> None:
    process = start("--help", stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    process.wait(timeout=60)


def test_help_and_version_are_had_in_every_usual_way(capsys: pytest.CaptureFixture[str]) -> None:
    said = {}
    for line in ("--help", "-h", "help", "--version", "-V", "measure --help", "help measure"):
        run(line)
        said[line] = capsys.readouterr().out
    assert said["--help"] == said["-h"] == said["help"] and said["--version"] == said["-V"]
    assert said["measure --help"] == said["help measure"]
    assert said["--version"].startswith(f"ropemods {rm.__version__} (torch {torch.__version__}")
    assert max(map(len, said["--help"].splitlines())) <= 100


def test_usage_shows_lists_as_they_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    run("measure --help")
    text = capsys.readouterr().out
    assert "--early FIRST STOP  " in text and "8 64, 8,64" in text
    run("train --help")
    assert capsys.readouterr().out.startswith("usage: ropemods train RECIPE [options] [-- flags ...]\n")
