"""`make release-check`: what is to be released, built, and used as a stranger would who has nothing but it.

    python tests/release/check.py                # the core and every extra, each in an empty environment
    python tests/release/check.py core gguf      # these alone

Wheel and sdist are built (the wheel from the sdist), held to `twine check --strict` and looked into. Then, for each, an
environment with torch and the wheel, away from this checkout: the command line answers, `user_program.py` runs and has
types under `mypy --strict`, and `smoke.py` uses what the extra adds. The sdist is installed into one as well.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
EXTRAS = ("core", "train", "deepspeed", "gguf", "trl", "eval")
IN_SDIST = {
    "LICENSE",
    "CHANGELOG.md",
    "README.md",
    "Makefile",
    "constraints.txt",
    "tests",
    "evals",
    "recipes",
    "ropemods",
}


def run(*words: object, cwd: Path) -> None:
    began = time.monotonic()
    alone = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([str(word) for word in words], cwd=cwd, env=alone, capture_output=True, text=True)
    short = " ".join(Path(str(word)).name or str(word) for word in words)
    print(f"{time.monotonic() - began:6.1f} s  {short}", flush=True)
    if done.returncode:
        sys.exit(f"{short}: exit code {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")


def environment(folder: Path) -> Path:
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


def pip(python: Path, *words: object, cwd: Path) -> None:
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *words, cwd=cwd)


def built(work: Path) -> tuple[Path, Path]:
    """The wheel and the sdist, held to what each must have in it."""
    python = environment(work / "build")
    pip(python, "build", "twine", cwd=work)
    run(python, "-m", "build", "--outdir", work / "dist", REPOSITORY, cwd=work)
    (wheel,), (sdist,) = (work / "dist").glob("*.whl"), (work / "dist").glob("*.tar.gz")
    run(python, "-m", "twine", "check", "--strict", wheel, sdist, cwd=work)
    with zipfile.ZipFile(wheel) as archive:
        inside = {name.split("/")[0] for name in archive.namelist()}
        assert {name.split("-")[0] for name in inside} == {"ropemods"}, f"{wheel.name} holds {inside}"
        assert "ropemods/py.typed" in archive.namelist()
    with tarfile.open(sdist) as archive_:
        inside = {name.split("/")[1] for name in archive_.getnames() if "/" in name}
        assert inside >= IN_SDIST, f"{sdist.name} lacks {IN_SDIST - inside}"
    return wheel, sdist


def tried(extra: str, package: Path, work: Path, torch: Path) -> None:
    """An extra of the package, or the core, in an environment that had nothing but torch."""
    print(f"{extra}, from {package.name}", flush=True)
    folder = work / f"{extra}{package.suffix}"
    python = environment(folder / "environment")
    (site,) = (folder / "environment").glob("lib/python*/site-packages")
    (site / "torch.pth").write_text(f"{torch}\n")
    pins = ("--constraint", REPOSITORY / "constraints.txt")
    pip(python, *pins, package if extra == "core" else f"{package}[{extra}]", cwd=folder)
    for name in ("user_program.py", "smoke.py"):
        shutil.copy(Path(__file__).with_name(name), folder)
    shutil.copy(REPOSITORY / "tests" / "gguf_files.py", folder)
    command = python.with_name("ropemods")
    run(command, "--version", cwd=folder)
    run(command, "doctor", cwd=folder)
    (folder / "out").mkdir()
    run(python, "user_program.py", "out", cwd=folder)
    if extra != "core":
        run(python, "smoke.py", extra, "out", cwd=folder)
    else:
        pip(python, "mypy", cwd=folder)
        run(python, "-m", "mypy", "--strict", "--config-file=", "user_program.py", cwd=folder)


def main(extras: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        wheel, sdist = built(work)
        torch = work / "torch"  # for all of them, since it is most of what is installed
        pip(
            work / "build" / "bin" / "python",
            "--target",
            torch,
            next(pin for pin in (REPOSITORY / "constraints.txt").read_text().split() if pin.startswith("torch==")),
            cwd=work,
        )
        for extra in extras or EXTRAS:
            tried(extra, wheel, work, torch)
        if not extras:
            tried("core", sdist, work, torch)


if __name__ == "__main__":
    main(sys.argv[1:])
