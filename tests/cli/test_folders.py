"""OUTPUT is written whole or not at all, and what stood there is not lost."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError
from transformers import PreTrainedModel

from tests.cli.program import hidden, refused, run, start


def test_a_folder_with_something_in_it_is_left_alone_unless_told(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("apply model out --mods truncated_rope")
    before = (here / "out" / "config.json").read_text()
    assert "is not empty; choose another folder, or replace it with --overwrite" in refused(
        "apply model out --mods learned_sink", capsys
    )
    assert (here / "out" / "config.json").read_text() == before
    (here / "out" / "stale.txt").touch()
    run("apply model out --mods learned_sink --overwrite")
    assert (here / "out" / "config.json").read_text() != before
    assert not (here / "out" / "stale.txt").exists()
    assert hidden(here) == []


@pytest.mark.parametrize(
    ("inside", "says"), [("thesis.tex", "holds no config.json"), ("runs/1.json", "holds folders (runs)")]
)
def test_overwrite_replaces_only_checkpoints(
    here: Path, capsys: pytest.CaptureFixture[str], inside: str, says: str
) -> None:
    mine = here / "out" / inside
    mine.parent.mkdir(parents=True)
    mine.touch()
    if mine.parent != here / "out":
        (here / "out" / "config.json").touch()  # a checkpoint, with more than a checkpoint in it
    assert says in refused("apply model out --mods learned_sink --overwrite", capsys)
    assert mine.exists()


@pytest.mark.parametrize("failing", ["saving", "renaming"])
def test_a_write_that_fails_leaves_what_was_there(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    run("apply model out --mods truncated_rope")
    before = {path.name: path.read_bytes() for path in (here / "out").iterdir()}

    def half(self: PreTrainedModel, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    replace = os.replace

    def refusing(source: Path, target: Path) -> None:
        if str(source).endswith(".tmp") and Path(source).is_dir():
            raise OSError(5, "Input/output error")
        replace(source, target)

    if failing == "saving":
        monkeypatch.setattr(PreTrainedModel, "save_pretrained", half)
    else:
        monkeypatch.setattr(os, "replace", refusing)
    assert "error" in refused("apply model out --mods learned_sink --overwrite", capsys)
    assert "error" in refused("apply model new --mods learned_sink", capsys)
    assert {path.name: path.read_bytes() for path in (here / "out").iterdir()} == before
    assert sorted(entry.name for entry in here.iterdir()) == ["model", "out"]


@pytest.mark.parametrize("line", ["apply model out --mods learned_sink", "export modified out"])
def test_no_room_on_the_disk_is_said_before_anything_is_written(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    run("apply model modified --mods truncated_rope")
    size = sum(file.stat().st_size for file in (here / "model").glob("*.safetensors"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size // 2))
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", lambda *_, **__: pytest.fail("it was written"))
    message = refused(line, capsys)
    assert re.search(r"there is no room for OUTPUT .*out: it takes [\d.]+ MB, and its disk has [\d.]+ MB free", message)
    assert sorted(entry.name for entry in here.iterdir()) == ["model", "modified"]


def test_a_disk_that_fills_up_while_weights_are_written_is_told_in_a_line(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: PreTrainedModel, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    message = refused("apply model out --mods learned_sink", capsys)
    assert "out could not be written (" in message and "No space left on device" in message
    assert [entry.name for entry in here.iterdir()] == ["model"]


STUCK = """
import pathlib, runpy, signal, time
from transformers import PreTrainedModel

def save_pretrained(self, folder, **kwargs):
    pathlib.Path(folder, "model.safetensors").write_bytes(b"half")
    time.sleep(60)

PreTrainedModel.save_pretrained = save_pretrained
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background hands down its being ignored
runpy.run_module("ropemods.cli", run_name="__main__")
"""
"""The program, with a disk so slow that a signal surely comes while it writes."""


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_apply_leaves_nothing(here: Path, signum: signal.Signals) -> None:
    process = start("apply", "model", "out", "--mods", "learned_sink", program=[sys.executable, "-c", STUCK])
    while not any((here / folder / "model.safetensors").exists() for folder in hidden(here)):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.01)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "ropemods apply: interrupted"
    assert [entry.name for entry in here.iterdir()] == ["model"]
