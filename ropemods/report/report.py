"""A report: everything one measurement found, as a frozen record that is also a file.

`Report` mirrors the JSON file field by field. It holds numbers only, no tensors, so reading a
report needs neither torch nor the model. An `Estimate` carries its bootstrap replicates: two
reports of one protocol drew the same documents in replicate r, so differences can be formed
replicate by replicate, and their intervals leave out what the two have in common.

    report = Report.from_json("before.json")
    print(report.to_markdown())
    report.to_html("before.html")

Units: leakage in nats², loss in nats per token. NaN is a value that is not defined (null in JSON);
`notes` says why. A wavelength that is not finite belongs to a band that does not rotate.

Letters: L layers, H query heads, G key heads, F frequency bands, R bootstrap replicates.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ropemods.report.words import TERMS, count, number
from ropemods.settings.files import read_text, write_text
from ropemods.settings.json_records import RecordError, decode, dumps, encode

SCHEMA = 1

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


@dataclass(frozen=True, kw_only=True, repr=False)
class Report:
    """All of one measurement. Sections that were not measured are None or empty."""

    created: str
    command: str
    seed: int
    versions: Mapping[str, str]
    protocol: Mapping[str, Any]
    protocol_hash: str
    model: ModelFacts
    text: TextFacts
    terms: Mapping[str, Term]
    held_out_loss: Estimate | None = None
    closure_gap: Estimate | None = None
    share: Estimate | None = None
    sink: Sink | None = None
    entropy: Entropy | None = None
    usage: Usage | None = None
    interventions: tuple[Intervention, ...] = ()
    controls: tuple[Control, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        missing = [key for key in ("length", "early", "confidence") if key not in self.protocol]
        if missing:
            raise ValueError(f"protocol has no {missing}, which every report states")
        unknown = sorted(set(self.terms) - set(TERMS))
        if unknown:
            raise ValueError(f"unknown terms {unknown}; a report knows {list(TERMS)}")
        L, H = self.model.layers, self.model.heads
        for name, term in self.terms.items():
            _expect_length(f"terms.{name}.layers", term.layers, L)
            _expect_length(f"terms.{name}.layer_bins", term.layer_bins, L, len(term.bins))
            _expect_length(f"terms.{name}.heads.all", term.heads.all, L, H)
            _expect_length(f"terms.{name}.heads.early", term.heads.early, L, H)
        if self.sink is not None:
            for name in ("bos_mass", "bos_logit", "position1_mass"):
                _expect_length(f"sink.{name}", getattr(self.sink, name), L, len(self.sink.query))
            _expect_length("sink.heads_bos_mass", self.sink.heads_bos_mass, L, H)
        if self.entropy is not None:
            _expect_length("entropy.layers", self.entropy.layers, L, len(self.entropy.bins))
            _expect_length("entropy.heads", self.entropy.heads, L, H)
        if self.usage is not None:
            for name in ("wavelengths", "query", "key"):
                _expect_length(f"usage.{name}", getattr(self.usage, name), L)

    def to_json(self, path: str | os.PathLike[str]) -> Path:
        """Write the report to `path`, whole or not at all."""
        return write_text(path, dumps({"schema": SCHEMA, **encode(self)}))

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Report:
        """Read a report. A file of another schema, or a damaged one, is an error that says so."""
        text = read_text(path)
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise RecordError(
                f"{path} is not JSON (line {error.lineno}: {error.msg}). Was it cut short? "
                "Measure again, or restore the file."
            ) from None
        except RecursionError:
            raise RecordError(f"{path} is not a ropemods report: its lists are nested too deeply") from None
        if not isinstance(data, dict) or "schema" not in data:
            raise RecordError(
                f"{path} is not a ropemods report: it has no 'schema' key. "
                "Reports are written by `ropemods measure` and Report.to_json."
            )
        schema = data.pop("schema")
        if schema != SCHEMA:
            raise RecordError(_other_schema(path, schema, data))
        try:
            report: Report = decode(cls, data, "report")
        except RecordError as error:
            raise RecordError(f"{path}: {error}") from None
        return report

    def to_markdown(self) -> str:
        """Tables of the headline, the layers, and whatever else was measured."""
        from ropemods.report.markdown import report_markdown

        return report_markdown(self)

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write a self-contained page: no network, no libraries, light and dark."""
        # Drawing stands above measuring, so it is imported only when a page is asked for.
        from ropemods.report.html import render_page

        return write_text(path, render_page({self.model.name: self}))

    def __str__(self) -> str:
        residual = self.terms.get("residual")
        early = f"{number(residual.early.value)} nats²" if residual else "not measured"
        loss = number(self.held_out_loss.value) if self.held_out_loss else "not measured"
        return (
            f"Report({self.model.name}: early residual {early}, "
            f"loss {loss}, {count(self.text.tokens)} tokens, "
            f"protocol {self.protocol_hash})"
        )

    __repr__ = __str__


def _expect_length(where: str, rows: Sequence[Any], length: int, width: int | None = None) -> None:
    if len(rows) != length:
        raise ValueError(f"{where}: expected {length} layers, found {len(rows)}")
    wrong = [len(row) for row in rows if width is not None and len(row) != width]
    if wrong:
        raise ValueError(f"{where}: expected {width} values per layer, found {wrong[0]}")


def _other_schema(path: str | os.PathLike[str], schema: Any, data: Mapping[str, Any]) -> str:
    versions = data.get("versions")
    writer = versions.get("ropemods", "unknown") if isinstance(versions, dict) else "unknown"
    return (
        f"{path} has report schema {schema}, written by ropemods {writer}; this ropemods reads "
        f"schema {SCHEMA}. Measure again with this version, or read it with ropemods {writer}."
    )
