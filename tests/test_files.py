"""Text files: whole or not at all, and nothing but a regular file is replaced."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ropemods.settings.files import check_writable, read_text, write_text


def test_a_file_is_replaced_whole_and_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    assert write_text(path, "one") == path
    os.chmod(path, 0o640)
    inode = path.stat().st_ino
    write_text(path, "two")
    assert path.read_text() == "two" and path.stat().st_ino != inode
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["report.json"]


def test_a_new_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    path = write_text(tmp_path / "report.json", "one")
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("there", [True, False])
def test_a_symlink_stays_and_what_it_points_to_is_written(tmp_path: Path, there: bool) -> None:
    (tmp_path / "far").mkdir()
    target = tmp_path / "far" / "report.json"
    if there:
        target.write_text("old")
    for name, where in (("near.json", "far/report.json"), ("link.json", "near.json")):
        (tmp_path / name).symlink_to(where)
    write_text(tmp_path / "link.json", "new")
    assert target.read_text() == "new" and not target.is_symlink()
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "near.json").is_symlink()


def test_a_symlink_in_a_circle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="lead in a circle"):
        write_text(tmp_path / "a", "text")


def test_a_device_stays_a_device() -> None:
    write_text("/dev/null", "text")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_pipe_is_written_into(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_text(pipe, "text")
    reader.join(timeout=20)
    assert read == ["text"] and stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
@pytest.mark.parametrize("into", ["file", "pipe"])
def test_standard_output_takes_the_text_in_its_place(tmp_path: Path, name: str, into: str) -> None:
    if not os.path.exists(name):
        pytest.skip(f"there is no {name} here")
    program = (
        "from ropemods.settings.files import write_text; "
        f"print('before'); write_text({name!r}, 'text\\n'); print('after')"
    )
    if into == "pipe":
        found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    else:
        with open(tmp_path / "out", "w") as file:
            subprocess.run([sys.executable, "-c", program], stdout=file, check=True)
        found = (tmp_path / "out").read_text()
    assert found == "before\ntext\nafter\n"


def test_what_cannot_be_written_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        check_writable(tmp_path)
    with pytest.raises(FileNotFoundError, match="Create it first"):
        check_writable(tmp_path / "no" / "report.json")
    (tmp_path / "closed").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # tests may run as root, who may do all
    with pytest.raises(PermissionError, match="may not be written to"):
        check_writable(tmp_path / "closed")
    with pytest.raises(PermissionError, match="nothing may be written into"):
        check_writable(tmp_path / "new")
    assert os.listdir(tmp_path) == ["closed"]


def test_another_encoding_is_told_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a.yaml: not UTF-8 text .byte 0xe9 at 3"):
        read_text(tmp_path / "a.yaml")
