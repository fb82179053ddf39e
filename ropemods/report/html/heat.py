"""Heat maps of layers × heads (or × bins, × bands), and the colour bar that explains them.

All maps that are compared take one `Shade` limit, so equal colours are equal values; a difference
map takes the same limit on both sides of 0. Where cells are wide enough the value is written in
them, so nothing hangs on colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ropemods.report.html.axes import WIDTH, svg
from ropemods.report.html.colour import Shade, ink_on
from ropemods.report.html.markup import Markup, element, minus
from ropemods.report.words import NO_VALUE, decimals_for, number

MARGIN_LEFT, MARGIN_TOP = 34.0, 8.0


def heat_map(
    grid: Sequence[Sequence[float]],
    shade: Shade,
    *,
    title: str,
    columns: Sequence[str],
    x_label: str,
    show: Callable[[float], str] = number,
    inside: Callable[[float], str] | None = None,
    y_label: str = "layer",
) -> Markup:
    """Rows are layers from the top down. Each cell's tooltip names its row, column and value.

    `show` formats a value in words, `inside` within a cell: two significant digits by default.
    """
    count = max((len(row) for row in grid), default=1)
    cell = (WIDTH - MARGIN_LEFT - 4) / max(1, count)
    tall = min(28.0, max(6.0, cell))
    inside = inside or brief
    longest = max((len(inside(v)) for row in grid for v in row), default=0)
    written = cell >= 5.8 * longest + 5 and tall >= 18
    unit = x_label.split(",")[0]
    parts = []
    for layer, row in enumerate(grid):
        y = MARGIN_TOP + layer * tall
        for column, value in enumerate(row):
            x = MARGIN_LEFT + column * cell
            parts.append(_cell(value, shade, x, y, cell, tall, _told(layer, f"{unit} {columns[column]}", value, show)))
            if written and math.isfinite(value):
                middle = {"x": x + cell / 2, "y": y + tall / 2 + 3.4}
                ink = ink_on(shade.colour(value))
                parts.append(
                    element(
                        "text",
                        inside(value),
                        text_anchor="middle",
                        class_=f"value {ink}",
                        **middle,
                    )
                )
    bottom = MARGIN_TOP + tall * len(grid)
    for layer in _every(len(grid), math.ceil(14 / tall)):
        y = MARGIN_TOP + (layer + 0.5) * tall + 3.8
        parts.append(element("text", str(layer), x=MARGIN_LEFT - 5, y=y, text_anchor="end", class_="tick"))
    widest = max((len(c) for c in columns), default=1)
    for column in _every(count, math.ceil((6.6 * widest + 6) / cell)):
        x = MARGIN_LEFT + (column + 0.5) * cell
        parts.append(element("text", columns[column], x=x, y=bottom + 14, text_anchor="middle", class_="tick"))
    middle_x, middle_y = (MARGIN_LEFT + WIDTH) / 2, (MARGIN_TOP + bottom) / 2
    parts.append(element("text", x_label, x=middle_x, y=bottom + 29, text_anchor="middle", class_="label"))
    turn = f"rotate(-90 10 {middle_y:.1f})"
    parts.append(element("text", y_label, x=10, y=middle_y, text_anchor="middle", class_="label", transform=turn))
    spoken = f"{title}. {len(grid)} rows by {count} columns{_extremes(grid, [f'{unit} {c}' for c in columns], show)}"
    return svg(parts, height=bottom + 34, description=spoken)


def _cell(value: float, shade: Shade, x: float, y: float, width: float, height: float, told: str) -> Markup:
    place = {"x": x, "y": y, "width": width + 0.2, "height": height + 0.2}
    if not math.isfinite(value):
        return element("rect", element("title", minus(told)), class_="nothing", **place)
    return element("rect", element("title", minus(told)), fill=shade.colour(value), **place)


def brief(value: float) -> str:
    """Two significant digits, for inside a cell."""
    return minus(number(value, decimals=max(0, decimals_for(value) - 1)))


def _told(layer: int, column: str, value: float, show: Callable[[float], str]) -> str:
    return f"layer {layer}, {column}: {show(value) if math.isfinite(value) else NO_VALUE}"


def _extremes(grid: Sequence[Sequence[float]], columns: Sequence[str], show: Callable[[float], str]) -> str:
    cells = [
        (value, layer, columns[column])
        for layer, row in enumerate(grid)
        for column, value in enumerate(row)
        if math.isfinite(value)
    ]
    if not cells:
        return "; no values"
    (low, low_layer, low_column), (high, high_layer, high_column) = min(cells), max(cells)
    return (
        f"; smallest {show(low)} at layer {low_layer}, {low_column}; "
        f"largest {show(high)} at layer {high_layer}, {high_column}"
    )


def _every(count: int, least: int) -> range:
    """Indices at a round stride of at least `least`."""
    stride = next((s for s in (1, 2, 4, 8, 16, 32) if s >= least), least)
    return range(0, count, stride)


def colour_bar(shade: Shade, *, title: str, show: Callable[[float], str] = number) -> Markup:
    """The scale of a shade: a strip of its colours with the values under it."""
    left, right, steps = 24.0, WIDTH - 24.0, 96
    low = -shade.limit if shade.difference else 0.0
    parts = []
    for i in range(steps):
        value = _value_at(shade, (i + 0.5) / steps)
        place = {"x": left + (right - left) * i / steps, "width": (right - left) / steps + 0.4}
        parts.append(element("rect", y=16, height=12, fill=shade.colour(value), **place))
    fractions = (0.0, 0.25, 0.5, 0.75, 1.0)
    for fraction in fractions:
        at = left + (right - left) * fraction
        value = low if fraction == 0 else _value_at(shade, fraction)
        sign = "+" if shade.difference and value > 0 else ""
        parts.append(element("line", x1=at, x2=at, y1=28, y2=32, class_="axis"))
        parts.append(element("text", sign + minus(show(value)), x=at, y=43, text_anchor="middle", class_="tick"))
    parts.append(element("text", title, x=left, y=11, class_="label"))
    spoken = f"Colour scale, {title}: from {show(low)} to {show(shade.limit)}"
    return svg(parts, height=54, description=spoken)


def _value_at(shade: Shade, position: float) -> float:
    """The value whose colour stands at `position`: the inverse of Shade.position."""
    signed = 2 * position - 1 if shade.difference else position
    share = signed**2 if shade.root else abs(signed)
    return math.copysign(share * shade.limit, signed) if signed else 0.0
