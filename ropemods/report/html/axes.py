"""Scales and ticks: from data to pixels, with numbers at round places.

Every chart is drawn 360 units wide, about a phone's width, with text of 11 units. A page puts as
many side by side as fit, so the text stays legible on every screen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ropemods.report.html.markup import Markup, element, minus
from ropemods.report.words import number

WIDTH = 360.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 12.0, 22.0, 38.0


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A straight or logarithmic map from [low, high] to the pixels [start, stop]."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (value - low) / (high - low) * (self.stop - self.start)


Ticks = Sequence[tuple[float, str]]


def round_ticks(low: float, high: float, *, most: int = 6) -> list[tuple[float, str]]:
    """Ticks at multiples of 1, 2 or 5 times a power of ten within [low, high]."""
    span = high - low
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(m * power for m in (1, 2, 5, 10) if span / (m * power) <= most)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(i * step, minus(number(i * step, decimals=decimals))) for i in range(first, last + 1)]


def percent_ticks(low: float, high: float, *, signed: bool = False) -> list[tuple[float, str]]:
    """Round ticks of fractions, labelled in percent."""
    ticks = round_ticks(100 * low, 100 * high)
    return [(v / 100, ("+" if signed and v > 0 else "") + text + "%") for v, text in ticks]


def power_ticks(low: float, high: float, *, base: int, most: int = 7) -> list[tuple[float, str]]:
    """Ticks at powers of `base` within [low, high], every second or third where they are many."""
    first = math.ceil(math.log(low, base) - 1e-9)
    last = math.floor(math.log(high, base) + 1e-9)
    stride = max(1, math.ceil((last - first + 1) / most))
    powers = range(first, last + 1, stride)
    return [(float(base) ** k, _short(float(base) ** k, base)) for k in powers]


def _short(value: float, base: int) -> str:
    thousand = 1024 if base == 2 else 1000
    if value >= 9 * thousand**2:
        return f"{value / thousand**2:g}M"
    return f"{value / thousand:g}k" if value >= 9 * thousand else f"{value:g}"


def around(values: Sequence[float], *, zero: bool = True, room: float = 0.06) -> tuple[float, float]:
    """A domain that holds all finite values (and 0), with a little room at both ends."""
    finite = [v for v in values if math.isfinite(v)] + ([0.0] if zero else [])
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    if low == high:
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
        return (0.0, 1.0) if zero and finite.count(0.0) == len(finite) else (low, high)
    margin = room * (high - low)
    return (low - margin if low < 0 or not zero else low), high + margin


def frame(x: Scale, y: Scale, *, x_ticks: Ticks, y_ticks: Ticks, x_label: str, y_label: str) -> list[Markup]:
    """Grid lines, tick labels and axis labels; the y label stands level, above its axis."""
    parts = []
    for value, label in y_ticks:
        at = y(value)
        kind = "zero" if value == 0 else "level"
        parts.append(element("line", x1=x.start, x2=x.stop, y1=at, y2=at, class_=kind))
        parts.append(element("text", label, x=x.start - 5, y=at + 3.8, text_anchor="end", class_="tick"))
    for value, label in x_ticks:
        at = x(value)
        parts.append(element("line", x1=at, x2=at, y1=y.start, y2=y.start + 4, class_="axis"))
        parts.append(element("text", label, x=at, y=y.start + 16, text_anchor="middle", class_="tick"))
    parts.append(element("line", x1=x.start, x2=x.stop, y1=y.start, y2=y.start, class_="axis"))
    middle = (x.start + x.stop) / 2
    parts.append(element("text", x_label, x=middle, y=y.start + 32, text_anchor="middle", class_="label"))
    parts.append(element("text", y_label, x=2, y=11, class_="label"))
    return parts


def svg(parts: Sequence[str], *, height: float, description: str, width: float = WIDTH) -> Markup:
    """An image that scales to its place and is read aloud as its description."""
    return element("svg", parts, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=description)
