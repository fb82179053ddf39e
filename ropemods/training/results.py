"""What a session leaves besides models: the table, the comparison, the cards, and everything as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime

from ropemods.report.comparison import Comparison, compare_arms
from ropemods.report.comparison_tables import headline_sentences
from ropemods.report.report import Report
from ropemods.settings.files import write_text
from ropemods.training.arms import ArmResult
from ropemods.training.card import versions, write_card
from ropemods.training.session import Session
from ropemods.training.table import table
from ropemods.training.tracked_results import report_results


def write_results(session: Session, results: list[ArmResult]) -> str:
    """Write all of it (on the first rank) and return what a person reads at the end of a run."""
    if not session.first:
        return ""
    reports = {r.name: report for r in results if (report := r.read_report(session.folder)) is not None}
    made = table(results, reports)
    write_text(session.folder / "table.md", made + "\n")
    compared = _compared(session, results, reports)
    for result in results:
        if result.model is not None:
            write_card(session, result, made, compared.get(result.seed or 0))
    said = [made, *(_sentences(seed, each) for seed, each in compared.items())]
    record = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": session.command,
        "versions": versions(),
        "recipe": session.recipe.to_json(),
        "seeds": list(range(session.recipe.options.seeds)),
        "protocol_hash": None if session.recipe.protocol is None else session.recipe.protocol.hash(),
        "distribution": asdict(session.world),
        "global_batch_size": session.global_batch,
        "steps": session.steps,
        "data": {text: data.facts for text, data in session.data.items()},
        "arms": [asdict(result) for result in results],
    }
    write_text(session.folder / "results.json", json.dumps(record, indent=2) + "\n")
    report_results(session, results, made, {_file(session, seed): each for seed, each in compared.items()})
    return "\n\n".join([*said, f"All of it is in {session.folder}."])


def _compared(session: Session, results: list[ArmResult], reports: dict[str, Report]) -> dict[int, Comparison]:
    """Comparisons by seed, written to disk."""
    made = {}
    for seed in range(session.recipe.options.seeds):
        arms = {r.arm: reports[r.name] for r in results if r.name in reports and r.seed in (None, seed)}
        if len(arms) < 2:
            continue
        comparison = compare_arms(arms)
        name = _file(session, seed)
        write_text(session.folder / f"{name}.md", comparison.to_markdown())
        comparison.to_html(session.folder / f"{name}.html")
        made[seed] = comparison
    return made


def _file(session: Session, seed: int) -> str:
    return "comparison" if session.recipe.options.seeds == 1 else f"comparison-{seed}"


def _sentences(seed: int, comparison: Comparison) -> str:
    head = comparison.headline
    return "\n".join([f"{head.after} against {head.before}, seed {seed}:", *headline_sentences(head)])
