"""The core runs without the extras, and what needs one says which before it does anything."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import ropemods as rm
from ropemods.settings.extras import EXTRAS, MissingPackage, need
from ropemods.training.recipe_file import from_values
from tests.cli.program import ENVIRONMENT, REPOSITORY, refused, run
from tests.recipes import tiny

PACKAGES = sorted({package for packages in EXTRAS.values() for package in packages})


def requirements(extra: str | None) -> set[str]:
    """Names that pyproject.toml asks for: of the core, or of an extra with those that it takes in."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = set()
    for line in project["dependencies"] if extra is None else project["optional-dependencies"][extra]:
        name, inside = re.match(r"([\w-]+)(?:\[(.*?)\])?", line).groups()  # type: ignore[union-attr]
        own = name == project["name"]
        found |= set().union(*(requirements(each) for each in inside.split(","))) if own else {name.replace("-", "_")}
    return found


def test_every_package_that_is_asked_for_by_an_extra_is_in_it_and_not_in_the_core() -> None:
    for extra, packages in EXTRAS.items():
        assert set(packages) <= requirements(extra)
        assert set(packages) <= requirements("all")
    assert not set(PACKAGES) & requirements(None)


ZERO2 = REPOSITORY / "recipes" / "accelerate" / "deepspeed_zero2.yaml"
MEASURE = "{text: text.txt, sequences: 16, groups: 8, length: 32, grid_rows: 8, window: 4, early: [4, 8]}\n"
CORE = f"""
import sys
for package in {PACKAGES}:
    sys.modules[package] = None  # as if it were not installed
import torch
import ropemods as rm
from ropemods.cli import main
from tests import zoo

for name in rm.__all__:
    getattr(rm, name)
assert rm.summary(rm.apply(zoo.build(), rm.TruncatedRoPE(0.5), rm.LearnedSink()))
lines = '''
apply model modified --mods truncated_rope:keep=0.5
show modified
measure model --config measure.yaml --output a.json
measure modified --config measure.yaml --output b.json
compare a.json b.json
suggest model --text text.txt --sequences 8 --crop 32 --length 64
export modified stock
'''
print([main(line.split()) for line in lines.strip().splitlines()])
"""


@pytest.mark.slow
def test_the_core_applies_measures_and_exports_without_any_extra(here: Path) -> None:
    (here / "text.txt").write_text(" ".join(f"w{3 + n * n % 60}" for n in range(4000)))
    (here / "measure.yaml").write_text(MEASURE)
    done = subprocess.run([sys.executable, "-c", CORE], env=ENVIRONMENT, cwd=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[0, 0, 0, 0, 0, 0, 0]", done.stdout + done.stderr


def missing(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """As if it were not installed."""
    monkeypatch.setitem(sys.modules, package, None)  # type: ignore[arg-type]


def test_the_message_names_the_package_and_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    need("peft", "a recipe with lora")
    missing(monkeypatch, "peft")
    with pytest.raises(MissingPackage) as error:
        need("peft", "a recipe with lora")
    assert str(error.value) == ("a recipe with lora needs peft, which is not installed: pip install 'ropemods[train]'")


@pytest.mark.parametrize(
    ("package", "extra", "keys"),
    [
        ("accelerate", "train", {}),
        ("peft", "train", {"lora": {"r": 2}}),
        ("datasets", "train", {"data": "some/dataset"}),
        ("datasets", "train", {"held_out_data": "some/dataset"}),
        ("deepspeed", "deepspeed", {"deepspeed": "recipes/deepspeed/zero2.json"}),
    ],
)
def test_a_recipe_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, extra: str, keys: dict[str, object]
) -> None:
    values = {**tiny.values(tmp_path / "none", tmp_path / "none.txt", tmp_path / "out"), **keys}
    from_values(values, source="r.yaml")
    missing(monkeypatch, package)
    with pytest.raises(MissingPackage, match=rf"^r\.yaml: .* needs {package}.*pip install 'ropemods\[{extra}\]'"):
        from_values(values, source="r.yaml")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("package", "line"),
    [
        ("accelerate", "train r.yaml"),
        ("deepspeed", "train r.yaml --launcher deepspeed --num_processes 2"),
        ("deepspeed", f"train r.yaml --launcher accelerate --launcher_config {ZERO2}"),
        ("accelerate", "measure model --text text.txt --device_map auto"),
        ("datasets", "measure model --text some/dataset"),
        ("pyarrow", "measure model --text text.parquet"),
        ("peft", "measure adapter --text text.txt"),
        ("peft", "export adapter out"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("adapter")
def test_a_command_is_refused_in_one_line(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    package: str,
    line: str,
) -> None:
    (here / "text.txt").write_text("w3 w4 " * 2000)
    (here / "text.parquet").touch()
    (here / "r.yaml").touch()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it was started"))
    missing(monkeypatch, package)
    extra = next(extra for extra, packages in EXTRAS.items() if package in packages)
    assert f"needs {package}, which is not installed: pip install 'ropemods[{extra}]'" in refused(line, capsys)


@pytest.mark.usefixtures("adapter")
def test_an_adapter_is_shown_without_peft_and_read_only_with_it(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    missing(monkeypatch, "peft")
    run("show adapter")
    assert "LORA" in capsys.readouterr().out
    with pytest.raises(MissingPackage, match=r"^adapter is a PEFT adapter; reading it needs peft.*'ropemods\[train\]'"):
        rm.from_pretrained("adapter")


def test_results_name_the_versions_of_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    from ropemods.training.card import versions

    assert "deepspeed" in versions()
    missing(monkeypatch, "deepspeed")
    assert "deepspeed" not in versions() and "accelerate" in versions()
