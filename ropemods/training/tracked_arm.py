"""What trackers (tensorboard, wandb, trackio, whatever transformers reports to) are told of an arm: a run of its own.

In the run of a trained arm the same names stand before it and after it: `eval/early_residual` at step 0 is that of the
base, where it was measured first, and at the last step that of the trained model. `_low` and `_high` are the ends of
its interval. Between them are the training log and the probe, as `train/early_residual`, with its ends too.

The reporters are those of transformers. They are told of the end of training only after the arm was measured, since
some close their run then; and the runs are named here, because theirs would be of one name for all arms.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ropemods.report.changes import quantities
from ropemods.report.report import Report
from ropemods.settings.files import write_text
from ropemods.training import checkpoints
from ropemods.training.leakage_probe import LeakageProbe, with_ends
from ropemods.training.reporters import reporters
from ropemods.training.session import Session

PROJECT = "ropemods"
"""Of wandb and trackio, where neither the recipe (`project`) nor WANDB_PROJECT names another."""

NAME_FILE = "run_name.txt"
"""In an arm's folder, so that a resumed arm goes on in the run that it began."""


class TrackedArm(TrainerCallback):
    """A run of one arm in every tracker of the recipe. As a callback it goes behind those that add to a log."""

    def __init__(self, session: Session, name: str, folder: Path, before: Mapping[str, float]) -> None:
        self.session, self.arm, self.folder, self.before = session, name, folder, before
        self.reporters = [_made(each, self) for each in reporters(session.recipe.training.get("report_to"))]
        self.run_name = _run_name(session, name, folder) if self.reporters else ""
        self._heard: tuple[TrainingArguments, TrainerState, TrainerControl] | None = None
        self._wandb: Any = None
        self.probe: LeakageProbe | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.reporters:
            return
        args.run_name, args.project = self.run_name, project(self.session)
        if state.is_world_process_zero:
            self._wandb = _begin_wandb(self)
        self._heard = args, state, control
        self._tell("on_train_begin", **kwargs)
        start = {**self.before, **(self.probe.logged() if self.probe is not None else {})}
        if start and state.global_step == 0:
            self._tell("on_log", logs=start)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Nothing yet: the arm is measured first."""

    def measured(self, found: Mapping[str, float], model: nn.Module) -> None:
        """Log what was measured of the arm, at its last step."""
        if self.reporters and self._heard is None:  # it was not trained
            args = self.session.arguments(output_dir=str(self.folder))
            state = TrainerState(is_world_process_zero=self.session.first, is_local_process_zero=self.session.first)
            self.before = {}
            self.on_train_begin(args, state, TrainerControl(), model=model)
        self._tell("on_log", logs=dict(found))

    def close(self, model: nn.Module | None, *, failed: bool) -> None:
        """End the run everywhere."""
        try:
            self._tell("on_train_end", model=model)
        finally:
            if self._wandb is not None:
                self._wandb.finish(exit_code=int(failed))

    def _tell(self, event: str, **kwargs: Any) -> None:
        if self._heard is not None:
            for reporter in self.reporters:
                getattr(reporter, event)(*self._heard, **kwargs)


def _handed_on(event: str) -> Any:
    def on(self: TrackedArm, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._heard = (args, state, control) if self._heard is not None else None
        for reporter in self.reporters:
            getattr(reporter, event)(args, state, control, **kwargs)

    return on


for _event in (name for name in vars(TrainerCallback) if name.startswith("on_")):
    if _event not in vars(TrackedArm):
        setattr(TrackedArm, _event, _handed_on(_event))


@contextmanager
def tracked(session: Session, name: str, folder: Path, before: Mapping[str, float]) -> Iterator[TrackedArm]:
    """The runs of an arm, ended as failed where it fails, and not left open in any case."""
    run = TrackedArm(session, name, folder, before)
    try:
        yield run
    except BaseException:
        with suppress(Exception):  # what stopped the arm is told, not what a tracker then says
            run.close(None, failed=True)
        raise


def scalars(loss: float, report: Report | None) -> dict[str, float]:
    """What was measured of a model, by the names that trackers show."""
    found = {"eval_held_out_loss": loss}
    for (quantity, scope, layer), value in (quantities(report) if report is not None else {}).items():
        if layer is None:
            # The held-out loss is that of the rows; this one is of the crops on which leakage is measured.
            name = "crops_loss" if quantity == "held_out_loss" else quantity
            name = f"early_{name}" if scope == "early" else name
            found |= with_ends(f"eval_{name}", value.value, value.low, value.high)
    return found


def project(session: Session) -> str:
    return str(session.recipe.training.get("project", PROJECT))


def group(session: Session) -> str:
    """What the names of a session's runs begin with."""
    return str(session.recipe.training.get("run_name") or session.folder.resolve().name)


def tensorboard_folder(session: Session, name: str) -> Path:
    return session.folder / "tensorboard" / name


def new_run_name(session: Session, name: str) -> str:
    """Of its own for every run: trackio would go on with an earlier run of the same name."""
    return f"{group(session)}-{name}-{secrets.token_hex(3)}"


def _run_name(session: Session, arm: str, folder: Path) -> str:
    written = folder / NAME_FILE
    if session.recipe.options.resume_from_checkpoint and written.is_file():
        return written.read_text(encoding="utf-8").strip()
    name = new_run_name(session, arm)
    if session.first:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(written, f"{name}\n")
    return name


def _made(reporter: type[TrainerCallback], run: TrackedArm) -> TrainerCallback:
    if reporter.__name__ != "TensorBoardCallback" or not run.session.first:
        return reporter()
    from torch.utils.tensorboard import SummaryWriter

    start = checkpoints.last_complete(run.folder) if run.session.recipe.options.resume_from_checkpoint else None
    # A resumed arm hides what a killed one wrote behind the checkpoint, so that no curve runs back.
    beyond = None if start is None else checkpoints.step_of(start) + 1
    return reporter(SummaryWriter(str(tensorboard_folder(run.session, run.arm)), purge_step=beyond))


def _begin_wandb(run: TrackedArm) -> Any:
    """wandb with a run for this arm; None where it is not asked for, or a run is open that is not ours to close."""
    if not any(type(each).__name__ == "WandbCallback" for each in run.reporters):
        return None
    return open_wandb(
        run.session,
        run.run_name,
        id=re.sub(r"[^\w-]", "-", run.run_name),
        resume="allow" if run.session.recipe.options.resume_from_checkpoint else None,
        config={"arm": run.arm},
    )


def open_wandb(session: Session, name: str, *, config: Mapping[str, Any], **options: Any) -> Any:
    """wandb with a run of ours, to be finished; None where one is open already."""
    import wandb

    if wandb.run is not None:
        return None
    wandb.init(
        project=os.environ.get("WANDB_PROJECT", project(session)),
        group=os.environ.get("WANDB_RUN_GROUP", group(session)),
        name=name,
        config={**config, "recipe": session.recipe.to_json()},
        **options,
    )
    return wandb
