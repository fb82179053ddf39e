"""How long `python -m evals gpu` would take on a GPU, before one is at hand.

Computed, and only as good as what it is computed from: the times that an H200 showed (results/gpu.json: a stock call
and a stock step, and what our paths took over them), carried to other sizes by their products, and the seconds that a
kernel takes to compile on one core (results/compiled.json), shared by as many processes as the program starts.
"""

from __future__ import annotations

import itertools
import json
import statistics
from typing import Any

from evals import gpu_checks, gpu_steps
from evals.claim import RESULTS
from evals.gpu_tuning import candidates
from ropemods import clock
from ropemods.report.words import markdown_table

KNOWN_LENGTH, KNOWN_DIM = 4096, 64
LAUNCHED = 1e-4
"""Seconds at least of a call of many small operators."""
BUILDING = 8.0
"""Seconds to start a process of its own or to build a model, and to hand it to the device."""
VARIANTS = 4
"""Kernels that one check or one timed call has compiled anew, roughly."""


def minutes(plan: dict[str, Any], workers: int) -> dict[str, tuple[int, float]]:
    """Parts and minutes of each phase; `plan` is what `gpu.plan` says of lengths, dims, kinds, paths and pairs."""
    shown = json.loads((RESULTS / "gpu.json").read_text())
    rows = [row for part in shown["bench"].values() for row in part if row["subject"] != "stock again"]
    stock = statistics.median(row["ratio"]["first_ms"] for row in rows) / 1000
    slower = {
        path: statistics.mean(r["ratio"]["median"] for r in rows if r["path"] == path) for path in ("flash", "triton")
    }
    slower["triton-rows"] = max(slower.values())
    compiling = statistics.mean(row["seconds"] for row in json.loads((RESULTS / "compiled.json").read_text())["rows"])
    compiling = VARIANTS * compiling / workers

    def call(length: int, dim: int, kind: str) -> float:
        if kind == "decode":
            return LAUNCHED
        share = 2 / 7 if kind == "forward" else 1.0
        return max(LAUNCHED, stock * share * (length / KNOWN_LENGTH) ** 2 * dim / KNOWN_DIM)

    checks = gpu_checks.cases(plan["paths"], length=1001)
    found = {"correct": (len(checks), len(checks) * compiling + BUILDING)}

    def bench(pairs_at: dict[int, int]) -> tuple[int, float]:
        calls = list(itertools.product(pairs_at.items(), plan["dims"], plan["kinds"], plan["paths"]))
        times = [
            clock.QUEUED * (pairs + clock.WARM_UP) * call(length, dim, kind) * (1 + slower[path])
            for (length, pairs), dim, kind, path in calls
        ]
        return len(calls), plan["subjects"] * (sum(times) + len(calls) * compiling / VARIANTS)

    found["bench"] = bench(plan["bench"])

    known = next(each for name, each in shown["steps"].items() if name.startswith("steps/135M"))
    ratio = statistics.mean(each["ratio"]["median"] for each in shown["steps"].values())
    work = {size.name: size.batch * size.length * gpu_steps.parameters(size) for size in gpu_steps.SIZES}
    step = {name: known["ratio"]["first_ms"] / 1000 * w / work["135M"] for name, w in work.items()}
    per_size = plan["steps"] // len(step)
    runs = clock.QUEUED * (plan["step_pairs"] + clock.WARM_UP + 1) * (1 + ratio)
    found["steps"] = (plan["steps"], sum(per_size * (BUILDING + runs * seconds) for seconds in step.values()))
    found["measure"] = (len(step), sum(BUILDING + 3 * runs * seconds for seconds in step.values()))

    found["long"] = bench(plan["long"])
    kernels = list(itertools.product(plan["tuned"], plan["dims"]))
    tuned = sum(len(candidates(kernel)) * (compiling + 8 * 4 * call(4096, dim, "training")) for kernel, dim in kernels)
    found["tune"] = (len(kernels), tuned + len(kernels) * BUILDING)
    return {phase: (parts, seconds / 60) for phase, (parts, seconds) in found.items()}


def table(predicted: dict[str, tuple[int, float]]) -> str:
    whole = sum(each for _, each in predicted.values())
    lines = [(phase, str(parts), f"{each:.1f}") for phase, (parts, each) in predicted.items()]
    return markdown_table(("phase, in order", "parts", "minutes, computed"), [*lines, ("together", "", f"{whole:.1f}")])
