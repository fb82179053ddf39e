"""Every RoPE architecture of the installed transformers, with every modification: what works, and what is refused.

    python -m evals.architectures                     all types, about ten minutes on two cores
    python -m evals.architectures --types llama glm4  some of them, printed and not written

The types are found by inspection of the installed transformers (`tiny_models`), built small from their own config
classes, and held to `architecture_checks`, each in a process of its own with a time limit. The table goes to
`evals/results/architectures.json` and `.md`.
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
    return check_all(lambda: tiny_models.build(model_type))


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


def verdict(row: Row) -> str:
    """One word for a type: fail, refused (all of it), partly (some modifications are refused), stock or pass."""
    outcomes = [entry["outcome"] for entry in row.values()]
    if "fail" in outcomes:
        return "fail"
    if all(outcome == "refused" for outcome in outcomes):
        return "refused"
    if all(outcome == "stock" for outcome in outcomes):
        return "not built"
    return "partly" if "refused" in outcomes else "pass"


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
    """The table, most telling first: counts, what is refused or fails and why, then type by type."""
    rows: dict[str, Row] = report["types"]
    shared = {kind: row for kind, row in rows.items() if kind in report["shared_initialisation"]}
    lines = ["# Architectures", "", f"`{report['command']}`, {report['seconds']} s.", ""]
    lines += ["Versions: " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()) + ".", ""]
    for title, some in (
        ("types on transformers' shared RoPE initialisation", shared),
        ("other rotary types", {k: row for k, row in rows.items() if k not in shared}),
    ):
        if some:
            counts = collections.Counter(verdict(row) for row in some.values())
            said = ", ".join(
                f"{counts[v]} {v}" for v in ("pass", "partly", "refused", "not built", "fail") if counts[v]
            )
            lines += [f"**{len(some)} {title}: {said}.**", ""]
    lines += [
        "*pass*: every check holds. *partly*: a modification is refused by `apply`, the others hold. *stock*: the "
        "stock model itself lacks the property.",
        "",
    ]
    for outcome, title in (("fail", "Fails"), ("refused", "Refused"), ("stock", "Lacking in the stock model")):
        reasons: dict[str, dict[str, list[str]]] = {}
        for kind, row in rows.items():
            for name, entry in row.items():
                if entry["outcome"] == outcome:
                    reasons.setdefault(kind, {}).setdefault(entry["reason"], []).append(name)
        if reasons:
            lines += [f"## {title}", "", "| type | checks | reason |", "|---|---|---|"]
            for kind, each in reasons.items():
                for reason, names in each.items():
                    which = "all" if len(names) == len(rows[kind]) else ", ".join(names)
                    lines.append(f"| {kind} | {which} | {reason.replace('|', '/')} |")
            lines.append("")
    names = list(next(iter(rows.values())))
    lines += ["## Type by type", "", "| type | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for kind, row in rows.items():
        lines.append(f"| {kind} | " + " | ".join(SHORT[row[name]["outcome"]] for name in names) + " |")
    return "\n".join(lines) + "\n"


def sweep(kinds: list[str], workers: int) -> dict[str, Any]:
    begun = time.monotonic()
    rows: dict[str, Row] = {}
    with ThreadPoolExecutor(workers) as pool:
        for kind, row in zip(kinds, pool.map(in_own_process, kinds), strict=True):
            rows[kind] = row
            print(f"{len(rows)}/{len(kinds)} {kind}: {verdict(row)}", file=sys.stderr, flush=True)
    return {
        "command": "python -m evals.architectures",
        "seconds": round(time.monotonic() - begun),
        "versions": versions(),
        "shared_initialisation": tiny_models.rope_types(),
        "types": rows,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", help="some types only; the table is printed")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # for the processes made from here on
    PROCESSES.set_forkserver_preload(["evals.architecture_checks"])
    report = sweep(options.types or tiny_models.rope_types() + tiny_models.own_rope_types(), options.workers)
    if options.types:
        print(markdown(report))
    else:
        from ropemods.atomic import write_text

        RESULTS.mkdir(exist_ok=True)
        write_text(RESULTS / "architectures.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        write_text(RESULTS / "architectures.md", markdown(report))
    return int(any(verdict(row) == "fail" for row in report["types"].values()))


if __name__ == "__main__":
    sys.exit(main())
