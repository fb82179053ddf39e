"""`ropemods compare`: what changed between two reports, and whether it is more than noise."""

from __future__ import annotations

from dataclasses import dataclass

from ropemods.cli.command import Command
from ropemods.cli.measured_model import check_writable
from ropemods.cli.output import show
from ropemods.settings.options import REQUIRED, option


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare two reports of `ropemods measure`. Says what changed, by how much, and whether that is more than noise.
    Two reports of one protocol read the same documents, so the intervals of changes leave out what both have in common.
    Reports of different protocols are refused, with what differs.
    """

    before: str = option(REQUIRED, "report of the model before, or of the control", positional=True)
    after: str = option(REQUIRED, "report of the model after", positional=True)
    output: str | None = option(None, "write the comparison here, as JSON", metavar="FILE", unset="not written")
    html: str | None = option(None, "write a page to look at, in one file", metavar="FILE", unset="not written")
    allow_different_protocols: bool = option(
        False, "compare reports that were not measured alike, as far as that is possible"
    )


def run(options: Options) -> None:
    check_writable(options.output, options.html, read=(options.before, options.after))

    from ropemods.report.comparison import compare

    comparison = compare(options.before, options.after, allow_different_protocols=options.allow_different_protocols)
    show(comparison, output=options.output, html=options.html)


COMMAND = Command(
    options=Options,
    run=run,
    example="""
        ropemods compare before.json after.json --html comparison.html
    """,
)
