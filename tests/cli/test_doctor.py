"""`ropemods doctor` tells what works from what does not, and what stands in the way by its exit code."""

from __future__ import annotations

import importlib.util
import tomllib
from importlib.metadata import EntryPoint

import pytest

from ropemods.attention import paths
from ropemods.cli import doctor, main
from ropemods.mods import outside
from ropemods.settings import versions
from ropemods.settings.extras import EXTRAS
from tests.cli.program import REPOSITORY


def told(capsys: pytest.CaptureFixture[str], code: int = 0) -> dict[str, tuple[str, str]]:
    """(mark, words) of each line, and the error where there is one."""
    assert main(["doctor"]) == code
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == (code != 0)
    lines = {line[4:30].strip(): (line[:4].strip(), line[30:]) for line in out.splitlines()}
    return lines | {"error": ("", err)}


def test_every_version_kernel_and_extra_has_a_line(capsys) -> None:
    lines = told(capsys)
    assert lines["ropemods"] == ("ok", versions.VERSION)
    for name in (*versions.OLDEST, "python", "cpu", "hub cache"):
        assert lines[name][0] == "ok"
    assert lines["kernel flash"][0] == "ok"
    assert {f"kernel {path}" for path in paths.PATHS} <= set(lines)
    for extra, packages in EXTRAS.items():
        there = all(importlib.util.find_spec(package) for package in packages)
        assert lines[f"extra {extra}"][0] == ("ok" if there else "-")


def test_the_oldest_versions_are_those_that_the_project_asks_for() -> None:
    asked = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {f"{name}>={oldest}" for name, oldest in versions.OLDEST.items()} <= set(asked)


def test_a_version_that_is_too_old_stands_in_the_way(capsys, monkeypatch) -> None:
    monkeypatch.setattr(versions, "OLDEST", {"torch": "99.1"})
    lines = told(capsys, code=2)
    assert lines["torch"][0] == "!!" and "pip install 'torch>=99.1'" in lines["torch"][1]
    assert "torch will not do" in lines["error"][1]


@pytest.mark.parametrize("asked", ["nothing", "flex"])
def test_a_kernel_that_was_asked_for_and_cannot_run_stands_in_the_way(capsys, monkeypatch, asked) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv(paths.VARIABLE, asked)
    mark, words = told(capsys, code=2)[paths.VARIABLE]
    assert mark == "!!" and asked in words and "unset it" in words


def test_an_extra_that_is_not_installed_is_no_error(capsys, monkeypatch) -> None:
    monkeypatch.setitem(EXTRAS, "train", ("accelerate", "no_such_package"))
    lines = told(capsys)
    assert lines["extra train"] == ("-", "no no_such_package: pip install 'ropemods[train]'")


@pytest.mark.parametrize(("value", "mark"), [("tests.mods.own:Cooled", "ok"), ("no_such_module:Mine", "!!")])
def test_a_modification_of_an_installed_package_is_loaded(capsys, monkeypatch, value, mark) -> None:
    point = EntryPoint(name="mine", value=value, group=outside.GROUP)
    monkeypatch.setattr(outside, "entry_points", lambda group: [point])
    found = told(capsys, code=0 if mark == "ok" else 2)["modification mine"]
    assert found[0] == mark and value in found[1]


def test_a_command_that_only_looks_has_no_options_of_its_own() -> None:
    with pytest.raises(TypeError):
        doctor.Options(output="report.json")  # type: ignore[call-arg]
