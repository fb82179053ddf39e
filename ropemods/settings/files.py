"""Text files of users: written whole or not at all, read with errors that name the file.

The text goes to a temporary file in the same folder, is flushed to disk and then renamed over the target in one step. A
run that is interrupted, or a full disk, leaves the old file as it was, and a new one has its permissions.

Only a regular file is replaced. A symlink is followed and what it points to is written; a device, a pipe or a file that
a process holds open (/dev/null, /dev/stdout, a FIFO) is written into, for a rename would put a file in its place.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import sys
from pathlib import Path

OPEN_FILE = re.compile(r"/dev/fd/(\d+)|/proc/self/fd/(\d+)")
"""Paths of what this process has open already, by its number."""


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write `text` to `path` as UTF-8 and return the path. The folder must exist."""
    target = check_writable(path)
    if (opened := _descriptor(target)) is not None:
        sys.stdout.flush()  # what was printed before comes before
        with open(os.dup(opened), "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
    elif target.exists() and not target.is_file():
        with open(target, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
    else:
        _replace(target, text)
    return Path(path)


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file, a byte order mark left out."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from None


def not_utf8(path: object, error: UnicodeDecodeError) -> ValueError:
    """What to raise for a file in another encoding."""
    found = f"byte 0x{error.object[error.start]:02x} at {error.start}"
    return ValueError(f"{path}: not UTF-8 text ({found}). Convert it, as by iconv -t utf-8, or check the file")


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Where a text for `path` goes, symlinks followed; an error where it cannot go, before any work is done for it."""
    target = _followed(path)
    if target.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder. Name a file in it.")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: the folder {target.parent} does not exist. Create it first.")
    regular = target.is_file() and _descriptor(target) is None
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(
            f"cannot write {path}: it may not be written to. Change its permissions, or write elsewhere."
        )
    if (regular or not target.exists()) and not os.access(target.parent, os.W_OK):
        raise PermissionError(f"cannot write {path}: nothing may be written into {target.parent}. Write elsewhere.")
    return target


def _followed(path: str | os.PathLike[str]) -> Path:
    """`path` with its symlinks followed, but for those that stand for open files: what they point to is no path."""
    target = Path(path)
    for _ in range(40):
        if _descriptor(target) is not None or not target.is_symlink():
            return target
        target = target.parent / os.readlink(target)
    raise OSError(errno.ELOOP, f"cannot write {path}: its symlinks lead in a circle")


def _descriptor(target: Path) -> int | None:
    found = OPEN_FILE.fullmatch(os.path.normpath(target))
    return None if found is None else int(found[1] or found[2])


def _replace(target: Path, text: str) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            if target.exists():
                _like(temporary, target.stat())
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _like(file: Path, before: os.stat_result) -> None:
    """Permissions of the file that is replaced, and its owner where that may be set."""
    with contextlib.suppress(OSError, AttributeError):
        os.chown(file, before.st_uid, before.st_gid)
    os.chmod(file, stat.S_IMODE(before.st_mode))
