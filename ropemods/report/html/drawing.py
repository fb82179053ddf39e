"""Charts as one SVG file: panels with their titles, one legend, colours of light and dark."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from ropemods.report.html.axes import WIDTH
from ropemods.report.html.charts import Series, lines
from ropemods.report.html.markup import Markup, element, join, trusted
from ropemods.report.html.style import DRAWINGS, PALETTE

LOOKS = tuple(f"arm{index}" for index in range(6))
_TITLE = "svg .title { font-size: 12.5px; font-weight: 600; }"


def drawing(
    panels: Mapping[str, Sequence[Series]], *, x_label: str, y_label: str, description: str, percent: bool = False
) -> str:
    """An SVG file with a panel for each title; series of one name share a look."""
    names = dict.fromkeys((series.name, series.look) for some in panels.values() for series in some)
    charts = {
        title: [lines(some, title=title, x_label=x_label, y_label=y_label, percent=percent)]
        for title, some in panels.items()
    }
    return f"{in_one(charts, legend=names, description=description, style=PALETTE + DRAWINGS + _TITLE)}\n"


def in_one(
    panels: Mapping[str, Sequence[str]],
    *,
    legend: Iterable[tuple[str, str]],
    description: str,
    style: str,
    columns: int = 1,
    class_: str | None = None,
) -> Markup:
    """Panels in one drawing: by title, drawings that stand below one another. `legend` gives names and looks."""
    keys = [join(*_key(name, look, 16 + 18.0 * n)) for n, (name, look) in enumerate(legend)]
    y, rows = 18.0 * len(keys) + 12, list(panels.items())
    drawn = []
    for first in range(0, len(rows), columns):
        ends = []
        for column, (title, charts) in enumerate(rows[first : first + columns]):
            below, parts = 18.0, [element("text", title, x=2, y=12, class_="title")]
            for chart in charts:
                height = float(re.search(r'viewBox="0 0 \S+ (\S+)"', chart)[1])  # type: ignore[index]
                # The chart is a picture of its own; inside this one it needs a place and a size.
                sized = f'<svg y="{below:g}" width="{WIDTH:g}" height="{height:g}" '
                parts.append(trusted(chart.replace("<svg ", sized, 1)))
                below += height
            drawn.append(element("g", parts, transform=f"translate({column * (WIDTH + 24):g} {y:g})"))
            ends.append(below + 16)
        y += max(ends)
    width = min(columns, len(rows)) * (WIDTH + 24) - 24
    return element(
        "svg",
        element("style", trusted(style)),
        element("rect", width=width, height=y, fill="var(--paper)"),
        keys,
        drawn,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width:g} {y:g}",
        width=width,
        height=y,
        class_=class_,
        role="img",
        aria_label=description,
    )


def _key(name: str, look: str, y: float) -> list[Markup]:
    return [
        element("line", x1=4, x2=30, y1=y - 4, y2=y - 4, class_=f"line {look}"),
        element("text", name, x=38, y=y, class_="label"),
    ]
