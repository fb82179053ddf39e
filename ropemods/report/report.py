"""A report: what one measurement found, to be kept as a file, printed, or looked at as a page.

    report = Report.from_json("before.json")
    print(report.to_markdown())
    report.to_html("before.html")

What it holds is in `findings.py` and, part by part, in `records.py`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ropemods.report.findings import Findings
from ropemods.report.words import count, number
from ropemods.settings.files import write_text


@dataclass(frozen=True, kw_only=True, repr=False)
class Report(Findings):
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
