"""Every RoPE architecture of the installed transformers, with every modification: what works, and what is refused.

    python -m evals.architectures                                    all types, about four minutes on two cores
    python -m evals.architectures --types llama glm4                 some of them, printed and not written
    python -m evals.architectures --types llama glm4 --update        some of them, put into the files
    python -m evals.architectures --name architectures_floor         the table of another transformers, beside the first

The types are found by inspection of the installed transformers (`tiny_models`), built small from their own config
classes, and held to `architecture_checks`, each in a process of its own with a time limit. The table goes to
`evals/results/architectures.json` and `.md`, and its first line to the README (a test holds the two together).
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from evals import tiny_models

RESULTS = Path(__file__).parent / "results"
LIMIT = 300
"""Seconds for one type; most take five."""
PROCESSES = multiprocessing.get_context("forkserver")
"""One process imports everything, and each type's is forked from it."""
Row = dict[str, dict[str, str]]
SHORT = {"pass": "✓", "refused": "refused", "stock": "stock", "fail": "FAIL"}


def third(model_type: str) -> int:
    """Which third of the types a type belongs to, the same on every machine and for ever."""
    return hashlib.sha256(model_type.encode()).digest()[0] % 3


def check_one(model_type: str) -> Row:
    """Every check on one type, in this process."""
    import torch
    import transformers

    from evals.architecture_checks import check_all

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    return check_all(lambda: tiny_models.config_of(model_type))


def in_own_process(model_type: str) -> Row:
    """The same in a process of its own, so that nothing a type does reaches another."""
    from evals.architecture_checks import CHECKS

    receiving, sending = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_answer, args=(model_type, sending), daemon=True)
    process.start()
    sending.close()
    try:
        if receiving.poll(LIMIT):
            return receiving.recv()
        reason = f"not finished within {LIMIT} s"
    except EOFError:
        process.join(10)
        reason = f"the process ended with code {process.exitcode} and no result"
    finally:
        process.kill()
        process.join()
    return {name: {"outcome": "fail", "reason": reason} for name in CHECKS}


def _answer(model_type: str, sending: Any) -> None:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # progress bars of saving and loading
        sending.send(check_one(model_type))


VERDICTS = {
    "pass": "every check holds",
    "but for stock": "every check holds but for a property that the stock model itself lacks here",
    "partly": "a modification is refused by `apply`, or measurement is, with a reason; the rest holds",
    "refused": "`apply` refuses every modification, with a reason",
    "not built": "the stock model does not run here",
    "fail": "a check does not hold",
}


def verdict(row: Row) -> str:
    """One of `VERDICTS` for a type."""
    outcomes = {entry["outcome"] for entry in row.values()}
    if "fail" in outcomes:
        return "fail"
    if len(outcomes) == 1:
        return {"refused": "refused", "stock": "not built", "pass": "pass"}[outcomes.pop()]
    return "partly" if "refused" in outcomes else "but for stock"


def counted(rows: dict[str, Row]) -> str:
    """How many types have each verdict, in words."""
    counts = collections.Counter(verdict(row) for row in rows.values())
    return ", ".join(f"{counts[name]} {name}" for name in VERDICTS if counts[name])


def summary(report: dict[str, Any]) -> str:
    """The line for the README."""
    rows = {kind: row for kind, row in report["types"].items() if kind in report["shared_initialisation"]}
    counts = collections.Counter(verdict(row) for row in rows.values())
    checks = len(next(iter(rows.values())))
    line = f"transformers {report['versions']['transformers']}: of {len(rows)} model types on the shared RoPE"
    line += f" initialisation, {counts['pass']} pass all {checks} checks"
    rest = {
        "but for stock": "hold all but what the stock model itself lacks",
        "partly": "are refused some of it with a reason",
        "refused": "all of it",
        "not built": "cannot be built here",
        "fail": "fail",
    }
    return line + "".join(f", {counts[name]} {words}" for name, words in rest.items() if counts[name] or name == "fail")


def versions() -> dict[str, str]:
    import torch
    import transformers

    import ropemods

    return {
        "ropemods": ropemods.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }


