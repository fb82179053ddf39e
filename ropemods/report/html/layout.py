"""The pieces that every section is made of: arms, figures, tables, legends, fold-outs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ropemods.report.changes import Contrasts
from ropemods.report.findings import Findings
from ropemods.report.html.charts import marker
from ropemods.report.html.markup import Child, Markup, element, join, minus


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A report with its name and its look: the CSS class of its colour, dash and marker."""

    name: str
    look: str
    report: Findings


def dress(reports: Mapping[str, Findings], comparison: Contrasts | None) -> tuple[Arm, ...]:
    """Give each arm its look: blue and vermilion for the headline's two, then the others."""
    order = list(reports)
    if comparison is not None:
        pair = [comparison.headline.before, comparison.headline.after]
        order = pair + [name for name in reports if name not in pair]
    # Six looks; a page of more arms than that repeats them, and its legend still tells the names.
    looks = {name: f"arm{i % 6}" for i, name in enumerate(order)}
    return tuple(Arm(name=n, look=looks[n], report=r) for n, r in reports.items())


def section(anchor: str, title: str, *children: Child | None) -> Markup:
    """A section with a heading that the contents link to."""
    return element("section", element("h2", title), *children, id=anchor)


def figure(caption: str, drawing: Child, note: str | None = None, *, name: str | None = None) -> Markup:
    """A caption, its drawing, a note below, and a line in which a tap on a mark shows its value.

    `name` is what a figure that can stand alone is asked for by (`alone.py`); a grid that only tells something as a
    whole, such as maps with the bar of their scale, has it in place of its figures.
    """
    small = element("small", note) if note else None
    output = element("output", aria_live="polite")
    return element("figure", element("figcaption", caption), drawing, small, output, data_name=name)


def grid(*figures: Child | None, wide: bool = False, name: str | None = None) -> Markup:
    """Figures side by side, as many as the screen is wide; `wide` for two at most."""
    return element("div", *figures, class_="grid wide" if wide else "grid", data_name=name)


def legend(arms: Sequence[Arm]) -> Markup | None:
    """Each arm's line and marker with its name; nothing where there is only one arm."""
    if len(arms) < 2:
        return None
    entries = []
    for arm in arms:
        stroke = element("line", x1=1, x2=41, y1=7, y2=7, class_=f"line {arm.look}")
        sample = element("svg", stroke, marker(arm.look, 21, 7), viewBox="0 0 42 14", aria_hidden="true")
        entries.append(element("li", sample, arm.name))
    return element("ul", entries, class_="legend")


def folded(summary: str, *children: Child | None, start_open: bool = False) -> Markup:
    """Content that opens on demand."""
    return element("details", element("summary", summary), *children, open="open" if start_open else None)


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[Child]],
    *,
    caption: str,
    words: bool = False,
) -> Markup:
    """A table that scrolls sideways where it is wider than the screen.

    The first cell of a row is its heading. `words` is for tables of text: left-aligned, wrapping.
    """
    top = element("tr", [element("th", text, scope="col") for text in head])
    body = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            [element("td", _number_text(c) if not words else c) for c in row[1:]],
        )
        for row in rows
    ]
    content = element(
        "table",
        element("thead", top),
        element("tbody", body),
        class_="words" if words else None,
        aria_label=caption,
    )
    # The caption stands outside what scrolls, so that a phone shows the whole of it.
    return join(
        element("p", caption, class_="caption"),
        element("div", content, class_="scroll", tabindex="0", role="region", aria_label=caption),
    )


def _number_text(child: Child) -> Child:
    return minus(child) if isinstance(child, str) and not isinstance(child, Markup) else child


def with_interval(shown: tuple[str, str]) -> Markup:
    """A value with its interval in small print below."""
    value, interval = shown
    small = element("small", minus(interval)) if interval != "n/a" else None
    return element("span", minus(value), small)
