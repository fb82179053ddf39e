"""What a menu of modifications does to a model before any training: the records, what follows from them, and a table.

Every change is against the untouched model on the same crops, formed replicate by replicate, so that what the documents
do to both drops out. Leakage is that of early queries, mean of layers 1 and up: the first layer sees words only.

**The choice.** A modification helps where the interval of its early residual lies below 0, the one of its total not
above 0, and the one of its loss below +1%: position that leaves the residual for the mask is not gone. Of those that
help, the one that lowers the residual most is chosen, and where none does, none is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Final

import numpy as np

from ropemods.report.findings import Findings
from ropemods.report.records import Estimate, Term, TextFacts
from ropemods.report.words import NO_VALUE, TERMS, interval, markdown_table, number, percent, shown

CHANGES: Final = ("loss", "residual", "mask", "total")
"""Quantities whose change is relative to the untouched model's."""
MASSES: Final = ("bos_mass", "position1_mass")
"""Quantities that may begin near 0, and are given as they are."""
HEAD: Final = {
    "loss": "loss",
    "residual": "early residual",
    "mask": "early mask",
    "total": "early total",
    "bos_mass": "mass on BOS",
    "position1_mass": "on position 1",
}
MOST_LOSS: Final = 0.01
"""A rise of the loss, as a share of it, from which on it is too dear."""


@dataclass(frozen=True, kw_only=True)
class Try:
    """One modification, untrained, at strength 1."""

    name: str
    mod: Mapping[str, Any]
    """As in `config.ropemods`."""
    in_recipes: bool
    """Whether a recipe can name it: the library's, or one of the user's in a module that can be imported."""
    changes: Mapping[str, Estimate]
    """Of `CHANGES`, relative: 0.01 is one percent more. Absent where the model's own value is not above its noise."""
    masses: Mapping[str, Estimate]
    time: Estimate
    """Of a forward pass, in those of the same model at strength 0; the ends are the fastest and the slowest pair."""

    @property
    def helps(self) -> bool:
        residual, total, loss = (self.changes.get(name) for name in ("residual", "total", "loss"))
        if residual is None or loss is None:
            return False
        return residual.high < 0 and (total is None or total.low <= 0) and loss.high < MOST_LOSS


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A modification of the menu that this model does not take."""

    name: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Tries:
    """A menu, tried on one model."""

    model: str
    text: TextFacts
    text_tokens: int
    """About so many does the whole text have."""
    bos_token_id: int
    protocol: Mapping[str, Any]
    protocol_hash: str
    stock: Mapping[str, Estimate]
    tries: tuple[Try, ...]
    refused: tuple[Refused, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def chosen(self) -> Try | None:
        """The modification that lowers the residual most, of those that help."""
        helping = [each for each in self.tries if each.helps]
        return min(helping, key=lambda each: each.changes["residual"].value) if helping else None

    @property
    def reason(self) -> str:
        """What follows from the figures, in words."""
        stock, chosen = self.stock["residual"], self.chosen
        if not stock.low > 0:
            return (
                f"the early residual of this model is {number(stock.value)} nats², not above its noise on this text, "
                "so there is nothing that a modification could be seen to lower"
            )
        if chosen is not None:
            return (
                f"{chosen.name} lowers the early residual most of those that leave the total and the loss where they "
                f"are: {_told(chosen)}. The best of {len(self.tries)} looks a little better than it is; the recipe "
                "measures it again, trained and beside a control"
            )
        lower = [each for each in self.tries if each.changes["residual"].high < 0]
        if not lower:
            return "nothing helps: no modification of the menu lowers the early residual before training"
        nearest = min(lower, key=lambda each: each.changes["residual"].value)
        return (
            "nothing helps: what lowers the early residual raises the total, or may cost "
            f"{MOST_LOSS:.0%} of the loss; {nearest.name} lowers it most: {_told(nearest)}"
        )

    def to_markdown(self) -> str:
        rows = [("the model itself", *(shown_stock(self.stock, name) for name in HEAD), "1")]
        rows += [(each.name, *(shown_change(each, name) for name in HEAD), shown_time(each)) for each in self.tries]
        parts = [
            f"## Tried, untrained, at strength 1\n\n{self.basis()}",
            markdown_table(("modification", *HEAD.values(), "time"), rows),
            f"**What follows**: {self.reason}. {self.remedy()}",
        ]
        if self.refused:
            parts.append("Not tried:\n\n" + "\n".join(f"- {each.name}: {each.why}" for each in self.refused))
        if self.notes:
            parts.append("\n".join(f"- {note}" for note in self.notes))
        return "\n\n".join(parts)

    def basis(self) -> str:
        """What the table leaves unsaid."""
        first, stop = self.protocol["early"]
        return (
            f"{self.text.sequences} crops of {self.protocol['length']} tokens of {self.text.source}, the same for each "
            f"modification. Loss and leakage are changes against the model itself, with "
            f"{percent(self.protocol['confidence'])} intervals over documents; early queries are {first} to "
            f"{stop - 1}, leakage is the mean of layers 1 and up. Time is that of a forward pass, in those of the "
            "model at strength 0, with the fastest and the slowest pair."
        )

    def remedy(self) -> str:
        """What the recipe does about it."""
        if not self.stock["residual"].low > 0:
            return "The recipe holds a penalty alone, which is what lowers leakage where there is some."
        return (
            "A penalty in the loss is what trains leakage away, so the recipe has one, beside the modification."
            if self.chosen is not None
            else "A penalty in the loss is what trains leakage away, so the recipe has one, and no modification."
        )


def values(report: Findings) -> dict[str, Estimate]:
    """What is compared of a report, with its replicates."""
    assert report.sink is not None and report.held_out_loss is not None
    assert report.sink.bos_mass_all is not None and report.sink.position1_mass_all is not None
    return {
        "loss": report.held_out_loss,
        **{name: upper_layers(report.terms[name]) for name in TERMS if name in report.terms},
        "bos_mass": report.sink.bos_mass_all,
        "position1_mass": report.sink.position1_mass_all,
    }


def upper_layers(term: Term) -> Estimate:
    """A term's early leakage, mean of layers 1 and up; of the only layer, where there is one."""
    layers = [layer.early for layer in term.layers[1:] or term.layers]
    replicates_R = np.mean([layer.replicates for layer in layers], axis=0)
    low, high = np.quantile(replicates_R, (0.025, 0.975))
    return Estimate(fmean(layer.value for layer in layers), float(low), float(high), tuple(replicates_R.tolist()))


