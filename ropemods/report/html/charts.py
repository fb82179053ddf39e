"""Charts as pure functions, from numbers to SVG text: lines with interval bands, dots, strips.

Every mark carries a <title>, which a browser shows on hover and the page's script on a tap. Arms
are told apart by colour, dash and marker together (see `colour`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ropemods.report.html.axes import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Scale,
    Ticks,
    around,
    frame,
    percent_ticks,
    power_ticks,
    round_ticks,
    svg,
)
from ropemods.report.html.markup import Markup, element, minus
from ropemods.report.words import HasInterval, number

HEIGHT = 230.0


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line. `look` is the CSS class of its colour and dash; NaN in `ys` breaks the line."""

    name: str
    look: str
    xs: Sequence[float]
    ys: Sequence[float]
    lows: Sequence[float] = ()
    highs: Sequence[float] = ()
    style: str | None = None
    markers: bool = True


@dataclass(frozen=True, kw_only=True)
class Zone:
    """A shaded part of the x axis, from `start` to the right end."""

    start: float
    label: str


def lines(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_base: int = 2,
    x_name: Callable[[float], str] = "{:g}".format,
    y_limits: tuple[float, float] | None = None,
    percent: bool = False,
    zone: Zone | None = None,
    mark: tuple[float, str] | None = None,
) -> Markup:
    """Lines over a logarithmic x axis, with a band where intervals are known."""
    all_x = [v for s in series for v in s.xs]
    x_low, x_high = min(all_x), max(all_x)
    if x_low == x_high:
        x_low, x_high = x_low / x_base, x_high * x_base
    x = Scale(low=x_low, high=x_high, start=LEFT, stop=WIDTH - RIGHT, log=True)
    limits = y_limits or around([v for s in series for v in (*s.ys, *s.lows, *s.highs)])
    y = Scale(low=limits[0], high=limits[1], start=HEIGHT - BOTTOM, stop=TOP)
    x_ticks = power_ticks(x_low, zone.start if zone else x_high, base=x_base)
    y_ticks = percent_ticks(*limits) if percent else round_ticks(*limits)

    parts: list[Markup] = []
    if zone is not None:
        left = x(zone.start)
        box = {"x": left, "y": TOP, "width": x.stop - left, "height": y.start - TOP}
        parts.append(element("rect", class_="zone", **box))
        middle = (left + x.stop) / 2
        parts.append(element("text", zone.label, x=middle, y=y.start + 16, text_anchor="middle", class_="tick"))
    parts += frame(x, y, x_ticks=x_ticks, y_ticks=y_ticks, x_label=x_label, y_label=y_label)
    if mark is not None and x_low < mark[0] < x_high:
        at = x(mark[0])
        parts.append(element("line", x1=at, x2=at, y1=TOP, y2=y.start, class_="mark"))
        parts.append(element("text", mark[1], x=at - 4, y=TOP + 9, text_anchor="end", class_="tick"))
    parts += [_band(s, x, y) for s in series if s.lows]
    parts += [_path(s, x, y) for s in series]
    parts += [m for s in series if s.markers for m in _markers(s, x, y, x_name, percent)]
    ends = "; ".join(_spoken(s, x_name) for s in series)
    return svg(parts, height=HEIGHT, description=f"{title}. {ends}")


def _spoken(series: Series, x_name: Callable[[float], str]) -> str:
    known = [(x, y) for x, y in zip(series.xs, series.ys, strict=True) if math.isfinite(y)]
    if not known:
        return f"{series.name}: not defined"
    (x0, y0), (x1, y1) = known[0], known[-1]
    return f"{series.name}: {number(y0)} at {x_name(x0)}, {number(y1)} at {x_name(x1)}"


