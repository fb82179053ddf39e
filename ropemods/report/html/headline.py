"""The top of a page: what happened in sentences, as dots on intervals, and as the full table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from ropemods.report.changes import Change, Contrast, Contrasts, quantities
from ropemods.report.comparison_tables import headline_sentences, pairing_line
from ropemods.report.findings import Findings
from ropemods.report.html.charts import dots
from ropemods.report.html.layout import Arm, figure, folded, grid, legend, section, table, with_interval
from ropemods.report.html.markup import Child, Markup, element, minus
from ropemods.report.markdown import report_sentences
from ropemods.report.records import Estimate
from ropemods.report.words import (
    NO_VALUE,
    TERM_MEANING,
    TERMS,
    basis,
    label,
    number,
    shown,
    shown_ratio,
)

_TERM_CAPTIONS = {
    "residual": "Residual, early queries",
    "mask": "Mask, early queries",
    "total": "Total, early queries",
}


def headline(arms: Sequence[Arm], comparison: Contrasts | None) -> Markup:
    """The first section of the page."""
    return section("headline", "Headline", *opening(arms, comparison))


def opening(arms: Sequence[Arm], comparison: Contrasts | None) -> list[Markup | None]:
    """What was found, in short: all that a notebook shows of it."""
    protocol = arms[0].report.protocol
    explained = f"{basis(protocol)} Leakage is in nats²; its root is in nats."
    if comparison is not None:
        explained += f" {pairing_line(comparison.headline)}"
    tables: list[Markup | None] = []
    if comparison is not None:
        tables.append(_contrast_table(comparison.headline))
        tables.append(_layer_table(comparison.headline))
    if len(arms) != 2:
        tables.append(_arms_table(arms))
    if comparison is not None:
        tables += [
            folded(f"All of {contrast.before} to {contrast.after}", _contrast_table(contrast))
            for contrast in comparison.contrasts[1:]
        ]
    return [
        _lead(arms, comparison),
        element("p", explained, class_="soft"),
        legend(arms),
        grid(*_dot_figures(arms), wide=True),
        *tables,
    ]


def _lead(arms: Sequence[Arm], comparison: Contrasts | None) -> Markup:
    if comparison is None:
        told = [element("li", minus(text)) for text in report_sentences(arms[0].report)]
        return element("ul", told, class_="lead")
    entries = []
    for sentence in headline_sentences(comparison.headline):
        # The sentence's verb decides the colour of its rule; no verb, no colour.
        verb = next((v for v in ("falls", "rises") if f" {v} from " in sentence), None)
        entries.append(element("li", minus(sentence), class_=verb))
    return element("ul", entries, class_="lead")


def _dot_figures(arms: Sequence[Arm]) -> Iterator[Markup]:
    for name in TERMS:
        rows = [(a.name, a.look, a.report.terms[name].early) for a in arms if name in a.report.terms]
        if rows:
            caption = _TERM_CAPTIONS[name]
            drawing = dots(rows, title=caption, unit="nats²")
            yield figure(caption, drawing, TERM_MEANING[name].capitalize() + ".", name=f"early {name}")
    losses = [(a.name, a.look, a.report.held_out_loss) for a in arms if a.report.held_out_loss is not None]
    if losses:
        caption = "Held-out loss"
        drawing = dots(losses, title=caption, unit="nats per token", zero=False)
        yield figure(caption, drawing, "On the very crops that were measured. The axis is cut.", name="held-out loss")


def _arms_table(arms: Sequence[Arm]) -> Markup:
    measured = list(_quantities(arms[0].report))
    if len(arms) == 1:
        rows: list[list[Child]] = []
        for quantity, scope, estimate in measured:
            root = number(estimate.root) if quantity in TERMS else ""
            rows.append([label(quantity, scope), *shown(quantity, estimate), root])
        return table(("", "value", "interval", "root, nats"), rows, caption="All headline values")
    found = [{(q, s): e for q, s, e in _quantities(arm.report)} for arm in arms]
    rows = []
    for quantity, scope, _ in measured:
        row: list[Child] = [label(quantity, scope)]
        for values in found:
            value = values.get((quantity, scope))
            row.append(with_interval(shown(quantity, value)) if value else NO_VALUE)
        rows.append(row)
    return table(("", *(arm.name for arm in arms)), rows, caption="All arms, with intervals")


def _quantities(report: Findings) -> Iterator[tuple[str, str, Estimate]]:
    for (quantity, scope, layer), estimate in quantities(report).items():
        if layer is None:
            yield quantity, scope, estimate


def _contrast_table(contrast: Contrast) -> Markup:
    rows = [_contrast_row(c, label(c.quantity, c.scope)) for c in contrast.changes if c.layer is None]
    head = ("", contrast.before, contrast.after, "difference", "relative")
    caption = f"{contrast.before} to {contrast.after}; bold where the interval leaves out 0"
    return table(head, rows, caption=caption)


def _layer_table(contrast: Contrast) -> Markup | None:
    groups = []
    for name in TERMS:
        rows = [
            _contrast_row(change, f"layer {change.layer}")
            for change in contrast.changes
            if change.layer is not None and (change.quantity, change.scope) == (name, "early")
        ]
        if rows:
            head = ("", contrast.before, contrast.after, "difference", "relative")
            groups.append(table(head, rows, caption=f"{name}, early queries, nats²"))
    return folded(f"By layer, {contrast.before} to {contrast.after}", *groups) if groups else None


def _contrast_row(change: Change, name: str) -> list[Child]:
    quantity = change.quantity
    difference = with_interval(shown(quantity, change.delta, signed=True))
    if math.isnan(change.delta.low):
        relative: Child = ""
    elif quantity in TERMS:
        relative = with_interval(shown_ratio(change.ratio))
    else:
        relative = ""
    return [
        name,
        with_interval(shown(quantity, change.before)),
        with_interval(shown(quantity, change.after)),
        element("strong", difference) if change.clear else difference,
        relative,
    ]
