"""Everything one measurement found, as one frozen record that is also a file.

`Findings` mirrors the JSON file field by field; `Report` (`report.py`) is the same record with ways to show it. Tables
and pages are made from findings, and so know nothing of who asks for them.

Units: leakage in nats², loss in nats per token. NaN is a value that is not defined (null in JSON);
`notes` says why. A wavelength that is not finite belongs to a band that does not rotate.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ropemods.report.records import (
    Control,
    Entropy,
    Estimate,
    Intervention,
    ModelFacts,
    Sink,
    Term,
    TextFacts,
    Usage,
)
from ropemods.report.words import TERMS
from ropemods.settings.files import write_text
from ropemods.settings.json_records import RecordError, decode, dumps, encode, read_json

SCHEMA = 1


@dataclass(frozen=True, kw_only=True, repr=False)
class Findings:
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
    def from_json(cls, path: str | os.PathLike[str]) -> Self:
        """Read a report. A file of another schema, or a damaged one, is an error that says so."""
        data = read_json(path, "Measure again, or restore the file.")
        if not isinstance(data, dict) or "schema" not in data:
            raise RecordError(
                f"{path} is not a ropemods report: it has no 'schema' key. "
                "Reports are written by `ropemods measure` and Report.to_json."
            )
        schema = data.pop("schema")
        if schema != SCHEMA:
            raise RecordError(_other_schema(path, schema, data))
        try:
            findings: Self = decode(cls, data, "report")
        except RecordError as error:
            raise RecordError(f"{path}: {error}") from None
        return findings


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
