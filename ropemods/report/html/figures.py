"""Where leakage sits: by query, and by layer and head.

Every function takes the arms and gives one section, or None where no arm measured it.
Maps that are compared share one colour limit; charts that are compared share their y axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ropemods.report.changes import Contrasts
from ropemods.report.html.charts import Series, lines
from ropemods.report.html.colour import Shade, shared_limit
from ropemods.report.html.heat import colour_bar, heat_map
from ropemods.report.html.layout import Arm, figure, folded, grid, legend, section
from ropemods.report.html.markup import Markup, element
from ropemods.report.records import Grid
from ropemods.report.words import TERMS, number


def by_query(arms: Sequence[Arm]) -> Markup | None:
    """Leakage against the query's position, one chart per term, and layers × bins below."""
    figures = []
    for name in TERMS:
        series = []
        for arm in arms:
            bins = arm.report.terms[name].bins if name in arm.report.terms else ()
            if bins:
                series.append(
                    Series(
                        name=arm.name,
                        look=arm.look,
                        xs=[math.sqrt(b.start * (b.stop - 1)) for b in bins],
                        ys=[b.value for b in bins],
                        lows=[b.low for b in bins],
                        highs=[b.high for b in bins],
                    )
                )
                names = {math.sqrt(b.start * (b.stop - 1)): span(b.start, b.stop) for b in bins}
        if series:
            title = f"{name.capitalize()} by query"
            drawing = lines(
                series,
                title=title,
                x_label="query position",
                y_label="nats²",
                x_name=lambda x, names=names: names.get(x, f"query {x:.0f}"),  # type: ignore[misc]
            )
            figures.append(figure(title, drawing, name=f"{name} by query"))
    if not figures:
        return None
    words = (
        "Mean over layers and heads, in bins that double in width; the band is the interval. "
        "A model that does not tell position from the start of the text would stay at 0."
    )
    return section(
        "by-query", "By query position", element("p", words), legend(arms), grid(*figures),
        _layer_bins(arms),
    )  # fmt: skip


def _layer_bins(arms: Sequence[Arm]) -> Markup | None:
    groups = []
    for name in TERMS:
        terms = {arm.name: arm.report.terms[name] for arm in arms if name in arm.report.terms}
        if not terms:
            continue
        shade = Shade(limit=shared_limit(term.layer_bins for term in terms.values()))
        maps = []
        for arm_name, term in terms.items():
            title = f"{name}, {arm_name}"
            columns = [span(b.start, b.stop) for b in term.bins]
            drawing = heat_map(term.layer_bins, shade, title=title, columns=columns, x_label="queries")
            maps.append(figure(title, drawing))
        scale = figure("Scale", colour_bar(shade, title=f"{name}, nats²"))
        groups.append(grid(*maps, scale, name=f"{name} by layer and query"))
    return folded("Layers × queries", *groups) if groups else None


def span(start: int, stop: int) -> str:
    """A bin of queries in words."""
    return f"{start}–{stop - 1}"


def by_head(arms: Sequence[Arm], comparison: Contrasts | None) -> Markup | None:
    """Layers × heads at early queries: every arm and the headline's difference on one scale."""
    groups = []
    for name in TERMS:
        grids = {arm.name: arm.report.terms[name].heads.early for arm in arms if name in arm.report.terms}
        if grids:
            maps = grid(*head_maps(grids, comparison, f"{name}, nats²", number), name=f"{name} by head")
            title = f"{name.capitalize()}, early queries"
            opened = element("h3", title)
            groups.append(element("div", opened, maps) if name == "residual" else folded(title, maps))
    if not groups:
        return None
    words = (
        "Each cell is a head. Colours follow the root of the value, so equal steps of colour are "
        "equal steps in nats. Hover over a cell, or tap it, to read it."
    )
    if comparison is not None:
        words += (
            " All arms share one scale, and the difference has the same limit on both sides of 0: "
            "blue is less, orange is more."
        )
    return section("by-head", "By layer and head", element("p", words), *groups)


def head_maps(
    grids: dict[str, Grid],
    comparison: Contrasts | None,
    unit: str,
    show: Callable[[float], str],
    *,
    root: bool = True,
    inside: Callable[[float], str] | None = None,
) -> list[Markup]:
    """Layers × heads: a map per arm, the headline's difference, and the bars of both scales."""
    limit = shared_limit(grids.values())
    shade = Shade(limit=limit, root=root)
    drawings = []
    for name, values in grids.items():
        columns = [str(head) for head in range(len(values[0]))]
        drawing = heat_map(
            values,
            shade,
            title=f"{unit}, {name}",
            columns=columns,
            x_label="head",
            show=show,
            inside=inside,
        )
        drawings.append(figure(name, drawing))
    bars = [colour_bar(shade, title=unit, show=show)]
    if comparison is None:
        return [*drawings, figure("Scale", bars)]
    before, after = comparison.headline.before, comparison.headline.after
    if before in grids and after in grids and _alike(grids[before], grids[after]):
        difference = Shade(limit=limit, difference=True, root=root)
        change = tuple(
            tuple(b - a for a, b in zip(row_a, row_b, strict=True))
            for row_a, row_b in zip(grids[before], grids[after], strict=True)
        )
        title = f"{after} minus {before}"
        columns = [str(head) for head in range(len(change[0]))]
        signed = _signed(show)
        drawing = heat_map(
            change,
            difference,
            title=f"{unit}, {title}",
            columns=columns,
            x_label="head",
            show=signed,
            inside=inside,
        )
        drawings.append(figure(title, drawing))
        bars.append(colour_bar(difference, title=f"difference of {unit}", show=show))
    return [*drawings, figure("Scale" if len(bars) == 1 else "Scales", bars)]


def _signed(show: Callable[[float], str]) -> Callable[[float], str]:
    return lambda value: ("+" if value > 0 else "") + show(value)


def _alike(a: Grid, b: Grid) -> bool:
    return [len(row) for row in a] == [len(row) for row in b]
