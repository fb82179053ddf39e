"""The Python environment in which `make` runs everything. The Makefile calls this; it needs Python 3.11 and no package.

    environment.py make            .venv here, with the tested versions: made, made again, or brought up to date
    environment.py check EXTRA …   an error that names what the Python running this lacks of an extra
    environment.py install         the tested versions, into the Python running this

Nothing that was begun and not ended passes for an environment: `.venv/complete` is written last, `.venv/unfinished`
first, and what could not be made is removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

VENV = Path(".venv")
PYTHON = VENV / "bin" / "python"
COMPLETE, UNFINISHED = VENV / "complete", VENV / "unfinished"
PROJECT, CONSTRAINTS = Path("pyproject.toml"), Path("constraints.txt")


class NotDone(Exception):
    """What could not be done, in a line."""


def make() -> None:
    """Bring .venv to the tested versions, one process at a time."""
    with open("Makefile") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another make is at it; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        if fresh():
            return
        began = time.monotonic()
        if VENV.exists() and not UNFINISHED.exists() and runs(PYTHON):
            update()
        else:
            make_anew()
        UNFINISHED.unlink()
        COMPLETE.touch()
        say(f"complete after {time.monotonic() - began:.0f} s")


def fresh() -> bool:
    sources = [PROJECT, CONSTRAINTS, PYTHON]
    if UNFINISHED.exists() or not all(path.exists() for path in (COMPLETE, *sources)):
        return False
    return COMPLETE.stat().st_mtime >= max(path.stat().st_mtime for path in sources)


def make_anew() -> None:
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        raise NotDone(f"{sys.executable} comes without venv; install that (Debian, Ubuntu: apt install python3-venv)")
    again = " again, since it is not whole," if VENV.exists() else ""
    say(
        f"making it{again} with Python {platform.python_version()}: {pinned('torch')}, then the rest at the versions "
        f"of {CONSTRAINTS}; this takes minutes, once"
    )
    try:
        remove()
        VENV.mkdir()
        UNFINISHED.touch()
        run([sys.executable, "-m", "venv", str(VENV)], "python -m venv")
        install(PYTHON, extra_environment={"PIP_USER": "0"})
    except BaseException:
        remove()
        raise


def update() -> None:
    """Install into what is there. Where pip fails before it has changed anything, that is still what it was."""
    say(f"bringing it to what {PROJECT} and {CONSTRAINTS} say")
    before = packages()
    UNFINISHED.touch()
    try:
        install(PYTHON, extra_environment={"PIP_USER": "0"})
    except NotDone as error:
        if packages() != before:
            raise
        UNFINISHED.unlink()
        raise NotDone(f"{error} It is what it was; PYTHON={PYTHON} uses it as it is") from None


def packages() -> list[str]:
    return sorted(str(path) for path in VENV.glob("lib/*/site-packages/*"))


def remove() -> None:
    if VENV.is_symlink():  # to an environment elsewhere, which is not ours to remove
        VENV.unlink()
    elif VENV.exists():
        UNFINISHED.touch()  # and it goes last, so that what an interruption leaves is told from an environment
        for entry in VENV.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry != UNFINISHED:
                entry.unlink()
        shutil.rmtree(VENV)


def install(python: Path, *, extra_environment: dict[str, str] | None = None) -> None:
    """torch first, so that whatever is built against it finds it; then everything, under the constraints."""
    # The checkout on PYTHONPATH would pass for an installed package.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | (extra_environment or {})
    # Most modules of torch and transformers are never imported, so each is compiled when it first is.
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-compile"]
    pip += [] if sys.stdout.isatty() else ["--quiet"]
    run([*pip, pinned("torch")], f"pip install {pinned('torch')}", environment)
    rest = ["--constraint", str(CONSTRAINTS), "--editable", ".[dev]"]
    run([*pip, *rest], f"pip install {shlex.join(rest)}", environment)


def run(words: list[str], name: str, environment: dict[str, str] | None = None) -> None:
    # A group of its own, so that an interruption ends what the program has started, too, before its files are removed.
    process = subprocess.Popen(words, env=environment, start_new_session=True)
    try:
        code = process.wait()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):  # it may have ended by itself meanwhile
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    if code:
        raise NotDone(f"`{name}` failed with exit code {code}; its own message is above.")


def runs(python: Path) -> bool:
    """Whether it starts: the Python that an environment was made from may be gone."""
    try:
        return subprocess.run([python, "-c", ""], check=False).returncode == 0
    except OSError:
        return False


def pinned(package: str) -> str:
    """`package==version`, as the constraints have it."""
    return next(line for line in CONSTRAINTS.read_text().split() if line.startswith(f"{package}=="))


def check(*extras: str) -> None:
    lacking = [line for line in requirements(None, *extras) if not installed(line)]
    if lacking:
        raise NotDone(
            f"{sys.executable} lacks {', '.join(lacking)}; install them there (make install "
            f"PYTHON={shlex.quote(sys.executable)}), or let make use a .venv of its own: no PYTHON=, nothing activated"
        )


def requirements(*extras: str | None) -> Iterator[str]:
    """What pyproject.toml asks for in the core (None) and in extras, those that an extra takes in among them."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    for extra in extras:
        for line in project["dependencies"] if extra is None else project["optional-dependencies"][extra]:
            own = re.match(rf"{project['name']}\[(.*)\]", line)
            yield from requirements(*own[1].split(",")) if own else [line]


def installed(requirement: str) -> bool:
    name, wanted = re.match(r"([\w.-]+)(.*)", requirement).groups()  # type: ignore[union-attr]
    try:
        found = version(name)
    except PackageNotFoundError:
        return False
    if importlib.util.find_spec("packaging") is None:  # transformers brings it along, and is itself missing
        return True
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(found, prereleases=True)


def say(text: str) -> None:
    print(f"{VENV}: {text}", flush=True)


def main(words: list[str]) -> None:
    os.chdir(Path(__file__).resolve().parents[1])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it is cleaned up after
    command, *arguments = words
    try:
        if command == "make":
            make()
        elif command == "check":
            check(*arguments)
        else:
            install(Path(sys.executable))
    except (NotDone, OSError) as error:
        sys.exit(f"{VENV if command == 'make' else 'make'}: not done: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{VENV if command == 'make' else 'make'}: interrupted")


if __name__ == "__main__":
    main(sys.argv[1:])
