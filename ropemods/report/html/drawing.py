"""Line charts as one SVG file: panels below one another, one legend, colours of light and dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ropemods.report.html.axes import WIDTH
from ropemods.report.html.charts import HEIGHT, Series, lines
from ropemods.report.html.markup import Markup, element, trusted
from ropemods.report.html.style import DRAWINGS, PALETTE

LOOKS = tuple(f"arm{index}" for index in range(6))


def drawing(
    panels: Mapping[str, Sequence[Series]], *, x_label: str, y_label: str, description: str, percent: bool = False
) -> str:
    """An SVG file with a panel for each title; series of one name share a look."""
    names = dict.fromkeys((series.name, series.look) for some in panels.values() for series in some)
    keys = [part for n, (name, look) in enumerate(names) for part in _key(name, look, 16 + 18.0 * n)]
    top = 18.0 * len(names) + 12
    step = HEIGHT + 34
    drawn = []
    for n, (title, some) in enumerate(panels.items()):
        chart = lines(some, title=title, x_label=x_label, y_label=y_label, percent=percent)
        # The chart is a picture of its own; inside this one it needs a size and a place.
        sized = trusted(chart.replace("<svg ", f'<svg y="18" width="{WIDTH:g}" height="{HEIGHT:g}" ', 1))
        heading = element("text", title, x=2, y=12, class_="title")
        drawn.append(element("g", [heading, sized], transform=f"translate(0 {top + step * n:g})"))
    height = top + step * len(panels)
    style = PALETTE + DRAWINGS + "svg .title { font-size: 12.5px; font-weight: 600; }"
    whole = element(
        "svg",
        element("style", trusted(style)),
        element("rect", width=WIDTH, height=height, fill="var(--paper)"),
        keys,
        drawn,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH:g} {height:g}",
        width=WIDTH,
        height=height,
        role="img",
        aria_label=description,
    )
    return f"{whole}\n"


def _key(name: str, look: str, y: float) -> list[Markup]:
    return [
        element("line", x1=4, x2=30, y1=y - 4, y2=y - 4, class_=f"line {look}"),
        element("text", name, x=38, y=y, class_="label"),
    ]
