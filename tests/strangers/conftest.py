"""Which strangers come, and the table of what became of them.

By default a fifth of the cases runs, chosen by a hash of their names; `STRANGERS=all` (`make strangers`) runs every
one, and so does naming a case.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.sample import sampled

HERE = Path(__file__).parent
ANSWERS = ("held", "refused", "moot")
"""What may become of a case; the rest is a failure."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if any("::" in word for word in config.args):
        return
    strangers = [item for item in items if item.path.parent == HERE]
    left_out = [i for i in strangers if not sampled(f"{i.path.name} {i.name}", one_in=5, unless="STRANGERS")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    found: dict[str, Counter[str]] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, ()):
            path = Path(report.nodeid.partition("::")[0])
            if path.parent.name != HERE.name or report.when != "call":
                continue
            said = dict(report.user_properties).get("stranger", "failed" if outcome == "failed" else "held")
            found.setdefault(path.stem.removeprefix("test_"), Counter())[str(said).partition(":")[0]] += 1
    if not found:
        return
    write = terminalreporter.write_line
    write("")
    write("strangers, by file: cases that the stock model holds to were tried on modified ones")
    write(f"{'':<16}{'tried':>8}{'held':>8}{'refused':>8}{'failed':>8}{'moot':>8}")
    total: Counter[str] = sum(found.values(), Counter())
    for name, counts in (*sorted(found.items()), ("all", total)):
        tried = sum(counts.values()) - counts["moot"]
        cells = (tried, counts["held"], counts["refused"], counts["failed"], counts["moot"])
        write(f"{name:<16}" + "".join(f"{cell:>8}" for cell in cells))
