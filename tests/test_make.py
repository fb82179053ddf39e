"""Two commands on a bare machine: `make demo` and `make test`, with make and a Python on it and nothing else.

The rules are really run, in a clone whose path has a space in it, with pip and its resolver. What is a stand-in is the
package index: a folder of empty wheels, and a build backend that makes an empty one of this package.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from tests.cli.program import REPOSITORY

pytestmark = pytest.mark.slow

BASE = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
ENVIRONMENT = REPOSITORY / ".ci" / "environment.py"
BUILD = """
import zipfile

def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    name = "ropemods-0-py3-none-any.whl"
    with zipfile.ZipFile(f"{wheel_directory}/{name}", "w") as wheel:
        wheel.writestr("ropemods-0.dist-info/METADATA", "Metadata-Version: 2.1\\nName: ropemods\\nVersion: 0\\nProvides-Extra: dev\\n")
        wheel.writestr("ropemods-0.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr("ropemods-0.dist-info/RECORD", "")
    return name
"""  # noqa: E501
DEMO = "import sys, torch; print('the recipe runs:', sys.argv[1:], torch.__name__, 'in', sys.prefix)"


def wheel(folder: Path, name: str, version: str, **modules: str) -> None:
    """A package of a few modules."""
    about = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        for module, text in modules.items():
            file.writestr(module.replace("__", "/") + ".py", text)
        file.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{about}/RECORD", "")


class Machine:
    """A checkout, a folder of programs and a package index; nothing of the environment of this process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.programs, self.index = folder / "a clone", folder / "bin", folder / "index"
        self.programs.mkdir()
        self.index.mkdir()
        for name, target in (("make", shutil.which("make")), ("python3", BASE)):
            (self.programs / name).symlink_to(str(target))
        self.folder.mkdir()
        for name in ("Makefile", "pyproject.toml", "constraints.txt", "README.md", ".ci", "recipes"):
            entry = REPOSITORY / name
            (shutil.copytree if entry.is_dir() else shutil.copy)(entry, self.folder / name)
        (self.folder / "recipes" / "demo.py").write_text(DEMO)

    def offer(self, *names: str) -> None:
        """Put packages into the index."""
        for name in names:
            modules = {"setuptools__build_meta": BUILD} if name == "setuptools" else {name: ""}
            wheel(self.index, name, "2.13.0" if name == "torch" else "99", **modules)

    def environment(self, **more: str) -> dict[str, str]:
        pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": self.index.as_uri(), "PIP_CONFIG_FILE": os.devnull}
        return {"PATH": str(self.programs), **pip, **more}

    def make(self, *words: str, **more: str) -> tuple[int, str]:
        """Exit code and output of make, called from another folder."""
        done = subprocess.run(
            [self.programs / "make", "--no-print-directory", "-C", self.folder, *words],
            env=self.environment(**more),
            cwd=self.programs,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        return done.returncode, done.stdout

    @property
    def venv(self) -> Path:
        return self.folder / ".venv"

    def state(self) -> dict[str, int]:
        return {str(path): path.lstat().st_mtime_ns for path in self.venv.rglob("*") if "__pycache__" not in path.parts}


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Machine, str]:
    """A machine on which `make demo` has run, and what it said. Tests leave it as they find it."""
    machine = Machine(tmp_path_factory.mktemp("made"))
    machine.offer("torch", "setuptools")
    code, said = machine.make("-j4", "demo", "install", "DEMO=tiny", "MODEL=my model", "TEXT=it's; mine.txt")
    assert code == 0, said
    return machine, said


@pytest.mark.parametrize(
    ("target", "offered", "failing"),
    [
        ("demo", (), r"pip install torch==2\.13\.0"),
        ("test", ("torch",), r"pip install --constraint constraints\.txt --editable '\.\[dev\]'"),
    ],
)
def test_an_install_that_fails_says_what_failed_and_leaves_nothing(
    machine: Machine, target: str, offered: tuple[str, ...], failing: str
) -> None:
    machine.offer(*offered)
    code, said = machine.make(target)
    lines = said.splitlines()
    assert code != 0 and "the recipe runs" not in said
    assert re.match(
        r"\.venv: making it with Python 3\.\d+\.\d+: torch==2\.13\.0, then the rest at .*constraints", lines[0]
    )
    assert "ERROR: " in said  # pip's own message
    assert re.match(rf"\.venv: not done: `{failing}` failed with exit code 1; its own message is above\.", lines[-2])
    assert not machine.venv.exists()


def test_make_demo_makes_the_environment_and_runs_the_recipe(made: tuple[Machine, str]) -> None:
    machine, said = made
    lines = said.replace("make: Nothing to be done for 'install'.\n", "").splitlines()  # the second goal had waited
    first, complete, last = lines
    assert first.startswith(".venv: making it with Python") and complete.startswith(".venv: complete after")
    words = ["--tiny", "--model", "my model", "--text", "it's; mine.txt"]
    assert last == f"the recipe runs: {words} torch in {machine.venv}"
    assert (machine.venv / "complete").exists() and not (machine.venv / "unfinished").exists()


def test_a_finished_environment_goes_straight_to_the_recipe(made: tuple[Machine, str]) -> None:
    machine, _ = made
    before = machine.state()
    for active in ({}, {"VIRTUAL_ENV": str(machine.venv)}):
        code, said = machine.make("demo", **active)
        assert (code, said) == (0, f"the recipe runs: [] torch in {machine.venv}\n")
    assert machine.state() == before


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_an_environment_older_than_what_it_is_made_from_is_brought_up_to_date(
    made: tuple[Machine, str], name: str
) -> None:
    machine, _ = made
    os.utime(machine.folder / name, (time.time() - 0.01,) * 2)
    keepsake = machine.venv / "keepsake"
    keepsake.touch()
    code, said = machine.make("demo")
    first, complete, last = said.splitlines()
    assert code == 0 and first == ".venv: bringing it to what pyproject.toml and constraints.txt say"
    assert complete.startswith(".venv: complete after") and last.startswith("the recipe runs")
    assert keepsake.exists()
    keepsake.unlink()


def test_an_update_that_fails_before_anything_changed_leaves_the_environment_usable(made: tuple[Machine, str]) -> None:
    machine, _ = made
    constraints = machine.folder / "constraints.txt"
    before = constraints.read_text()
    constraints.write_text(before.replace("torch==2.13.0", "torch==2.13.1"))
    code, said = machine.make("demo")
    assert code != 0 and "`pip install torch==2.13.1` failed" in said and "It is what it was" in said
    code, said = machine.make("demo", "PYTHON=.venv/bin/python")
    assert "lacks transformers" in said  # the stand-in index has no more; a real one is used as it is
    constraints.write_text(before)
    assert machine.make("demo")[0] == 0


def test_what_an_interruption_left_is_made_again(made: tuple[Machine, str]) -> None:
    machine, _ = made
    (machine.venv / "unfinished").touch()
    (machine.venv / "complete").unlink()
    torn = machine.venv / "torn"
    torn.touch()
    code, said = machine.make("demo")
    assert code == 0 and said.startswith(".venv: making it again, since it is not whole, with Python")
    assert not torn.exists()


def test_a_signal_while_it_installs_leaves_nothing(machine: Machine) -> None:
    slow = machine.index / "slow"
    os.mkfifo(slow)  # pip opens it and waits
    process = subprocess.Popen(
        [BASE, machine.folder / ".ci" / "environment.py", "make"],
        env=machine.environment(PIP_FIND_LINKS="", PIP_REQUIREMENT=str(slow)),
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None and "making it" in process.stdout.readline()
    while not list(machine.venv.glob("bin/pip*")):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and said.splitlines()[-1] == ".venv: interrupted"
    assert not machine.venv.exists()


def test_an_interruption_is_one_even_where_the_program_ends_by_itself() -> None:
    interrupt = "import os, signal; os.kill(os.getppid(), signal.SIGINT)"
    script = (
        # A shell that starts this in its background has interrupts ignored, which a child inherits.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"import runpy, sys; run = runpy.run_path({str(ENVIRONMENT)!r})['run']\n"
        f"try: run([sys.executable, '-c', {interrupt!r}], 'pip')\n"
        "except KeyboardInterrupt: print('interrupted')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("interrupted\n", "")


@pytest.mark.parametrize("how", ["PYTHON", "VIRTUAL_ENV", "VIRTUAL_ENV made here by hand"])
def test_an_environment_that_is_given_is_used_and_never_installed_into(
    machine: Machine, tmp_path: Path, how: str
) -> None:
    machine.offer("torch", "setuptools")
    mine = machine.venv if how.endswith("by hand") else tmp_path / "mine"
    subprocess.run([BASE, "-m", "venv", "--without-pip", mine], check=True)
    python = mine / "bin" / "python"
    before = sorted(mine.rglob("*"))
    more = {"PYTHON": str(python)} if how == "PYTHON" else {"VIRTUAL_ENV": str(mine)}
    code, said = machine.make("demo", **more)
    message, _ = said.splitlines()
    assert code != 0 and message.startswith(f"make: not done: {python} lacks torch>=2.11, transformers>=5.17, ")
    assert f"(make install PYTHON={shlex.quote(str(python))})" in message and "pytest>" not in message
    assert "pytest>=8" in machine.make("test", **more)[1]
    assert sorted(mine.rglob("*")) == before and machine.venv.exists() == (machine.venv == mine)


def test_the_environment_of_these_tests_has_all_that_is_asked_for() -> None:
    done = subprocess.run([sys.executable, ENVIRONMENT, "check", "dev"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("how", ["on PATH", "PYTHON"])
def test_a_python_that_is_too_old_or_none_is_told_in_a_line(machine: Machine, how: str) -> None:
    for stub in ("#!/bin/sh\nexit 1\n", None):  # what an old one answers to the question for its version
        program = machine.programs / "python3"
        program.unlink()
        if stub is not None:
            program.write_text(stub)
            program.chmod(0o755)
        code, said = machine.make("demo", **({} if how == "on PATH" else {"PYTHON": str(program)}))
        message, _ = said.splitlines()
        assert code != 0 and "no Python of 3.11 or newer" in message
        assert not machine.venv.exists()
        program.touch()


def test_a_python_without_venv_is_told_in_a_line(machine: Machine, tmp_path: Path) -> None:
    """As Debian's is without python3-venv."""
    program = machine.programs / "python3"
    program.unlink()
    program.write_text(
        f'#!/bin/sh\nif [ "$1" = -c ]; then exec {BASE} "$@"; fi\n'
        f'exec {BASE} -c \'import runpy, sys; sys.modules["ensurepip"] = None; sys.argv = sys.argv[1:]; '
        'runpy.run_path(sys.argv[0], run_name="__main__")\' "$@"\n'
    )
    program.chmod(0o755)
    code, said = machine.make("demo")
    message, _ = said.splitlines()
    assert code != 0 and "comes without venv; install that (Debian, Ubuntu: apt install python3-venv)" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_checkout_that_cannot_be_written_is_told_in_a_line(machine: Machine) -> None:
    machine.folder.chmod(0o555)
    try:
        code, said = machine.make("demo")
    finally:
        machine.folder.chmod(0o755)
    assert code != 0 and said.splitlines()[-2].startswith(".venv: not done: [Errno 13] Permission denied")


def test_ci_runs_what_the_readme_says() -> None:
    section = (REPOSITORY / "README.md").read_text(encoding="utf-8").partition("## Test\n")[2]
    block = section.partition("```\n")[2].partition("```")[0]
    assert block.splitlines() == ["make test"]
    assert (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1] == "make test"
