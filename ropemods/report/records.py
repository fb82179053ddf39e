"""The parts of a report: estimates, terms, sink, entropy, usage, interventions, controls, and the facts of the run.

They hold numbers only, no tensors, so reading a report needs neither torch nor the model. An `Estimate` carries its
bootstrap replicates: two reports of one protocol drew the same documents in replicate r, so differences can be formed
replicate by replicate, and their intervals leave out what the two have in common.

Letters: L layers, H query heads, G key heads, F frequency bands, R bootstrap replicates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Grid = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval and, where they were kept, its R bootstrap replicates."""

    value: float
    low: float
    high: float
    replicates: tuple[float, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(f"an interval runs from low to high; found {self.low} to {self.high}")

    @property
    def root(self) -> float:
        """√max(value, 0): the spread in nats. An estimate below 0 has the root 0."""
        return math.sqrt(max(self.value, 0.0)) if not math.isnan(self.value) else math.nan


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Leakage of the queries start ≤ i < stop, mean over layers and heads."""

    start: int = field(metadata={"key": "from"})
    stop: int = field(metadata={"key": "to"})
    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class LayerTerm:
    """One layer's leakage, mean over its heads."""

    all: Estimate
    early: Estimate


@dataclass(frozen=True, kw_only=True)
class HeadTerm:
    """Every head's leakage [L][H], values only."""

    all: Grid
    early: Grid


@dataclass(frozen=True, kw_only=True)
class Term:
    """One of residual, mask and total. `all` and `early` are means over layers and heads."""

    all: Estimate
    early: Estimate
    layers: tuple[LayerTerm, ...]
    heads: HeadTerm
    bins: tuple[Bin, ...]
    layer_bins: Grid


@dataclass(frozen=True, kw_only=True)
class Sink:
    """Attention to BOS and to position 1, by query, mean over heads [L][query].

    `bos_mass_all` and `position1_mass_all` are means over layers, heads and queries. They are the
    only ones with replicates, so without them a comparison gives sink mass without an interval.
    """

    query: tuple[int, ...]
    bos_mass: Grid
    bos_logit: Grid
    position1_mass: Grid
    heads_bos_mass: Grid
    bos_mass_all: Estimate | None = None
    position1_mass_all: Estimate | None = None


@dataclass(frozen=True, kw_only=True)
class Entropy:
    """Entropy of attention rows in nats: by query bin [L][bin], and per head [L][H]."""

    bins: tuple[tuple[int, ...], ...]
    layers: Grid
    heads: Grid


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Mean 2-norm of every rotated pair: wavelengths [L][F], query [L][H][F], key [L][G][F]."""

    wavelengths: Grid
    query: tuple[Grid, ...]
    key: tuple[Grid, ...]
    largest_channels: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # JSON wrote the infinite wavelength of a band that does not rotate as null.
        finite = (tuple(math.inf if math.isnan(w) else w for w in row) for row in self.wavelengths)
        object.__setattr__(self, "wavelengths", tuple(finite))


@dataclass(frozen=True, kw_only=True)
class Intervention:
    """What a change at position 0, or of the model, does to the early residual.

    change: residual with the intervention / residual without it, minus 1. -0.72 is 72% less.
    reference: the same change under random vocabulary tokens at position 0.
    rank: how many of the reference changes lie below this one; None where none were measured.
    """

    name: str
    kind: str
    early_residual: Estimate
    change: Estimate
    rank: int | None = None
    reference: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Control:
    """A measurement whose answer is known beforehand."""

    name: str
    expected: float | str
    value: float
    low: float
    high: float
    passed: bool


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The model that was measured; `mods` as in `config.ropemods`, strength by kind of mod."""

    name: str
    type: str
    layers: int
    heads: int
    parameters: int
    dtype: str
    attention: str
    mods: tuple[Mapping[str, Any], ...] = ()
    strength: Mapping[str, float] = field(default_factory=dict)
    rope: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TextFacts:
    """The text that was measured on. `digest` is a hash of the token ids of the very crops."""

    source: str
    documents: int
    sequences: int
    tokens: int
    digest: str | None = None
