"""A report: what one measurement found, to be kept as a file, printed, or looked at as a page.

    report = Report.from_json("before.json")
    print(report.to_markdown())
    report.to_html("before.html")
    report.plot("residual by head").save("heads.svg")
    report.to_frame("heads")

What it holds is in `findings.py` and, part by part, in `records.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ropemods.report.changes import SCOPES, quantities
from ropemods.report.findings import Findings
from ropemods.report.notebook import InNotebook, Row, cells, cells_of
from ropemods.report.words import TERMS, count, number
from ropemods.settings.files import write_text

if TYPE_CHECKING:
    from ropemods.report.html.alone import Figure


@dataclass(frozen=True, kw_only=True, repr=False)
class Report(Findings, InNotebook):
    """All of one measurement. Sections that were not measured are None or empty."""

    def to_markdown(self) -> str:
        """Tables of the headline, the layers, and whatever else was measured."""
        from ropemods.report.markdown import report_markdown

        return report_markdown(self)

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write a self-contained page: no network, no libraries, light and dark."""
        # Drawing stands above measuring, so it is imported only when a page is asked for.
        from ropemods.report.html import render_page

        return write_text(path, render_page({self.model.name: self}))

    def _repr_html_(self) -> str:
        from ropemods.report.html.alone import opening_part

        return opening_part({self.model.name: self})

    @property
    def figures(self) -> Mapping[str, Figure]:
        """Every figure of the page, by name."""
        from ropemods.report.html.alone import figures

        return figures({self.model.name: self})

    def _tables(self) -> Mapping[str, Iterable[Row]]:
        terms = [(name, self.terms[name]) for name in TERMS if name in self.terms]
        return {
            "values": [cells(quantity=q, scope=s, layer=n, value=each) for (q, s, n), each in quantities(self).items()],
            "queries": [cells_of(each, term=name) for name, term in terms for each in term.bins],
            "heads": list(self._by_head()),
            "interventions": map(cells_of, self.interventions),
            "controls": map(cells_of, self.controls),
        }

    def _by_head(self) -> Iterator[Row]:
        """A row a head, a column each for what is known of it."""
        grids = {f"{name}_{scope}": getattr(term.heads, scope) for name, term in self.terms.items() for scope in SCOPES}
        grids |= {"bos_mass": self.sink.heads_bos_mass} if self.sink is not None else {}
        grids |= {"entropy": self.entropy.heads} if self.entropy is not None else {}
        for layer in range(self.model.layers if grids else 0):
            for head in range(self.model.heads):
                yield {"layer": layer, "head": head, **{name: grid[layer][head] for name, grid in grids.items()}}

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
