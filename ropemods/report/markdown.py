"""A report as Markdown: the tables that go into a README, a pull request or a terminal.

Every number stands beside its interval where one is known. Sections that were not measured are
left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean

from ropemods.report.findings import Findings
from ropemods.report.records import Estimate
from ropemods.report.words import (
    TERMS,
    basis,
    count,
    interval,
    label,
    markdown_table,
    number,
    percent,
    shown,
)


def report_markdown(report: Findings) -> str:
    """The whole report as Markdown, headline first."""
    return "\n\n".join(_sections(report)) + "\n"


def _sections(report: Findings) -> Iterator[str]:
    model, text = report.model, report.text
    yield f"# Leakage of {model.name}"
    yield (f"{text.sequences:,} sequences, {count(text.tokens)} tokens of {text.source}. Mods: {mods_line(report)}.")
    yield "\n".join(f"- {sentence}" for sentence in report_sentences(report))
    yield _headline(report)
    yield basis(report.protocol)
    yield _other_values(report)
    if report.terms:
        yield "## By layer\n\n" + _layers(report)
        yield "## By query\n\nnats², mean over layers and heads.\n\n" + _bins(report)
    if report.interventions:
        yield "## Interventions\n\n" + _interventions(report)
    if report.controls:
        yield "## Controls\n\n" + _controls(report)
    if report.notes:
        yield "## Notes\n\n" + "\n".join(f"- {note}" for note in report.notes)
    yield provenance(report)


def report_sentences(report: Findings) -> list[str]:
    """What the report says about the early queries, a sentence per term."""
    sentences = []
    for name in TERMS:
        if name in report.terms:
            early = report.terms[name].early
            value = f"The early {name} leakage is {shown(name, early)} nats²"
            if early.low > 0:
                sentences.append(f"{value}, a spread of {number(early.root)} nats.")
            elif early.low <= 0 <= early.high:
                sentences.append(f"{value}: it cannot be told from 0.")
            else:
                sentences.append(f"{value}.")
    return sentences


def mods_line(report: Findings) -> str:
    """The mods with their strengths in one line: `truncated_rope at 0.5, learned_sink at 1`."""
    kinds = [str(mod.get("kind", "?")) for mod in report.model.mods]
    strengths = report.model.strength
    named = [f"{k} at {strengths[k]:g}" if k in strengths else k for k in kinds]
    return ", ".join(named) or "none"


def provenance(report: Findings) -> str:
    """What someone needs in order to repeat the measurement, protocol first."""
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return (
        f"{protocol_line(report)}\n"
        f"Seed {report.seed}; {report.model.dtype}, attention {report.model.attention}; {versions}; "
        f"measured {report.created}.\n\n    {report.command}"
    )


def protocol_line(report: Findings) -> str:
    """The protocol's hash and fields: `Protocol 3f9c0a12b7de: sequences 384, length 512, ...`."""
    fields = ", ".join(f"{key} {value}" for key, value in report.protocol.items())
    return f"Protocol `{report.protocol_hash}`: {fields}."


def _headline(report: Findings) -> str:
    rows = []
    for name in TERMS:
        for scope in ("early", "all"):
            if name in report.terms:
                estimate: Estimate = getattr(report.terms[name], scope)
                rows.append((label(name, scope), *shown(name, estimate), number(estimate.root)))
    return markdown_table(("leakage", "nats²", "interval", "root, nats"), rows)


def _other_values(report: Findings) -> str:
    rows = []
    for quantity, estimate in (
        ("share", report.share),
        ("closure_gap", report.closure_gap),
        ("held_out_loss", report.held_out_loss),
    ):
        if estimate is not None:
            rows.append((label(quantity, "all"), *shown(quantity, estimate)))
    loss = report.held_out_loss
    if loss is not None:
        ends = interval(math.exp(loss.low), math.exp(loss.high), decimals=1)
        rows.append(("perplexity on the measured crops", number(math.exp(loss.value), decimals=1), ends))
    return markdown_table(("also", "value", "interval"), rows)


def _layers(report: Findings) -> str:
    names = [name for name in TERMS if name in report.terms]
    head = ["layer"]
    for name in names:
        head += [f"{name}, early", "interval", f"{name}, all"]
    if report.sink is not None:
        head.append("mass on BOS")
    rows = []
    for layer in range(report.model.layers):
        row = [str(layer)]
        for name in names:
            term = report.terms[name].layers[layer]
            row += [*shown(name, term.early), number(term.all.value)]
        if report.sink is not None:
            row.append(percent(fmean(report.sink.heads_bos_mass[layer])))
        rows.append(tuple(row))
    return markdown_table(tuple(head), rows)


def _bins(report: Findings) -> str:
    names = [name for name in TERMS if name in report.terms]
    rows = []
    for i, first in enumerate(report.terms[names[0]].bins):
        row = [f"{first.start} to {first.stop - 1}"]
        for name in names:
            row += shown(name, report.terms[name].bins[i])
        rows.append(tuple(row))
    head = ["queries"]
    for name in names:
        head += [name, "interval"]
    return markdown_table(tuple(head), rows)


def _interventions(report: Findings) -> str:
    rows = []
    for entry in report.interventions:
        change = entry.change
        ends = f"[{percent(change.low, signed=True)}, {percent(change.high, signed=True)}]"
        place = "n/a" if entry.rank is None else f"{entry.rank} of {len(entry.reference)}"
        value = shown("residual", entry.early_residual).value
        rows.append((entry.name, value, percent(change.value, signed=True), ends, place))
    head = ("intervention", "early residual", "change", "interval", "random tokens below it")
    return markdown_table(head, rows)


def _controls(report: Findings) -> str:
    rows = []
    for entry in report.controls:
        expected = entry.expected if isinstance(entry.expected, str) else number(entry.expected)
        verdict = "pass" if entry.passed else "FAIL"
        rows.append((entry.name, expected, *shown("control", entry), verdict))
    return markdown_table(("control", "must give", "found", "interval", ""), rows)