def _runs(points: Sequence[tuple[float, ...]]) -> list[list[tuple[float, ...]]]:
    """The points split wherever one of them is not finite."""
    runs: list[list[tuple[float, ...]]] = [[]]
    for point in points:
        if all(math.isfinite(v) for v in point):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _path(series: Series, x: Scale, y: Scale) -> Markup:
    runs = _runs(list(zip(series.xs, series.ys, strict=True)))
    steps = ["M" + "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in run) for run in runs]
    look = f"line {series.look}"
    return element("path", d="".join(steps), class_=look, style=series.style)


def _band(series: Series, x: Scale, y: Scale) -> Markup:
    corners = []
    for run in _runs(list(zip(series.xs, series.lows, series.highs, strict=True))):
        ring = [(a, high) for a, _, high in run] + [(a, low) for a, low, _ in reversed(run)]
        corners.append("M" + "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in ring) + "Z")
    return element("path", d="".join(corners), class_=f"band {series.look}")


def _markers(series: Series, x: Scale, y: Scale, x_name: Callable[[float], str], percent: bool) -> list[Markup]:
    found = []
    for i, (a, b) in enumerate(zip(series.xs, series.ys, strict=True)):
        if math.isfinite(b):
            told = f"{100 * b:.1f}%" if percent else number(b)
            if series.lows:
                told += f" [{number(series.lows[i])}, {number(series.highs[i])}]"
            told = f"{series.name}, {x_name(a)}: {told}"
            found.append(marker(series.look, x(a), y(b), told))
    return found


def marker(look: str, x: float, y: float, told: str | None = None, *, size: float = 3.6) -> Markup:
    """The marker of an arm: circle, square, triangle, diamond, ... by its look."""
    shape = _SHAPES.get(look, _SHAPES["arm0"])
    points = " ".join(f"{x + size * dx:.1f},{y + size * dy:.1f}" for dx, dy in shape)
    title = element("title", minus(told)) if told else None
    return element("polygon", title, points=points, class_=f"marker {look}")


def _ring(corners: int, *, radius: float, turn: float = 0.0) -> list[tuple[float, float]]:
    angles = [2 * math.pi * (k + turn) / corners - math.pi / 2 for k in range(corners)]
    return [(radius * math.cos(t), radius * math.sin(t)) for t in angles]


_SHAPES = {
    "arm0": _ring(16, radius=1.0),
    "arm1": _ring(4, radius=1.3, turn=0.5),
    "arm2": _ring(3, radius=1.4),
    "arm3": _ring(4, radius=1.4),
    "arm4": _ring(3, radius=1.4, turn=0.5),
    "arm5": _ring(6, radius=1.1),
}


def dots(
    rows: Sequence[tuple[str, str, HasInterval]], *, title: str, unit: str, zero: bool = True, longest: int = 16
) -> Markup:
    """One row per arm (name, look, estimate): a dot on its 95% interval. Names are cut to `longest` characters."""
    values = [v for _, _, e in rows for v in (e.value, e.low, e.high)]
    low, high = around(values, zero=zero, room=0.08)
    name_width = 11 + 6.4 * max(len(_cut(name, longest)) for name, _, _ in rows)
    bottom = TOP + 24 * len(rows)
    x = Scale(low=low, high=high, start=max(LEFT, name_width), stop=WIDTH - RIGHT)
    parts = _level_axis(x, round_ticks(low, high, most=5), top=TOP - 8, bottom=bottom)
    for i, (name, look, estimate) in enumerate(rows):
        y = TOP + 6 + 24 * i
        parts.append(element("text", _cut(name, longest), x=x.start - 8, y=y + 4, text_anchor="end", class_="label"))
        told = f"{name}: {number(estimate.value)}"
        if math.isfinite(estimate.low) and math.isfinite(estimate.high):
            told += f" [{number(estimate.low)}, {number(estimate.high)}]"
            ends = {"x1": x(estimate.low), "x2": x(estimate.high)}
            parts.append(element("line", y1=y, y2=y, class_=f"whisker {look}", **ends))
        if math.isfinite(estimate.value):
            parts.append(marker(look, x(estimate.value), y, told, size=4.6))
    middle = (x.start + x.stop) / 2
    parts.append(element("text", unit, x=middle, y=bottom + 30, text_anchor="middle", class_="label"))
    spoken = "; ".join(f"{name} {number(e.value)}" for name, _, e in rows)
    return svg(parts, height=bottom + 36, description=f"{title}. {spoken}")


def strips(
    rows: Sequence[tuple[str, HasInterval, Sequence[float]]],
    *,
    look: str,
    title: str,
    limits: tuple[float, float],
) -> Markup:
    """One row per intervention (name, change, reference): its change over those of random tokens."""
    low, high = limits
    row_height = 46.0
    bottom = 8 + row_height * len(rows)
    x = Scale(low=low, high=high, start=14, stop=WIDTH - 14)
    parts = _level_axis(x, percent_ticks(low, high, signed=True), top=4, bottom=bottom)
    scatter = random.Random(0)
    for i, (name, change, reference) in enumerate(rows):
        top = 8 + row_height * i
        parts.append(element("text", _cut(name, 52), x=2, y=top + 10, class_="label halo"))
        y = top + 26
        for value in reference:
            where = {"cx": x(value), "cy": y + scatter.uniform(-7, 7)}
            told = element("title", minus(f"random token: {100 * value:+.0f}%"))
            parts.append(element("circle", told, r=3, class_="reference", **where))
        told_change = f"{name}: {100 * change.value:+.0f}%"
        if math.isfinite(change.low) and math.isfinite(change.high):
            # An interval may run far past every point; it is cut at the frame, the table has it.
            ends = [x(min(high, max(low, v))) for v in (change.low, change.high)]
            told_change += f" [{100 * change.low:+.0f}%, {100 * change.high:+.0f}%]"
            parts.append(element("line", x1=ends[0], x2=ends[1], y1=y, y2=y, class_=f"whisker {look}"))
        if math.isfinite(change.value):
            parts.append(marker(look, x(change.value), y, told_change, size=4.6))
    label = "change of the early residual"
    parts.append(element("text", label, x=WIDTH / 2, y=bottom + 30, text_anchor="middle", class_="label"))
    spoken = "; ".join(f"{name} {100 * change.value:+.0f}%" for name, change, _ in rows)
    return svg(parts, height=bottom + 36, description=f"{title}. {spoken}")


def _level_axis(x: Scale, ticks: Ticks, *, top: float, bottom: float) -> list[Markup]:
    parts = []
    for value, text in ticks:
        at = x(value)
        kind = "zero" if value == 0 else "level"
        parts.append(element("line", x1=at, x2=at, y1=top, y2=bottom, class_=kind))
        parts.append(element("text", text, x=at, y=bottom + 14, text_anchor="middle", class_="tick"))
    return parts


def _cut(name: str, most: int = 16) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
