"""Two checkouts of this project, timed in turn on one machine: what a change of the inside cost.

    git worktree add ../before 00d0a08
    python -m evals.side_by_side ../before . --model .cache/SmolLM2-135M
    python -m evals.side_by_side ../before . --rounds 3 --lengths 256 1024 --group_ratios 1 --page evals/bench.md

Each round runs `ropemods bench`, with the options that are not this program's own, in one checkout and then in the
other, each in a process of its own, so what the machine does meanwhile meets both. A ratio is that to stock attention
within its process. Subjects that only one of the two has are left out. With `--model` also the seconds that `apply`
takes on it, with one modification of each place.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from evals.between import marks, write_between

PART = "before and after"
APPLY = """
import sys, time, warnings
import ropemods as rm
from transformers import AutoModelForCausalLM
warnings.simplefilter("ignore")
mods = rm.TruncatedRoPE(0.75), rm.AdaptiveTemperature(), rm.LearnedSink(read_bos=True, init=0.0)
model, seconds = AutoModelForCausalLM.from_pretrained(sys.argv[1]), []
for _ in range(4):
    start = time.perf_counter()
    rm.apply(model, *mods)
    seconds.append(time.perf_counter() - start)
    rm.remove(model)
print("seconds", min(seconds[1:]))
"""
Row = tuple[str, ...]


def bench(checkout: Path, options: list[str]) -> dict[Row, float]:
    with tempfile.TemporaryDirectory() as folder:
        _python(checkout, "-m", "ropemods", "bench", "--output", f"{folder}/out", *options)
        rows = json.loads(Path(folder, "out", "bench.json").read_text())["rows"]
    found = {}
    for row in rows:
        shape = row["shape"]
        size = f"{shape['length']}, {shape['heads']}:{shape['heads'] // shape['group_ratio']}"
        found[row["subject"], row["path"], row["kind"], size] = row["ratio"]["median"]
    return found


def applied(checkout: Path, model: Path) -> dict[Row, float]:
    said = _python(checkout, "-c", APPLY, str(model.resolve()))
    return {("apply, seconds", "", "", model.name): float(said.rpartition("seconds")[2])}


def _python(checkout: Path, *words: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve()), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=checkout, env=environment, check=True, capture_output=True, text=True).stdout


def table(before: list[dict[Row, float]], after: list[dict[Row, float]]) -> str:
    lines = [
        "| subject | path | kind | length, heads | before | after | after / before |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in before[0]:
        if row not in after[0]:
            continue
        old, new = [each[row] for each in before], [each[row] for each in after]
        change = [b / a for a, b in zip(old, new, strict=True)]
        lines.append(f"| {' | '.join(row)} | {_range(old)} | {_range(new)} | {_range(change)} |")
    return "\n".join(lines)


def _range(values: Iterable[float]) -> str:
    values = list(values)
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--page", type=Path, help=f"write the table between {' and '.join(marks(PART))} of this file")
    given, options = parser.parse_known_args()
    found: dict[Path, list[dict[Row, float]]] = {given.before: [], given.after: []}
    for _ in range(given.rounds):
        for checkout, rounds in found.items():
            rounds.append(bench(checkout, options) | (applied(checkout, given.model) if given.model else {}))
    written = table(found[given.before], found[given.after])
    print(written)
    if given.page is not None:
        said = f"torch {torch.__version__}, {given.rounds} rounds, `ropemods bench {' '.join(options)}`."
        write_between(given.page, PART, f"{said}\n\n{written}")