def markdown(report: dict[str, Any]) -> str:
    """The table, most telling first: counts, what fails or is refused and why, then type by type."""
    rows: dict[str, Row] = report["types"]
    shared = {kind: row for kind, row in rows.items() if kind in report["shared_initialisation"]}
    others = {kind: row for kind, row in rows.items() if kind not in shared}
    lines = ["# Architectures", "", f"`{report['command']}`, {report['seconds']} s.", ""]
    if "run_again" in report:
        lines += [
            "Run again since, with `--types … --update`: " + "; ".join(map(", ".join, report["run_again"])) + ".",
            "",
        ]
    lines += ["Versions: " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()) + ".", ""]
    for title, some in (
        ("types on transformers' shared RoPE initialisation", shared),
        ("other types with rotary code", others),
    ):
        if some:
            lines += [f"**{len(some)} {title}: {counted(some)}.**", ""]
    lines += [f"- *{name}*: {meaning}." for name, meaning in VERDICTS.items()] + [""]
    for outcome, title in (
        ("fail", "Fails"),
        ("refused", "Refused"),
        ("stock", "Lacking in the stock model"),
        ("pass", "Holds, with a qualification"),
    ):
        lines += _reasons(rows, outcome, title)
    names = list(next(iter(rows.values())))
    lines += ["## Type by type", "", "| type | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for kind, row in rows.items():
        lines.append(f"| {kind} | " + " | ".join(SHORT[row[name]["outcome"]] for name in names) + " |")
    return "\n".join(lines) + "\n"


def _reasons(rows: dict[str, Row], outcome: str, title: str) -> list[str]:
    """A section with what is said of one outcome."""
    said: dict[str, dict[str, list[str]]] = {}
    for kind, row in rows.items():
        for name, entry in row.items():
            if entry["outcome"] == outcome and entry["reason"]:
                said.setdefault(kind, {}).setdefault(entry["reason"], []).append(name)
    if not said:
        return []
    lines = [f"## {title}", "", "| type | checks | reason |", "|---|---|---|"]
    for kind, each in said.items():
        for reason, names in each.items():
            which = "all" if len(names) == len(rows[kind]) else ", ".join(names)
            lines.append(f"| {kind} | {which} | {reason.replace('|', '/')} |")
    return [*lines, ""]


def sweep(kinds: list[str], workers: int, command: str = "python -m evals.architectures") -> dict[str, Any]:
    begun = time.monotonic()
    rows: dict[str, Row] = {}
    with ThreadPoolExecutor(workers) as pool:
        for kind, row in zip(kinds, pool.map(in_own_process, kinds), strict=True):
            rows[kind] = row
            print(f"{len(rows)}/{len(kinds)} {kind}: {verdict(row)}", file=sys.stderr, flush=True)
    return {
        "command": command,
        "seconds": round(time.monotonic() - begun),
        "versions": versions(),
        "shared_initialisation": tiny_models.rope_types(),
        "types": rows,
    }


def updated(whole: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """A report of all types with those of another one in it, which is noted; both of the same versions."""
    if whole["versions"] != part["versions"]:
        raise ValueError(
            f"the file was made with {whole['versions']}, and this run with {part['versions']}: run all types"
        )
    again = [*whole.get("run_again", []), sorted(part["types"])]
    return whole | {"types": whole["types"] | part["types"], "run_again": again}


def write(name: str, report: dict[str, Any]) -> None:
    from ropemods.settings.files import write_text

    RESULTS.mkdir(exist_ok=True)
    write_text(RESULTS / f"{name}.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    write_text(RESULTS / f"{name}.md", markdown(report))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", help="some types only; the table is printed")
    parser.add_argument("--update", action="store_true", help="put the types that were run into the files")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--name", default="architectures", help="of the files in evals/results")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # for the processes made from here on
    PROCESSES.set_forkserver_preload(["evals.architecture_checks"])
    command = "python -m evals.architectures"
    command += "" if options.name == parser.get_default("name") else f" --name {options.name}"
    kinds = options.types or tiny_models.rope_types() + tiny_models.own_rope_types()
    report = sweep(kinds, options.workers, command)
    if options.types and options.update:
        report = updated(json.loads((RESULTS / f"{options.name}.json").read_text()), report)
    if options.types and not options.update:
        print(markdown(report))
    else:
        write(options.name, report)
    return int(any(verdict(row) == "fail" for row in report["types"].values()))


if __name__ == "__main__":
    sys.exit(main())
