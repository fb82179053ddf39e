"""Checkpoints: only whole ones count, and at every moment the newest whole one is there."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from ropemods.training.checkpoints import COMPLETE, CompleteCheckpoints, complete, discard_incomplete, last_complete
from tests.test_schedule import model, trainer

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 10}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def run(folder: Path, keep: int | None = None, **facts: Any) -> None:
    trainer(folder, model(), CompleteCheckpoints(keep=keep, facts=facts), **SAVING).train()


def test_each_checkpoint_is_marked_and_the_newest_are_kept(tmp_path: Path) -> None:
    run(tmp_path, keep=2, arm="modified")
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-8"]
    assert [path.name for path in complete(tmp_path)] == ["checkpoint-8", "checkpoint-10"]  # by step, not by letter
    assert '"arm": "modified"' in (tmp_path / "checkpoint-10" / COMPLETE).read_text()


@pytest.mark.parametrize("fails", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path, monkeypatch: Any, fails: str) -> None:
    callback = CompleteCheckpoints(keep=1, facts={})
    made = trainer(tmp_path, model(), callback, **SAVING)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    original = made._save_checkpoint

    def save(*args: Any) -> None:
        if made.state.global_step == 6:
            if fails == "model.safetensors":
                monkeypatch.setattr(made.model, "save_pretrained", full)
            elif fails == "optimizer.pt":
                monkeypatch.setattr(torch, "save", full)
            else:
                monkeypatch.setattr(made.state, "save_to_json", full)
        original(*args)

    made._save_checkpoint = save
    with pytest.raises(OSError, match="No space left"):
        made.train()
    monkeypatch.undo()
    last = last_complete(tmp_path)
    assert last is not None and last.name == "checkpoint-4"
    again = trainer(tmp_path, model(), **SAVING)
    again.train(resume_from_checkpoint=str(last))
    assert again.state.global_step == 10


def test_what_an_interrupted_save_left_is_discarded(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "checkpoint-10" / COMPLETE).unlink()
    (tmp_path / "checkpoint-best").mkdir()  # somebody else's
    assert [path.name for path in discard_incomplete(tmp_path)] == ["checkpoint-10"]
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-8", "checkpoint-best"]


def test_a_folder_without_checkpoints_has_no_last_one(tmp_path: Path) -> None:
    assert last_complete(tmp_path) is None and last_complete(tmp_path / "nowhere") is None


def test_the_trainers_own_rotation_must_be_off(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="save_total_limit"):
        trainer(tmp_path, model(), CompleteCheckpoints(keep=1, facts={}), save_total_limit=1).train()
    with pytest.raises(ValueError, match="at least 1"):
        CompleteCheckpoints(keep=0, facts={})
