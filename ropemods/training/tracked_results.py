"""What trackers are told at the end of a session: the table of all arms, and the comparison with its figures.

It is a run of its own beside those of the arms (`tracked_arm.py`). wandb and trackio take the page as it is;
tensorboard shows Markdown and pixels, so there the comparison is its tables, and the heads' leakage an image for each
arm.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ropemods.report.comparison import Comparison
from ropemods.report.records import Grid
from ropemods.report.words import number
from ropemods.training.arms import ArmResult
from ropemods.training.reporters import reporters
from ropemods.training.session import Session
from ropemods.training.tracked_arm import group, new_run_name, open_wandb, project, scalars, tensorboard_folder

CELL = 24
"""Pixels of a head's side."""

CURVES = {"early residual": "early_residual", "early total": "early_total", "mask": "mask", "residual": "residual"}
"""Shown by tensorboard with the intervals around them."""


def report_results(session: Session, results: list[ArmResult], table: str, compared: Mapping[str, Comparison]) -> None:
    """Tell tensorboard, wandb and trackio, where the recipe reports to them. `compared` is by the name of its files."""
    named = {reporter.__name__ for reporter in reporters(session.recipe.training.get("report_to"))}
    rows = [
        {"arm": result.name, **{name.removeprefix("eval_"): value for name, value in found.items()}}
        for result in results
        if (found := scalars(result.loss, result.read_report(session.folder)))
    ]
    pages = {name: session.folder / f"{name}.html" for name in compared}
    if "TensorBoardCallback" in named:
        _to_tensorboard(session, table, compared)
    if "WandbCallback" in named:
        _to_wandb(session, rows, pages)
    if "TrackioCallback" in named:
        _to_trackio(session, rows, table, pages)


def _to_tensorboard(session: Session, table: str, compared: Mapping[str, Comparison]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tensorboard_folder(session, "comparison"))) as writer:
        writer.add_text("arms", table, session.steps)
        for name, comparison in compared.items():
            writer.add_text(name, comparison.to_markdown(), session.steps)
            for told, image_HWC in _images(comparison).items():
                writer.add_image(f"{name}/{told}", image_HWC, session.steps, dataformats="HWC")
        layout = {
            f"{part}, with its interval": {
                shown: ["Margin", [f"{section}/{key}{end}" for end in ("", "_low", "_high")]]
                for shown, key in CURVES.items()
                if section == "eval" or key == "early_residual"
            }
            for part, section in (("before and after", "eval"), ("while training", "train"))
        }
        writer.add_custom_scalars(layout)


def _to_wandb(session: Session, rows: list[dict[str, Any]], pages: Mapping[str, Path]) -> None:
    import wandb

    mine = open_wandb(session, new_run_name(session, "comparison"), config={})
    columns = list(dict.fromkeys(key for row in rows for key in row))
    arms = wandb.Table(columns=columns, data=[[row.get(key) for key in columns] for row in rows])
    try:
        wandb.log({"arms": arms, **{name: wandb.Html(path.read_text("utf-8")) for name, path in pages.items()}})
    finally:
        if mine is not None:
            wandb.finish()


def _to_trackio(session: Session, rows: list[dict[str, Any]], table: str, pages: Mapping[str, Path]) -> None:
    import trackio

    training = session.recipe.training
    trackio.init(
        project=project(session),
        name=new_run_name(session, "comparison"),
        group=group(session),
        space_id=training.get("trackio_space_id"),
        bucket_id=training.get("trackio_bucket_id"),
        private=training.get("hub_private_repo"),
    )
    try:
        trackio.log(
            {
                "arms": trackio.Table(data=rows),
                "table": trackio.Markdown(table),
                **{name: trackio.Html(path.read_text("utf-8")) for name, path in pages.items()},
            }
        )
    finally:
        trackio.finish()


def _images(comparison: Comparison) -> dict[str, npt.NDArray[np.uint8]]:
    """The early residual of every head, an image an arm, on one scale; its name says which."""
    from ropemods.report.html.colour import Shade, shared_limit

    grids = {name: report.terms["residual"].heads.early for name, report in comparison.arms.items() if report.terms}
    shade = Shade(limit=shared_limit(grids.values()))
    scale = f"layers down, heads across, 0 to {number(shade.limit)} nats²"
    return {f"early residual, {scale}/{name}": _pixels(grid, shade) for name, grid in grids.items()}


def _pixels(grid: Grid, shade: Any) -> npt.NDArray[np.uint8]:
    colours = [[list(bytes.fromhex(shade.colour(value)[1:])) for value in row] for row in grid]
    return np.array(colours, np.uint8).repeat(CELL, axis=0).repeat(CELL, axis=1)
