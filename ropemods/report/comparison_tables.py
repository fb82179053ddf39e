"""A comparison in sentences and as Markdown tables.

The sentences name the change, its interval and whether it can be told from noise, for the early
residual, the early total and the loss together: a mod that lowers the first by raising the
other two has not won.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from ropemods.report.changes import Change, Contrast, Contrasts
from ropemods.report.markdown import mods_line, protocol_line
from ropemods.report.words import (
    NO_VALUE,
    TERMS,
    basis,
    count,
    label,
    markdown_table,
    shown,
    shown_ratio,
)

_SUBJECTS = (
    ("residual", "early", "the early residual", " nats²"),
    ("total", "early", "the early total", " nats²"),
    ("held_out_loss", "all", "loss on the measured crops", ""),
)


def headline_sentences(contrast: Contrast) -> list[str]:
    """What happened from one arm to the other, a sentence for each of residual, total and loss."""
    sentences = []
    for quantity, scope, subject, unit in _SUBJECTS:
        change = contrast.find(quantity, scope)
        if change is not None:
            sentences.append(_sentence(change, subject, unit))
    return sentences


def _sentence(change: Change, subject: str, unit: str) -> str:
    before, after = shown(change.quantity, change.before), shown(change.quantity, change.after)
    difference = shown(change.quantity, change.delta, signed=True)
    moved = f"{before.value} to {after.value}{unit}"
    subject = subject[0].upper() + subject[1:]
    if math.isnan(change.delta.low):
        return f"{subject}: {moved}, interval of the difference not known."
    if not change.clear:
        return f"{subject}: {moved}. The difference, {difference}, cannot be told from 0 at this number of sequences."
    verb = "falls" if change.delta.value < 0 else "rises"
    by = str(difference)
    if change.ratio is not None and change.quantity in TERMS:
        by = str(shown_ratio(change.ratio))
    return f"{subject} {verb} from {moved}: {by}."


def pairing_line(contrast: Contrast) -> str:
    """How the intervals of differences were formed."""
    if contrast.paired:
        return "Intervals of differences are paired: the arms were measured on the same crops."
    return "Intervals of differences are not paired: the arms were not measured on the same crops."


def comparison_markdown(comparison: Contrasts) -> str:
    """The whole comparison as Markdown, headline first."""
    return "\n\n".join(_sections(comparison)) + "\n"


def _sections(comparison: Contrasts) -> Iterator[str]:
    headline = comparison.headline
    first = comparison.arms[headline.before]
    yield f"# Leakage: {headline.before} to {headline.after}"
    yield "\n".join(f"- {sentence}" for sentence in headline_sentences(headline))
    yield f"{basis(first.protocol)} {pairing_line(headline)}"
    if comparison.differences:
        yield "**Measured differently**: " + "; ".join(comparison.differences) + "."
    yield _changes(headline)
    if len(comparison.arms) > 2:
        yield "## All arms\n\n" + _arms(comparison)
        yield f"## Changes from {next(iter(comparison.arms))}\n\n" + _changes_from_first(comparison)
    if any(change.layer is not None for change in headline.changes):
        yield "## By layer\n\nEarly queries, nats².\n\n" + _layers(headline)
    yield "## Where the numbers come from\n\n" + _origins(comparison)
    yield protocol_line(first)


def _changes(contrast: Contrast) -> str:
    rows = []
    for change in contrast.changes:
        if change.layer is None:
            name = change.quantity
            row = (
                label(name, change.scope),
                str(shown(name, change.before)),
                str(shown(name, change.after)),
                *shown(name, change.delta, signed=True),
                str(shown_ratio(change.ratio)) if name in TERMS else "",
            )
            rows.append(row)
    head = ("", contrast.before, contrast.after, "difference", "interval", "relative")
    return markdown_table(head, rows)


def _arms(comparison: Contrasts) -> str:
    first, *others = _from_first(comparison)
    rows = []
    for change in first.changes:
        if change.layer is None:
            name, scope = change.quantity, change.scope
            row = [
                label(name, scope),
                str(shown(name, change.before)),
                str(shown(name, change.after)),
            ]
            for contrast in others:
                found = contrast.find(name, scope)
                row.append(str(shown(name, found.after)) if found else NO_VALUE)
            rows.append(tuple(row))
    return markdown_table(("", *comparison.arms), rows)


def _changes_from_first(comparison: Contrasts) -> str:
    contrasts = _from_first(comparison)
    rows = []
    for change in contrasts[0].changes:
        if change.layer is None:
            row = [label(change.quantity, change.scope)]
            for contrast in contrasts:
                found = contrast.find(change.quantity, change.scope)
                row.append(str(shown(change.quantity, found.delta, signed=True)) if found else NO_VALUE)
            rows.append(tuple(row))
    return markdown_table(("", *(contrast.after for contrast in contrasts)), rows)


def _from_first(comparison: Contrasts) -> list[Contrast]:
    """The contrast of the first arm with every other one, in the arms' order."""
    first, *others = comparison.arms
    found = {(c.before, c.after): c for c in comparison.contrasts}
    return [found[first, name] for name in others]


def _layers(contrast: Contrast) -> str:
    rows = []
    for change in contrast.changes:
        if change.layer is not None and change.scope == "early":
            name = change.quantity
            row = (
                f"{name}, layer {change.layer}",
                shown(name, change.before).value,
                shown(name, change.after).value,
                *shown(name, change.delta, signed=True),
                str(shown_ratio(change.ratio)),
            )
            rows.append(row)
    head = ("", contrast.before, contrast.after, "difference", "interval", "relative")
    return markdown_table(head, rows)


def _origins(comparison: Contrasts) -> str:
    rows = [
        (
            name,
            report.model.name,
            mods_line(report),
            f"{report.text.sequences:,} sequences, {count(report.text.tokens)} tokens",
            report.text.source,
            report.model.dtype,
            f"`{report.command}`",
        )
        for name, report in comparison.arms.items()
    ]
    head = ("arm", "model", "mods", "read", "text", "dtype", "command")
    return markdown_table(head, rows)
