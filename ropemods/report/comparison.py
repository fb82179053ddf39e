"""Compare reports: what changed, by how much, and whether the change is more than noise.

    comparison = compare("before.json", "after.json")
    print(comparison.to_markdown())
    comparison.to_html("comparison.html")

A fine-tune has four arms: the base model, the base with the mods but untrained, a control
fine-tuned without the mods, and the modified one. The fair question is modified against control,
because training alone moves leakage too:

    compare_arms({"base": r0, "untrained": r1, "control": r2, "modified": r3})

Intervals of changes are paired (see `changes`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ropemods.report.changes import Change, Contrast, Contrasts, contrast, quantities
from ropemods.report.markdown import mods_line
from ropemods.report.notebook import InNotebook, Row, cells_of
from ropemods.report.report import Report
from ropemods.report.words import shown
from ropemods.settings.files import write_text
from ropemods.settings.json_records import dumps, encode

if TYPE_CHECKING:
    from ropemods.report.html.alone import Figure

COMPARISON_SCHEMA = 1

__all__ = ["Change", "Comparison", "Contrast", "compare", "compare_arms"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Comparison(Contrasts, InNotebook):
    """Named arms and the contrasts between them; the first contrast is the headline."""

    arms: Mapping[str, Report]

    def to_markdown(self) -> str:
        """All arms side by side, then the changes of the headline, whole model and by layer."""
        from ropemods.report.comparison_tables import comparison_markdown

        return comparison_markdown(self)

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write a self-contained page: no network, no libraries, light and dark."""
        from ropemods.report.html import render_page

        return write_text(path, render_page(self.arms, self))

    def _repr_html_(self) -> str:
        from ropemods.report.html.alone import opening_part

        return opening_part(self.arms, self)

    @property
    def figures(self) -> Mapping[str, Figure]:
        """Every figure of the page, by name."""
        from ropemods.report.html.alone import figures

        return figures(self.arms, self)

    def _tables(self) -> Mapping[str, Iterable[Row]]:
        return {
            "changes": [
                {"from": each.before, "to": each.after, "paired": each.paired, **cells_of(change)}
                for each in self.contrasts
                for change in each.changes
            ],
            "arms": [
                {"arm": name, "model": report.model.name, "mods": mods_line(report), "dtype": report.model.dtype}
                | cells_of(report.text)
                | {"command": report.command}
                for name, report in self.arms.items()
            ],
        }

    def to_json(self, path: str | os.PathLike[str]) -> Path:
        """Write values and intervals of every contrast; the replicates stay in the reports."""
        arms = {
            name: {
                "model": encode(report.model),
                "text": encode(report.text),
                "seed": report.seed,
                "protocol_hash": report.protocol_hash,
                "versions": encode(report.versions),
                "created": report.created,
                "command": report.command,
            }
            for name, report in self.arms.items()
        }
        data = {
            "schema": COMPARISON_SCHEMA,
            "kind": "comparison",
            "arms": arms,
            "differences": list(self.differences),
            "contrasts": [_without_replicates(encode(contrast)) for contrast in self.contrasts],
        }
        return write_text(path, dumps(data))

    def __str__(self) -> str:
        parts = [f"{self.headline.before} to {self.headline.after}"]
        for label, quantity, scope in (
            ("early residual", "residual", "early"),
            ("loss on the measured crops", "held_out_loss", "all"),
        ):
            change = self.headline.find(quantity, scope)
            if change is not None:
                parts.append(f"{label} {shown(quantity, change.delta, signed=True).value}")
        return f"Comparison({'; '.join(parts)})"

    __repr__ = __str__


def compare(
    before: Report | str | os.PathLike[str],
    after: Report | str | os.PathLike[str],
    *,
    allow_different_protocols: bool = False,
) -> Comparison:
    """Compare two reports, given as reports or as paths of their JSON files."""
    arms = {"before": before, "after": after}
    return compare_arms(arms, allow_different_protocols=allow_different_protocols)


def compare_arms(
    arms: Mapping[str, Report | str | os.PathLike[str]],
    *,
    headline: tuple[str, str] | None = None,
    allow_different_protocols: bool = False,
) -> Comparison:
    """Compare named arms in their given order.

    The headline is (before, after): by default ("control", "modified") where both are there, else
    the first arm and the last. The first arm is contrasted with every other one besides.
    """
    if len(arms) < 2:
        raise ValueError(f"a comparison needs at least two arms; found {list(arms)}")
    if headline is None:
        four_arms = {"control", "modified"} <= set(arms)
        headline = ("control", "modified") if four_arms else (next(iter(arms)), list(arms)[-1])
    missing = [name for name in headline if name not in arms]
    if missing or headline[0] == headline[1]:
        raise ValueError(f"headline={headline} must name two different arms of {list(arms)}")

    reports = {name: arm if isinstance(arm, Report) else Report.from_json(arm) for name, arm in arms.items()}
    first = next(iter(reports))
    differences = tuple(
        difference
        for name, report in reports.items()
        if name != first
        for difference in _differences(first, reports[first], name, report)
    )
    if differences and not allow_different_protocols:
        raise ValueError(
            "these reports were not measured alike, so a difference between them would not be one "
            "of the models: " + "; ".join(differences) + ". Measure again with one protocol, text "
            "and seed, or pass allow_different_protocols=True for unpaired intervals."
        )
    pairs = [headline] + [(first, name) for name in reports if name != first]
    contrasts = (
        contrast(a, reports[a], b, reports[b], paired=not _differences(a, reports[a], b, reports[b]))
        for a, b in dict.fromkeys(pairs)
    )
    return Comparison(arms=reports, contrasts=tuple(contrasts), differences=differences)


def _differences(name_a: str, a: Report, name_b: str, b: Report) -> list[str]:
    """What two measurements do not share, in words; raises where they cannot be compared at all."""
    length_a, length_b = a.protocol.get("length"), b.protocol.get("length")
    if length_a != length_b:
        raise ValueError(
            f"sequence length is {length_a} in {name_a} and {length_b} in {name_b}: leakage is a "
            "mean over query positions, so reports of different lengths are never compared. "
            "Measure one of them again."
        )
    found = []
    if a.protocol_hash != b.protocol_hash:
        # batch_size moves no number and is no part of the hash.
        for key in sorted({*a.protocol, *b.protocol} - {"batch_size"}):
            left, right = a.protocol.get(key, "absent"), b.protocol.get(key, "absent")
            if left != right:
                found.append(f"protocol.{key} is {left!r} in {name_a}, {right!r} in {name_b}")
        if not found:
            found.append(f"protocol hash is {a.protocol_hash} in {name_a}, {b.protocol_hash} in {name_b}")
    replicates = tuple(next((len(estimate.replicates) for estimate in quantities(r).values()), 0) for r in (a, b))
    pairs: dict[str, tuple[object, object]] = {
        "seed": (a.seed, b.seed),
        "number of replicates": (replicates[0], replicates[1]),
    }
    for key in ("source", "documents", "sequences", "tokens", "digest"):
        pairs[f"text.{key}"] = (getattr(a.text, key), getattr(b.text, key))
    found += [
        f"{key} is {left!r} in {name_a}, {right!r} in {name_b}" for key, (left, right) in pairs.items() if left != right
    ]
    return found


def _without_replicates(value: object) -> object:
    if isinstance(value, dict):
        return {k: _without_replicates(v) for k, v in value.items() if k != "replicates"}
    if isinstance(value, list):
        return [_without_replicates(item) for item in value]
    return value
