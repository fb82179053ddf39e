"""What a survey found, as a Markdown table and as a plot of ratio against length."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ropemods.bench.cases import KINDS
from ropemods.bench.grid import Row
from ropemods.report.html.charts import Series
from ropemods.report.html.drawing import LOOKS, drawing
from ropemods.report.words import markdown_table

KIND_NAME = {"forward": "forward", "training": "forward + backward", "decode": "decode, one query"}


def line(row: Row) -> tuple[str, ...]:
    ratio, shape = row.ratio, row.shape
    return (
        f"{row.subject} ({row.path})",
        KIND_NAME[row.kind],
        f"{shape.length}",
        f"{shape.head_dim}",
        f"{shape.heads}:{shape.heads // shape.group_ratio}",
        shape.dtype,
        f"{ratio.median:.2f}",
        f"{ratio.low:.2f} to {ratio.high:.2f}",
        "–" if row.floor is None else f"{row.floor:.2f}",
        f"{row.memory:.2f}",
    )


def table(rows: Sequence[Row]) -> str:
    """Every row; times and memory in units of stock attention's."""
    head = ("subject (path)", "kind", "T", "D", "heads", "dtype", "time", "min to max", "floor", "peak memory")
    return markdown_table(head, [line(row) for row in rows])


START, END = "<!-- table -->", "<!-- end of table -->"


def into_page(page: str, rows: Sequence[Row]) -> str:
    """The page with the table between its marks replaced."""
    return between(page, START, END, table(rows))


def between(page: str, start: str, end: str, text: str) -> str:
    """The page with what stands between two marks replaced."""
    if page.count(start) != 1 or page.count(end) != 1 or page.index(start) > page.index(end):
        raise ValueError(f"the page must have the lines {start} and {end} once each, with the table's place between")
    return page[: page.index(start) + len(start)] + "\n" + text + "\n" + page[page.index(end) :]


def plot(rows: Sequence[Row]) -> str:
    """A panel for each kind and shape but its length, a line for each subject on the first path; an SVG file."""
    rows = _drawn(rows)
    names = list(dict.fromkeys(row.subject for row in rows))[: len(LOOKS)]
    panels = {}
    for kind in KINDS:
        shapes = dict.fromkeys(dataclasses.replace(row.shape, length=1) for row in rows if row.kind == kind)
        for shape in shapes:
            here = [r for r in rows if r.kind == kind and dataclasses.replace(r.shape, length=1) == shape]
            panels[f"{KIND_NAME[kind]}, {_said(here[0])}"] = _series(here, names)
    described = "Time of modified attention over that of stock attention, by length."
    return drawing(panels, x_label="T", y_label="time, stock = 1", description=described)


def _drawn(rows: Sequence[Row]) -> list[Row]:
    """Those of one path: several lines a subject would be too many."""
    first = next((row.path for row in rows), None)
    return [row for row in rows if row.path == first]


def _said(row: Row) -> str:
    shape = row.shape
    return f"D = {shape.head_dim}, {shape.heads}:{shape.heads // shape.group_ratio} heads, {shape.dtype}"


def _series(rows: Sequence[Row], names: Sequence[str]) -> list[Series]:
    series = []
    for name, look in zip(names, LOOKS, strict=False):
        mine = sorted((r for r in rows if r.subject == name), key=lambda r: r.shape.length)
        if mine:
            series.append(
                Series(
                    name=name,
                    look=look,
                    xs=[r.shape.length for r in mine],
                    ys=[r.ratio.median for r in mine],
                    lows=[r.ratio.low for r in mine],
                    highs=[r.ratio.high for r in mine],
                )
            )
    return series
