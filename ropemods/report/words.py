"""The words and number formats that every table, page and message shares.

A quantity has one name everywhere: in the Python API, on the command line, in Markdown and on the
page. What the names mean for someone new is in `evals/READING.md`; the formulas are in
`ropemods.leakage`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

TERMS: Final = ("residual", "mask", "total")

TERM_MEANING: Final = {
    "residual": "position read from the queries and keys themselves: the same few offsets in every "
    "denominator, so the causal mask cannot contribute",
    "mask": "position read from the causal mask: logits that depend on the offset alone, but a "
    "softmax whose number of keys grows with the query",
    "total": "what the attention pattern shows, from both sources",
}

SCOPE_NAME: Final = {"early": "early queries", "all": "all queries"}

QUANTITY_NAME: Final = {
    "held_out_loss": "loss on the measured crops, nats per token",
    "share": "residual's share of residual + mask",
    "closure_gap": "closure gap, residual + mask - total, nats²",
    "bos_mass": "attention mass on BOS",
    "position1_mass": "attention mass on position 1",
}

# Fractions of 1, written as percentages; their differences in percentage points.
FRACTIONS: Final = ("share", "bos_mass", "position1_mass")

NO_VALUE: Final = "n/a"


class HasInterval(Protocol):
    """A value with the ends of its 95% interval."""

    @property
    def value(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


class Shown(NamedTuple):
    """A value and its interval as text."""

    value: str
    interval: str

    def __str__(self) -> str:
        return self.value if self.interval == NO_VALUE else f"{self.value} {self.interval}"


def label(quantity: str, scope: str) -> str:
    """The name of a quantity: `residual, early queries`, `attention mass on BOS`."""
    return QUANTITY_NAME.get(quantity) or f"{quantity}, {SCOPE_NAME[scope]}"


def basis(protocol: Mapping[str, Any]) -> str:
    """What the tables leave unsaid: which queries are early, and what the intervals are."""
    first, stop = protocol["early"]
    return (
        f"Early queries are {first} to {stop - 1} of {protocol['length']}. Intervals are "
        f"{percent(protocol['confidence'])}, from a bootstrap over documents."
    )


def shown(quantity: str, estimate: HasInterval, *, signed: bool = False) -> Shown:
    """An estimate in the format of its quantity. `signed` is for differences."""
    value, low, high = estimate.value, estimate.low, estimate.high
    if quantity in FRACTIONS:
        value, low, high = 100 * value, 100 * low, 100 * high
        unit, decimals = (" pp", 1) if signed else ("%", 1)
    elif quantity == "held_out_loss":
        unit, decimals = "", 3
    else:
        unit, decimals = "", decimals_for(value, low, high)
    text = number(value, decimals=decimals, signed=signed)
    ends = interval(low, high, decimals=decimals, signed=signed)
    return Shown(text if text == NO_VALUE else text + unit, ends)


def shown_ratio(ratio: HasInterval | None) -> Shown:
    """A ratio as a relative change: 0.36 is -64%."""
    if ratio is None:
        return Shown(NO_VALUE, NO_VALUE)
    ends = f"[{percent(ratio.low - 1, signed=True)}, {percent(ratio.high - 1, signed=True)}]"
    known = not (math.isnan(ratio.low) or math.isnan(ratio.high))
    return Shown(percent(ratio.value - 1, signed=True), ends if known else NO_VALUE)


def number(value: float, *, decimals: int | None = None, signed: bool = False) -> str:
    """Three significant digits, or the given decimals; `n/a` for a value that is not a number."""
    if math.isnan(value):
        return NO_VALUE
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    sign = "+" if signed and value > 0 else ""
    if decimals is None:
        decimals = decimals_for(value)
    if decimals > 7 and value != 0:
        return f"{sign}{value:.1e}"
    text = f"{value:.{min(decimals, 6)}f}" if value else "0"
    if float(text) == 0:
        return "0"
    return sign + text


def decimals_for(*values: float) -> int:
    """Decimals that give the largest of the values three significant digits."""
    largest = max((abs(v) for v in values if math.isfinite(v)), default=0.0)
    if largest == 0:
        return 2
    return max(0, 2 - math.floor(math.log10(largest)))


def interval(low: float, high: float, *, decimals: int, signed: bool = False) -> str:
    """`[low, high]`, or `n/a` when no interval is known."""
    if math.isnan(low) or math.isnan(high):
        return NO_VALUE
    ends = (number(v, decimals=decimals, signed=signed) for v in (low, high))
    return f"[{', '.join(ends)}]"


def percent(fraction: float, *, signed: bool = False) -> str:
    """A fraction as a percentage: one decimal below 10%, none above."""
    if math.isnan(fraction):
        return NO_VALUE
    value = 100 * fraction
    return number(value, decimals=1 if abs(value) < 9.95 else 0, signed=signed) + "%"


def count(value: int) -> str:
    """A count that a person reads: 3.2M rather than 3224832, 409,600 rather than 409600."""
    for size, letter in ((10**9, "B"), (10**6, "M")):
        if value >= 0.9995 * size and value >= 10**6:  # what rounds to 1000M is 1.0B
            scaled = value / size
            return f"{scaled:.1f}{letter}" if scaled < 99.95 else f"{scaled:.0f}{letter}"
    return f"{value:,}"


def markdown_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table: the first column to the left, the others to the right."""
    rule = "|---|" + "---:|" * (len(head) - 1)
    lines = ["| " + " | ".join(_cell(c) for c in row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], rule, *lines[1:]])


def _cell(text: str) -> str:
    # A pipe or a line break inside a model's name would break the table.
    return text.replace("|", "\\|").replace("\n", " ")
