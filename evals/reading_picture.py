"""Draw reading.svg, the picture of READING.md: one head, three times, with its leakage computed.

    python evals/reading_picture.py

The head is made up (its scores fall with the offset, as a local head's do); the numbers below each panel are
the definitions applied to it. Every line is one query: mean log attention to the keys at offsets 0 to 7.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from ropemods.report.html.axes import Scale, frame, round_ticks
from ropemods.report.html.colour import depth_style
from ropemods.report.html.markup import Markup, element, trusted
from ropemods.report.html.style import DRAWINGS, PALETTE
from ropemods.report.words import number
from ropemods.settings.files import write_text

WINDOW, LENGTH = 8, 512
SHOWN = (8, 16, 32, 64, 256)
WIDTH, PANEL, HEAD = 470.0, 222.0, 30.0

Map = Callable[[int, int], float]


def score(query: int, offset: int) -> float:
    """A head whose scores depend on the offset alone."""
    return 2.2 * math.exp(-offset / 2.5)


def drifting_score(query: int, offset: int) -> float:
    """The same head, reading from its queries and keys how near the start it is."""
    return score(query, offset) + 2.0 * math.exp(-(query - WINDOW) / 40) * (offset / 7 - 0.5)


def residual(scores: Map) -> Map:
    """s(i, δ) - logsumexp over the window: every query shares its attention among the same keys."""
    return lambda i, d: scores(i, d) - _log_sum(scores, i, WINDOW)


def mask(scores: Map) -> Map:
    """s(i, δ) - log Z(i): a query shares its attention among all the keys before it."""
    return lambda i, d: scores(i, d) - _log_sum(scores, i, i + 1)


def leakage(values: Map) -> float:
    """Mean over queries and offsets of the squared distance to the mean over queries."""
    total = 0.0
    queries = range(WINDOW, LENGTH)
    for offset in range(WINDOW):
        column = [values(i, offset) for i in queries]
        mean = sum(column) / len(column)
        total += sum((v - mean) ** 2 for v in column) / len(column)
    return total / WINDOW


def _log_sum(scores: Map, query: int, keys: int) -> float:
    return math.log(sum(math.exp(scores(query, d)) for d in range(keys)))


def panel(top: float, title: str, told: str, values: Map) -> list[Markup]:
    """One chart: offset across, mean log attention up, a line per query."""
    x = Scale(low=0, high=WINDOW - 1, start=46, stop=330)
    y = Scale(low=-6, high=0, start=top + PANEL - 52, stop=top + 58)
    parts = [
        element("text", title, x=4, y=top + 14, class_="title"),
        element("text", told, x=4, y=top + 30, class_="tick"),
        element("text", "mean log attention, nats", x=4, y=top + 48, class_="label"),
    ]
    x_ticks = [(float(d), str(d)) for d in range(WINDOW)]
    axes = frame(
        x,
        y,
        x_ticks=x_ticks,
        y_ticks=round_ticks(-6, 0, most=4),
        x_label="offset: how many tokens back",
        y_label="",
    )
    parts += axes
    for n, query in enumerate(SHOWN):
        points = "L".join(f"{x(d):.1f} {y(values(query, d)):.1f}" for d in range(WINDOW))
        style = depth_style(n, len(SHOWN))
        parts.append(element("path", d=f"M{points}", class_="line depth", style=style))
    size = leakage(values)
    parts.append(element("text", "leakage", x=346, y=y.stop + 16, class_="tick"))
    shown = "0" if size < 1e-12 else number(size)
    parts.append(element("text", f"{shown} nats²", x=346, y=y.stop + 33, class_="title"))
    if size > 1e-12:
        root = math.sqrt(size)
        parts.append(element("text", f"root {number(root)} nats:", x=346, y=y.stop + 54, class_="tick"))
        parts.append(element("text", f"a factor of {math.exp(root):.2f}", x=346, y=y.stop + 69, class_="tick"))
    return parts


def legend(top: float) -> list[Markup]:
    """The colours of the queries."""
    parts = [element("text", "query at position", x=4, y=top, class_="label")]
    for n, query in enumerate(SHOWN):
        at = 112 + 66 * n
        style = depth_style(n, len(SHOWN))
        line = {"x1": at, "x2": at + 22, "y1": top - 4, "y2": top - 4}
        parts.append(element("line", class_="line depth", style=style, **line))
        parts.append(element("text", str(query), x=at + 28, y=top, class_="label"))
    return parts


def picture() -> str:
    """The whole SVG file."""
    panels = [
        (
            "Nothing leaks",
            "scores depend on the offset alone: the five lines lie on one another",
            residual(score),
        ),
        (
            "Residual leakage",
            "scores depend on where the query stands too: early lines turn",
            residual(drifting_score),
        ),
        (
            "Mask leakage",
            "scores depend on the offset alone, but later queries share among more keys",
            mask(score),
        ),
    ]
    parts: list[Markup] = []
    for n, (title, told, values) in enumerate(panels):
        parts += panel(HEAD + n * PANEL, title, told, values)
    height = HEAD + len(panels) * PANEL
    parts += legend(18)
    style = PALETTE + DRAWINGS + "svg .title { font-size: 13px; font-weight: 600; }"
    background = element("rect", width=WIDTH, height=height, fill="var(--paper)")
    description = (
        "Mean log attention by offset, a line per query. Without leakage the lines of all queries lie on "
        "one another; with residual leakage the early ones turn; with mask leakage they shift down."
    )
    drawing = element(
        "svg",
        element("style", trusted(style)),
        background,
        parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH:g} {height:g}",
        width=WIDTH,
        height=height,
        role="img",
        aria_label=description,
    )
    return drawing + "\n"


if __name__ == "__main__":
    print(write_text(Path(__file__).with_name("reading.svg"), picture()))
