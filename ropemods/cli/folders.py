"""Write a folder or a file whole, or leave what was there.

Everything goes to a temporary sibling, which is renamed when it is complete. A run that fails or is interrupted leaves
nothing behind, and one for which there is no room on the disk does not begin to write.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from torch import nn


@contextlib.contextmanager
def new_folder(output: str, *, source: str, overwrite: bool) -> Iterator[Path]:
    """A folder to fill, which becomes `output` at the end. `source` is what it is made from and must not be in it."""
    target = Path(output).expanduser().resolve()
    _check(target, Path(source).expanduser().resolve(), overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    filling = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    filling.mkdir()
    try:
        yield filling
        _put(filling, target)
    except SafetensorError as error:
        raise OSError(f"OUTPUT {target} could not be written ({error}); nothing of it is left") from error
    finally:
        shutil.rmtree(filling, ignore_errors=True)


@contextlib.contextmanager
def new_file(output: str, *, like: str, overwrite: bool) -> Iterator[Path]:
    """The same for a file, of the format of `like`, from which it is made: their first four bytes say what they are."""
    target, source = Path(output).expanduser().resolve(), Path(like).expanduser().resolve()
    if target == source:
        raise ValueError(f"OUTPUT {target} is what is read; write to another file")
    if target.is_dir():
        raise ValueError(f"OUTPUT {target} is a folder; give a file")
    if target.exists():
        if not overwrite:
            raise ValueError(f"OUTPUT {target} exists; choose another file, or replace it with --overwrite")
        if _magic(target) != _magic(source):
            raise ValueError(
                f"OUTPUT {target} is a file of another format than {source}; --overwrite does not replace it"
            )
    target.parent.mkdir(parents=True, exist_ok=True)
    filling = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield filling
        os.replace(filling, target)
    finally:
        filling.unlink(missing_ok=True)


def _magic(file: Path) -> bytes:
    with open(file, "rb") as stream:
        return stream.read(4)


def check_room(folder: Path, output: str, model: nn.Module) -> None:
    """An error, before it is written, for a model that does not fit on the disk of `folder`."""
    tensors = [*model.parameters(), *model.buffers()]  # each once, however often it is tied
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"there is no room for OUTPUT {output}: it takes {needed / 1e6:.1f} MB, and its disk has "
            f"{free / 1e6:.1f} MB free; nothing was written"
        )


def _check(target: Path, source: Path, overwrite: bool) -> None:
    if source.exists() and (target == source or target in source.parents):
        raise ValueError(f"OUTPUT {target} holds what is read, {source}; write to another folder")
    if target.exists() and not target.is_dir():
        raise ValueError(f"OUTPUT {target} is a file; give a folder")
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"OUTPUT {target} is not empty; choose another folder, or replace it with --overwrite")
    # What is replaced is lost, so it must look like what this program writes.
    within = sorted(entry.name for entry in target.iterdir() if entry.is_dir())
    if within or not (target / "config.json").is_file():
        reason = f"holds folders ({', '.join(within)[:60]})" if within else "holds no config.json"
        raise ValueError(
            f"OUTPUT {target} {reason}, so it is more than a checkpoint and --overwrite does not replace it; choose "
            "another folder, or remove it yourself"
        )


def _put(filling: Path, target: Path) -> None:
    """Rename into place; a folder that stood there stays until the new one has its name."""
    if not target.exists() or not any(target.iterdir()):
        os.replace(filling, target)
        return
    old = filling.with_suffix(".old")
    os.replace(target, old)
    try:
        os.replace(filling, target)
    except BaseException:
        os.replace(old, target)
        raise
    shutil.rmtree(old)
