"""What a survey found, as a Markdown table and as a plot of ratio against length."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ropemods.bench.subjects import KINDS
from ropemods.bench.survey import Row
from ropemods.pages.axes import WIDTH
from ropemods.pages.charts import HEIGHT, Series, lines
from ropemods.pages.markup import Markup, element, trusted
from ropemods.pages.style import DRAWINGS, PALETTE
from ropemods.wording import markdown_table

KIND_NAME = {"forward": "forward", "training": "forward + backward", "decode": "decode, one query"}
LOOKS = tuple(f"arm{index}" for index in range(6))


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
    if page.count(START) != 1 or page.count(END) != 1 or page.index(START) > page.index(END):
        raise ValueError(f"the page must have the lines {START} and {END} once each, with the table's place between")
    return page[: page.index(START) + len(START)] + "\n" + table(rows) + "\n" + page[page.index(END) :]


def plot(rows: Sequence[Row]) -> Markup:
    """A panel for each kind and shape but its length, a line for each subject on the first path; an SVG file."""
    panels: list[list[Markup]] = []
    rows = _drawn(rows)
    names = list(dict.fromkeys(row.subject for row in rows))[: len(LOOKS)]
    for kind in KINDS:
        shapes = dict.fromkeys(dataclasses.replace(row.shape, length=1) for row in rows if row.kind == kind)
        for shape in shapes:
            here = [r for r in rows if r.kind == kind and dataclasses.replace(r.shape, length=1) == shape]
            panels.append(_panel(f"{KIND_NAME[kind]}, {_said(here[0])}", here, names))
    top = 18.0 * len(names) + 12
    step = HEIGHT + 34
    height = top + step * len(panels)
    keys = [part for n, name in enumerate(names) for part in _key(name, LOOKS[n], 16 + 18.0 * n)]
    moved = [element("g", panel, transform=f"translate(0 {top + step * n:g})") for n, panel in enumerate(panels)]
    style = PALETTE + DRAWINGS + "svg .title { font-size: 12.5px; font-weight: 600; }"
    return element(
        "svg",
        element("style", trusted(style)),
        element("rect", width=WIDTH, height=height, fill="var(--paper)"),
        keys,
        moved,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH:g} {height:g}",
        width=WIDTH,
        height=height,
        role="img",
        aria_label="Time of modified attention over that of stock attention, by length.",
    )


def _drawn(rows: Sequence[Row]) -> list[Row]:
    """Those of one path: several lines a subject would be too many."""
    first = next((row.path for row in rows), None)
    return [row for row in rows if row.path == first]


def _said(row: Row) -> str:
    shape = row.shape
    return f"D = {shape.head_dim}, {shape.heads}:{shape.heads // shape.group_ratio} heads, {shape.dtype}"


def _panel(title: str, rows: Sequence[Row], names: Sequence[str]) -> list[Markup]:
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
    if not series:
        return []
    drawn = lines(series, title=title, x_label="T", y_label="time, stock = 1")
    # The chart is a picture of its own; inside this one it needs a size and a place.
    sized = trusted(drawn.replace("<svg ", f'<svg y="18" width="{WIDTH:g}" height="{HEIGHT:g}" ', 1))
    return [element("text", title, x=2, y=12, class_="title"), sized]


def _key(name: str, look: str, y: float) -> list[Markup]:
    return [
        element("line", x1=4, x2=30, y1=y - 4, y2=y - 4, class_=f"line {look}"),
        element("text", name, x=38, y=y, class_="label"),
    ]
