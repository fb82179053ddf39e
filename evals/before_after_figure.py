"""The picture of `before_after.py`: what each arm does to the early residual and to the early total."""

from __future__ import annotations

from typing import Any

from ropemods.report.html.axes import WIDTH, Scale, around, frame, percent_ticks
from ropemods.report.html.markup import Markup, element, trusted
from ropemods.report.html.style import DRAWINGS, PALETTE

HEIGHT, LINE = 300.0, 15.0
MOST = 0.5
"""Arms whose residual or total is raised by more do not fit on the picture; the legend says so."""


def drawn(found: dict[str, Any]) -> str:
    """Down is less residual, left is less total; the control is at (0, 0)."""
    rows = {name: row for name, row in found["arms"].items() if "residual_change" in row}
    inside = {n: r for n, r in rows.items() if max(r["residual_change"][0], r["total_change"][0]) <= MOST}
    limits = {
        axis: around([end for row in inside.values() for end in row[f"{axis}_change"]])
        for axis in ("residual", "total")
    }
    x = Scale(low=limits["total"][0], high=limits["total"][1], start=52, stop=WIDTH - 12)
    y = Scale(low=limits["residual"][0], high=limits["residual"][1], start=HEIGHT - 38, stop=22)
    parts: list[Markup] = frame(
        x,
        y,
        x_ticks=percent_ticks(*limits["total"], signed=True),
        y_ticks=percent_ticks(*limits["residual"], signed=True),
        x_label="change of the early total",
        y_label="change of the early residual",
    )
    legend = HEIGHT + 12
    for number, (name, row) in enumerate(rows.items(), 1):
        loss = f"{name}: loss {row['loss_change'][0]:+.2%}"
        if name in inside:
            parts += _mark(x, y, row, str(number))
        else:
            loss += f", residual {row['residual_change'][0]:+.0%}, total {row['total_change'][0]:+.0%}: outside"
        parts.append(element("text", f"{number}  {loss}", x=4, y=legend, class_="label"))
        legend += LINE
    style = PALETTE + DRAWINGS + "svg .cross { stroke: var(--arm0); stroke-width: 1.2; opacity: 0.5; }"
    whole = element(
        "svg",
        element("style", trusted(style)),
        element("rect", width=WIDTH, height=legend, fill="var(--paper)"),
        parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH:g} {legend:g}",
        width=WIDTH,
        height=legend,
        role="img",
        aria_label="Change of early residual against change of early total, for every arm.",
    )
    return f"{whole}\n"


def _mark(x: Scale, y: Scale, row: dict[str, Any], label: str) -> list[Markup]:
    """Intervals as a cross, and the arm's number at their middle."""
    (total, left, right), (residual, low, high) = row["total_change"], row["residual_change"]
    return [
        element("line", x1=x(left), x2=x(right), y1=y(residual), y2=y(residual), class_="cross"),
        element("line", x1=x(total), x2=x(total), y1=y(low), y2=y(high), class_="cross"),
        element("circle", cx=x(total), cy=y(residual), r=2.5, fill="var(--arm0)"),
        element("text", label, x=x(total) + 4, y=y(residual) - 4, class_="label"),
    ]
