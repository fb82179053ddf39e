"""What every result does in a notebook: it shows itself, gives each of its figures alone, and its tables as frames."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ropemods.report.records import Estimate
from ropemods.settings.extras import need
from ropemods.settings.options import did_you_mean

if TYPE_CHECKING:
    import pandas

    from ropemods.report.html.alone import Figure

Row = Mapping[str, Any]


class InNotebook(abc.ABC):
    """A result as a notebook knows it: `result` as the last line of a cell shows the opening of its page."""

    @abc.abstractmethod
    def _repr_html_(self) -> str: ...

    @property
    @abc.abstractmethod
    def figures(self) -> Mapping[str, Figure]:
        """Every figure of the page, by name."""

    @abc.abstractmethod
    def _tables(self) -> Mapping[str, Iterable[Row]]:
        """Every table by name, the most telling first; a row holds numbers, not texts."""

    def plot(self, name: str | None = None) -> Figure:
        """One figure of the page alone, as SVG: the first one, or that of this name (`figures` has them all)."""
        return _chosen("figure", name, self.figures)

    def to_frame(self, table: str | None = None) -> pandas.DataFrame:
        """A table as a pandas frame: the first one, or that of this name (an unknown name is answered with all).

        An interval stands beside its value, as `low` and `high`. Needs pandas, which `[train]` brings.
        """
        need("pandas", "to_frame()")
        import pandas

        found = {name: rows for name, rows in ((n, list(rows)) for n, rows in self._tables().items()) if rows}
        return pandas.DataFrame(_chosen("table", table, found))


def _chosen(what: str, name: str | None, known: Mapping[str, Any]) -> Any:
    if not known:
        raise ValueError(f"there is no {what}: nothing was measured that has one")
    if name is None:
        return next(iter(known.values()))
    if name not in known:
        raise ValueError(f"there is no {what} {name!r} here{did_you_mean(name, known)}")
    return known[name]


def cells(**values: Any) -> dict[str, Any]:
    """A row of a frame: an estimate becomes its value and the ends of its interval, that named `value` plainly."""
    row: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Estimate):
            before = "" if name == "value" else f"{name}_"
            row |= {name: value.value, f"{before}low": value.low, f"{before}high": value.high}
        else:
            row[name] = value
    return row


def cells_of(record: Any, **more: Any) -> dict[str, Any]:
    """A row of a frame from a record's fields, behind `more`."""
    return cells(**more, **{each.name: getattr(record, each.name) for each in dataclasses.fields(record)})