def relative(after: Estimate, before: Estimate, confidence: float = 0.95) -> Estimate | None:
    """after / before − 1, replicate by replicate; None where `before` is not above its noise."""
    if not before.low > 0:
        return None
    changes_R = np.asarray(after.replicates) / np.asarray(before.replicates) - 1
    low, high = np.quantile(changes_R, (0.5 - confidence / 2, 0.5 + confidence / 2))
    return Estimate(after.value / before.value - 1, float(low), float(high))


def shown_stock(stock: Mapping[str, Estimate], name: str) -> str:
    if name not in stock:
        return NO_VALUE
    return shown("held_out_loss" if name == "loss" else name, stock[name]).value


def shown_change(each: Try, name: str) -> str:
    """A change with its interval, or a mass as it is."""
    if name in each.masses:
        return percent(each.masses[name].value)
    change = each.changes.get(name)
    return NO_VALUE if change is None else " ".join(in_percent(change, name))


def in_percent(change: Estimate, name: str) -> tuple[str, str]:
    """A relative change and its interval; of the loss, hundredths of a percent count."""
    value, low, high = (100 * each for each in (change.value, change.low, change.high))
    decimals = 2 if name == "loss" else 1 if abs(value) < 9.95 else 0
    ends = interval(low, high, decimals=decimals, signed=True)
    return f"{number(value, decimals=decimals, signed=True)}%", ends


def shown_time(each: Try) -> str:
    return f"× {each.time.value:.2f} {interval(each.time.low, each.time.high, decimals=2)}"


def _told(each: Try) -> str:
    told = [
        f"{HEAD[name]} {shown_change(each, name)}" for name in ("residual", "total", "loss") if name in each.changes
    ]
    return ", ".join(told)
