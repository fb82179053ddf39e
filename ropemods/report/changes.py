"""From two reports to changes: every quantity before and after, its difference and its ratio.

**Paired intervals.** With one protocol, replicate r of every report drew the same documents. So a
change is formed replicate by replicate, after_r - before_r (or after_r / before_r), and its
interval is the middle 95% of those (the protocol's `confidence`). What the documents do to both
arms alike cancels. Where the reports do not share their protocol, text and seed, the replicates are
combined at random instead: the intervals are those of two separate measurements, wider and marked
as not paired.

A ratio is given only where the interval of the before value lies above 0: dividing by a number that
may be 0 says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np
import numpy.typing as npt

from ropemods.report.findings import Findings
from ropemods.report.records import Estimate, Sink
from ropemods.report.words import TERMS

SCOPES = ("early", "all")
UNPAIRED_DRAWS = 4000
Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Change:
    """One quantity in two arms. `layer` is None for the whole model; `ratio` is after / before."""

    quantity: str
    scope: str
    layer: int | None = None
    before: Estimate
    after: Estimate
    delta: Estimate
    ratio: Estimate | None

    @property
    def clear(self) -> bool:
        """Whether the interval of the difference leaves out 0."""
        return self.delta.low > 0 or self.delta.high < 0


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """Every change from one arm to another."""

    before: str
    after: str
    paired: bool
    changes: tuple[Change, ...]

    def find(self, quantity: str, scope: str = "all", *, layer: int | None = None) -> Change | None:
        """The change of a quantity, or None where one of the arms did not measure it."""
        for change in self.changes:
            if (change.quantity, change.scope, change.layer) == (quantity, scope, layer):
                return change
        return None


@dataclass(frozen=True, kw_only=True, repr=False)
class Contrasts:
    """Named arms and the contrasts between them; the first contrast is the headline.

    `differences` names what the arms' protocols do not share, and is empty unless that was allowed. `Comparison`
    (`comparison.py`) is the same record with ways to show it.
    """

    arms: Mapping[str, Findings]
    contrasts: tuple[Contrast, ...]
    differences: tuple[str, ...] = field(default=())

    @property
    def headline(self) -> Contrast:
        """The contrast that answers the question."""
        return self.contrasts[0]


def contrast(name_a: str, a: Findings, name_b: str, b: Findings, *, paired: bool) -> Contrast:
    """Every change from a to b. `paired` says that their replicates drew the same documents."""
    before, after = quantities(a), quantities(b)
    if a.model.layers != b.model.layers:  # layer 3 of one is not layer 3 of the other
        before = {key: estimate for key, estimate in before.items() if key[2] is None}
    confidence = min(float(r.protocol["confidence"]) for r in (a, b))
    changes = tuple(
        _change(*key, before=before[key], after=after[key], paired=paired, confidence=confidence)
        for key in before
        if key in after
    )
    return Contrast(before=name_a, after=name_b, paired=paired, changes=changes)


def quantities(report: Findings) -> dict[tuple[str, str, int | None], Estimate]:
    """Every estimate of a report by (quantity, scope, layer), headline first."""
    found: dict[tuple[str, str, int | None], Estimate] = {}
    for name in TERMS:
        for scope in SCOPES:
            if name in report.terms:
                found[name, scope, None] = getattr(report.terms[name], scope)
    for quantity, value in (
        ("held_out_loss", report.held_out_loss),
        ("share", report.share),
        ("closure_gap", report.closure_gap),
    ):
        if value is not None:
            found[quantity, "all", None] = value
    if report.sink is not None:
        found["bos_mass", "all", None] = _bos_mass(report.sink)
        if report.sink.position1_mass_all is not None:
            found["position1_mass", "all", None] = report.sink.position1_mass_all
    for name in TERMS:
        for scope in SCOPES:
            for layer, row in enumerate(report.terms[name].layers if name in report.terms else ()):
                found[name, scope, layer] = getattr(row, scope)
    return found


def _bos_mass(sink: Sink) -> Estimate:
    if sink.bos_mass_all is not None:
        return sink.bos_mass_all
    return Estimate(fmean(map(fmean, sink.heads_bos_mass)), math.nan, math.nan)


def _change(
    quantity: str,
    scope: str,
    layer: int | None,
    *,
    before: Estimate,
    after: Estimate,
    paired: bool,
    confidence: float,
) -> Change:
    replicates = _replicates(before, after, paired=paired)
    delta = _combine(before, after, lambda b, a: a - b, replicates, confidence)
    ratio = None
    if before.low > 0:
        ratio = _combine(before, after, lambda b, a: a / b, replicates, confidence)
    return Change(
        quantity=quantity,
        scope=scope,
        layer=layer,
        before=before,
        after=after,
        delta=delta,
        ratio=ratio,
    )


def _replicates(before: Estimate, after: Estimate, *, paired: bool) -> tuple[Array, Array]:
    """Replicates of both that may be combined one by one."""
    before_R, after_R = np.asarray(before.replicates), np.asarray(after.replicates)
    if paired or not len(before_R) or not len(after_R):
        return before_R, after_R
    draw = np.random.default_rng(0)
    return draw.choice(before_R, UNPAIRED_DRAWS), draw.choice(after_R, UNPAIRED_DRAWS)


def _combine(
    before: Estimate,
    after: Estimate,
    combine: Callable[[Array, Array], Array],
    replicates: tuple[Array, Array],
    confidence: float,
) -> Estimate:
    """The combined value, with the middle of its combined replicates as its interval."""
    value = float(combine(np.array(before.value), np.array(after.value)))
    before_R, after_R = replicates
    if not len(before_R) or not len(after_R):
        return Estimate(value, math.nan, math.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        combined_R = combine(before_R, after_R)
    low, high = np.quantile(combined_R, (0.5 - confidence / 2, 0.5 + confidence / 2))
    return Estimate(value, float(low), float(high), tuple(combined_R.tolist()))
