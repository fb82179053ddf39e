"""A suggestion: what a model's use of its bands and of BOS speaks for, to be kept, printed, looked at, or trained on.

`ropemods.leakage.suggestion` finds it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ropemods.report.html.alone import Figure, part, taken_out
from ropemods.report.html.layout import folded, table
from ropemods.report.html.markup import element
from ropemods.report.html.tries_page import changes, measured, render_tries, verdict
from ropemods.report.notebook import InNotebook, Row, cells, cells_of
from ropemods.report.tried_recipe import recipe
from ropemods.report.tries import Tries
from ropemods.report.words import markdown_table, number, percent
from ropemods.settings.files import write_text
from ropemods.settings.json_records import dumps, encode

SCHEMA = 1
_Texts = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Band:
    """One rotary frequency. Shares are of the mean norms of all bands, mean over the layers that have it."""

    index: int
    wavelength: float
    """Tokens in a full turn."""
    cycles: float
    """Turns within the length."""
    phase: float
    """Radians at the length."""
    query_share: float
    key_share: float


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """The bands of the layers that share one frequency table, highest frequency first."""

    layers: tuple[int, ...]
    bands: tuple[Band, ...]


@dataclass(frozen=True, kw_only=True)
class Suggestion(InNotebook):
    """What a model's use of its bands and of BOS speaks for."""

    length: int
    ladders: tuple[Ladder, ...]
    keep: float | None
    """For `TruncatedRoPE(keep)`; None: no cut is proposed."""
    keep_reason: str
    bos_mass: float
    """Mean over layers, heads and queries."""
    sink: tuple[tuple[float, ...], ...]
    """Initial logit per layer and head for `LearnedSink`."""
    sink_reason: str
    notes: tuple[str, ...] = ()
    tries: Tries | None = None
    """What a menu of modifications does untrained; None where nothing was tried."""

    def to_json(self, path: str | os.PathLike[str]) -> Path:
        """Write it to `path`, whole or not at all."""
        return write_text(path, dumps({"schema": SCHEMA, "kind": "suggestion", **encode(self)}))

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write a page of what was tried."""
        return write_text(path, render_tries(self._tried("the page shows")))

    def to_recipe(self, path: str | os.PathLike[str], *, model: str, data: str, **keys: Any) -> Path:
        """Write the recipe that follows from what was tried, for `ropemods train`; `keys` are more of a recipe's, and
        win over ours."""
        given = {"model_name_or_path": model, "data": data, **keys}
        return write_text(path, recipe(self._tried("the recipe follows from"), given))

    def _tried(self, what: str) -> Tries:
        if self.tries is None:
            raise ValueError(f"{what} what was tried, and nothing was; suggest(..., trying=True)")
        return self.tries

    def to_markdown(self) -> str:
        """The proposals, then the bands they come from."""
        parts = [f"# {self._title()}", "\n".join(f"- {each}" for each in self._proposals())]
        parts += [f"## {title}\n\n{markdown_table(head, rows)}" for title, (head, rows) in self._shown().items()]
        if self.tries is not None:
            parts.append(self.tries.to_markdown())
        if self.notes:
            parts.append("## Notes\n\n" + "\n".join(f"- {note}" for note in self.notes))
        return "\n\n".join(parts) + "\n"

    def _title(self) -> str:
        return f"Suggestion for sequences of {self.length} tokens"

    def _proposals(self) -> list[str]:
        keep = "no cut" if self.keep is None else f"`TruncatedRoPE(keep={self.keep:g})`"
        return [f"{keep}: {self.keep_reason}.", f"`LearnedSink()`: {self.sink_reason}."]

    def _shown(self) -> dict[str, tuple[_Texts, list[_Texts]]]:
        """Head and rows of the tables, by title."""
        found: dict[str, tuple[_Texts, list[_Texts]]] = {
            f"Bands of layers {_span(each.layers)}": (_BANDS, [_row(band) for band in each.bands])
            for each in self.ladders
        }
        logits: list[_Texts] = [
            (str(n), f"{min(row):.2f}", f"{sum(row) / len(row):.2f}", f"{max(row):.2f}")
            for n, row in enumerate(self.sink)
        ]
        return {**found, "Sink logit at the start": (("layer", "lowest head", "mean", "highest"), logits)}

    def _repr_html_(self) -> str:
        listed = element("ul", [element("li", each.replace("`", "")) for each in self._proposals()], class_="lead")
        tables = [folded(title, table(head, rows, caption=title)) for title, (head, rows) in self._shown().items()]
        tried = [] if self.tries is None else [verdict(self.tries), *changes(self.tries), *measured(self.tries)]
        notes = element("ul", [element("li", note) for note in self.notes], class_="soft") if self.notes else None
        return part(self._title(), listed, *tables, *tried, notes)

    @property
    def figures(self) -> Mapping[str, Figure]:
        """Every figure of what was tried, by name."""
        return {} if self.tries is None else taken_out(changes(self.tries))

    def _tables(self) -> Mapping[str, Iterable[Row]]:
        return {
            "bands": [cells_of(band, layers=ladder.layers) for ladder in self.ladders for band in ladder.bands],
            "sink": [
                {"layer": layer, "head": head, "logit": logit}
                for layer, row in enumerate(self.sink)
                for head, logit in enumerate(row)
            ],
            "tries": [
                cells(name=each.name, mod=each.mod, **each.changes, **each.masses, time=each.time)
                for each in (self.tries.tries if self.tries is not None else ())
            ],
        }

    def __str__(self) -> str:
        return f"Suggestion(keep={self.keep}: {self.keep_reason})"


def _span(layers: tuple[int, ...]) -> str:
    whole = layers == tuple(range(layers[0], layers[-1] + 1)) and len(layers) > 2
    return f"{layers[0]} to {layers[-1]}" if whole else ", ".join(map(str, layers))


_BANDS = ("band", "wavelength, tokens", "cycles", "phase, rad", "of queries", "of keys")


def _row(band: Band) -> tuple[str, ...]:
    turns = (number(band.wavelength), number(band.cycles), number(band.phase))
    return (str(band.index), *turns, percent(band.query_share), percent(band.key_share))
