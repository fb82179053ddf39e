"""What backs the numbers: interventions, controls, notes, and where everything came from."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ropemods.report.html.axes import around
from ropemods.report.html.charts import strips
from ropemods.report.html.layout import Arm, figure, folded, grid, section, table
from ropemods.report.html.markup import Child, Markup, element, minus
from ropemods.report.markdown import mods_line
from ropemods.report.words import NO_VALUE, count, number, percent, shown
from ropemods.settings.json_records import encode


def interventions(arms: Sequence[Arm]) -> Markup | None:
    """Each intervention's effect on the early residual, over the reference of random tokens."""
    found = [arm for arm in arms if arm.report.interventions]
    if not found:
        return None
    every = [entry for arm in found for entry in arm.report.interventions]
    points = [value for e in every for value in (e.change.value, *e.reference)]
    limits = around(points, room=0.1)
    figures, tables = [], []
    for arm in found:
        entries = arm.report.interventions
        title = f"Interventions on {arm.name}"
        strip = [(e.name, e.change, e.reference) for e in entries]
        drawing = strips(strip, look=arm.look, title=title, limits=limits)
        figures.append(figure(title, drawing))
        rows: list[list[Child]] = []
        for entry in entries:
            change = entry.change
            ends = f"[{percent(change.low, signed=True)}, {percent(change.high, signed=True)}]"
            place = NO_VALUE if entry.rank is None else f"{entry.rank} of {len(entry.reference)}"
            value, interval = shown("residual", entry.early_residual)
            told = [value, interval, percent(change.value, signed=True), ends, place]
            rows.append([entry.name, *told])
        head = ("", "early residual", "interval", "change", "interval", "random tokens below it")
        tables.append(table(head, rows, caption=title))
    words = (
        "What happens to the early residual when position 0 is changed. The grey dots are random "
        "vocabulary tokens in place of BOS: a swap says something about BOS only where it stands "
        "apart from them."
    )
    return section(
        "interventions",
        "Interventions",
        element("p", words),
        grid(*figures, name="interventions"),
        folded("As a table", *tables),
    )


def controls(arms: Sequence[Arm]) -> Markup | None:
    """Measurements whose answer is known, and whether it came out."""
    found = [arm for arm in arms if arm.report.controls]
    if not found:
        return None
    tables = []
    for arm in found:
        rows: list[list[Child]] = []
        for entry in arm.report.controls:
            expected = entry.expected if isinstance(entry.expected, str) else number(entry.expected)
            value, interval = shown("control", entry)
            sign, look = ("✓ pass", "pass") if entry.passed else ("✗ FAIL", "fail")
            verdict = element("span", sign, class_=f"verdict {look}")
            rows.append([entry.name, verdict, expected, minus(value), minus(interval)])
        passed = sum(entry.passed for entry in arm.report.controls)
        caption = f"{arm.name}: {passed} of {len(arm.report.controls)} controls pass"
        head = ("control", "", "must give", "found", "interval")
        tables.append(table(head, rows, caption=caption, words=True))
    return section("controls", "Controls", *tables)


def notes(arms: Sequence[Arm], differences: Sequence[str]) -> Markup | None:
    """What a reader must know before the numbers: undefined terms, protocols that differ."""
    said_by: dict[str, list[str]] = {}
    for arm in arms:
        for control in arm.report.controls:
            if not control.passed:
                text = f"the control “{control.name}” did not give its known answer."
                said_by.setdefault(text, []).append(arm.name)
        for note in arm.report.notes:
            said_by.setdefault(note, []).append(arm.name)
    items = [f"Measured differently: {difference}." for difference in differences]
    for text, names in said_by.items():
        who = "all arms" if len(names) == len(arms) > 1 else ", ".join(names)
        items.append(f"{who}: {text}")
    if not items:
        return None
    listed = element("ul", [element("li", item) for item in items])
    return element("div", element("strong", "Read first"), listed, class_="notes")


def provenance(arms: Sequence[Arm]) -> Markup:
    """Model, mods, text, versions, seed, protocol and command of every arm."""
    facts = [_facts(arm) for arm in arms]
    rows: list[list[Child]] = [[name, *(f[name] for f in facts)] for name in facts[0]]
    head = ("", *(arm.name for arm in arms))
    return section(
        "provenance",
        "Where the numbers come from",
        table(head, rows, caption="Model, text, protocol, versions and command", words=True),
    )


def _facts(arm: Arm) -> dict[str, Child]:
    report = arm.report
    model, text = report.model, report.text
    shape = f"{model.type}, {model.layers} layers × {model.heads} heads, {count(model.parameters)}"
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    read = f"{text.sequences:,} sequences of {text.documents:,} documents, {count(text.tokens)} tokens"
    protocol = ", ".join(f"{key} {value}" for key, value in report.protocol.items())
    return {
        "model": model.name,
        "architecture": f"{shape} parameters",
        "mods": mods_line(report),
        "mods, in full": element("code", json.dumps(encode(model.mods))) if model.mods else "none",
        "rope": element("code", json.dumps(encode(model.rope))),
        "computed in": f"{model.dtype}, attention {model.attention}",
        "text": f"{text.source}: {read}",
        "crops": element("code", text.digest) if text.digest else "no digest",
        "protocol": element("span", element("code", report.protocol_hash), f" {protocol}"),
        "seed": str(report.seed),
        "versions": versions,
        "measured": report.created,
        "command": element("code", report.command),
    }
