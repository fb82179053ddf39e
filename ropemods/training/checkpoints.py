"""Checkpoints that can be trusted: a run resumes from the last one that was written to its end.

A checkpoint is a folder of many files, written by several ranks, and a run may be killed or the disk fill up half way.
So once every rank has written its part, a file `complete.json` is put into it in one step; a folder without that file
is not a checkpoint. Older ones are deleted only after that, so at every moment the newest complete one is there.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ropemods.settings.files import write_text

COMPLETE = "complete.json"


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted((path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")), key=step_of)


def last_complete(folder: Path) -> Path | None:
    found = complete(folder)
    return found[-1] if found else None


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def discard_incomplete(folder: Path) -> list[Path]:
    """Delete what an interrupted save left, so that nothing of it mixes with what is written there next."""
    torn = [
        path
        for path in folder.glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", path.name) and not (path / COMPLETE).is_file()
    ]
    for path in torn:
        shutil.rmtree(path)
    return torn


def read(checkpoint: Path) -> dict[str, Any]:
    """What `complete.json` says of the run."""
    said: dict[str, Any] = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))
    return said


class CompleteCheckpoints(TrainerCallback):
    """Mark each checkpoint as complete, then delete all but the newest `keep` (None keeps all).

    The Trainer's own `save_total_limit` must be off: it deletes the old before the new can be known to be complete.
    `facts` go into the mark and are what a resumed run is checked against.
    """

    def __init__(self, *, keep: int | None, facts: dict[str, Any]) -> None:
        if keep is not None and keep < 1:
            raise ValueError(f"save_total_limit={keep}: keep at least 1 checkpoint")
        self.keep, self.facts = keep, facts
        self.seconds_before = 0.0
        """Training time of the runs that this one continues."""
        self._began = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.save_total_limit is not None:
            raise ValueError("CompleteCheckpoints deletes checkpoints itself; set args.save_total_limit to None")
        self._began = time.monotonic()

    def seconds(self) -> float:
        """Training time so far, earlier runs included."""
        return self.seconds_before + time.monotonic() - self._began

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if dist.is_initialized():
            dist.barrier()  # every rank has written its part
        if not state.is_world_process_zero:
            return
        folder = Path(str(args.output_dir))
        mark = {"step": state.global_step, "seconds": self.seconds(), "world_size": args.world_size, **self.facts}
        write_text(folder / f"checkpoint-{state.global_step}" / COMPLETE, json.dumps(mark, indent=2) + "\n")
        if self.keep is not None:
            for old in complete(folder)[: -self.keep]:
                if str(old) != state.best_model_checkpoint:
                    # The mark goes first: what is half deleted must not look whole.
                    (old / COMPLETE).unlink()
                    shutil.rmtree(old)
