"""The one table of a session: every arm and seed with its leakage, loss, sink, tokens, time and memory.

Leakage is in nats² with its interval, loss in nats per token. Where arms were trained with several seeds, the mean over
seeds follows with the least and the largest value: three runs say more of the spread between runs than any interval
over documents does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import fmean

from ropemods.report.changes import quantities
from ropemods.report.records import Estimate
from ropemods.report.report import Report
from ropemods.report.words import NO_VALUE, count, markdown_table, number, shown
from ropemods.training.arms import ArmResult

LEAKAGE = (
    ("residual, early", "residual", "early"),
    ("residual", "residual", "all"),
    ("mask", "mask", "all"),
    ("total", "total", "all"),
    ("mass on BOS", "bos_mass", "all"),
)


def table(results: list[ArmResult], reports: Mapping[str, Report]) -> str:
    """Markdown; a row an arm and seed."""
    measured = bool(reports)
    head = ("arm", *(name for name, _, _ in LEAKAGE if measured), "held-out loss", "perplexity")
    rows = []
    for result in results:
        found = quantities(reports[result.name]) if result.name in reports else {}
        leakage = tuple(_shown(found, quantity, scope) for _, quantity, scope in LEAKAGE if measured)
        rows.append((result.name, *leakage, f"{result.loss:.4f}", f"{result.perplexity:.2f}", *_cost(result)))
    rows += _means(results, reports, measured)
    return markdown_table((*head, "tokens", "time", "peak memory"), rows)


def _shown(found: Mapping[tuple[str, str, int | None], Estimate], quantity: str, scope: str) -> str:
    estimate = found.get((quantity, scope, None))
    return NO_VALUE if estimate is None else str(shown(quantity, estimate))


def _cost(result: ArmResult) -> tuple[str, str, str]:
    memory = NO_VALUE if result.peak_bytes is None else f"{result.peak_bytes / 2**30:.2f} GiB"
    if result.seed is None:
        return "0", "0", memory
    return count(result.tokens), duration(result.seconds), memory


def _means(results: list[ArmResult], reports: Mapping[str, Report], measured: bool) -> Iterator[tuple[str, ...]]:
    for arm in dict.fromkeys(result.arm for result in results):
        runs = [result for result in results if result.arm == arm]
        if len(runs) < 2:
            continue
        cells = [f"{arm}, mean of {len(runs)} seeds"]
        for _, quantity, scope in LEAKAGE if measured else ():
            estimates = [quantities(reports[run.name]).get((quantity, scope, None)) for run in runs]
            values = [estimate.value for estimate in estimates if estimate is not None]
            # As an interval from least to largest, in the format of the quantity.
            spread = Estimate(fmean(values), min(values), max(values)) if values else None
            cells.append(NO_VALUE if spread is None else str(shown(quantity, spread)))
        for values, form in (([r.loss for r in runs], "{:.4f}"), ([r.perplexity for r in runs], "{:.2f}")):
            cells.append(
                " ".join((form.format(fmean(values)), f"[{form.format(min(values))}, {form.format(max(values))}]"))
            )
        yield (*cells, count(runs[0].tokens), duration(fmean(run.seconds for run in runs)), "")


def duration(seconds: float) -> str:
    """3.2 s, 4 min 10 s, 2 h 5 min."""
    if seconds < 60:
        return f"{number(seconds, decimals=1)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"
