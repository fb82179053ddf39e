"""Everything that a GPU must show, in one command, in an order that loses least if it is cut short.

    python -m evals gpu --minutes 8 --out FOLDER          what is not in FOLDER yet
    python -m evals gpu --page --out FOLDER               what is there into evals/results/gpu.json and evals/bench.md

1. `tune`: block sizes (`gpu_tuning`), written to ropemods/attention/triton/blocks.json. What follows runs with them, so
   on a card whose sizes are known, leave it out (`--only correct bench steps`).
2. `correct`: every kernel path, compiled, against fp64: dtypes, head dims, shared heads, windows, soft cap, padding,
   packing, decoding (`gpu_checks`).
3. `bench`: one attention call against the fastest stock kernel, forward, forward and backward, decoding.
4. `steps`: whole training steps of models of 135M and 1B parameters with each modification (`gpu_steps`).

Each finished part is a file in FOLDER, so a second call goes on where the first stopped. Without a GPU the same program
runs at toy sizes, its kernels in Triton's interpreter: that is the rehearsal, and nothing of it is a measurement.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from evals import gpu_checks, gpu_page, gpu_steps
from evals.claim import RESULTS, Cells
from ropemods.attention import paths
from ropemods.bench.bench_tables import between
from ropemods.bench.cases import Shape, subjects
from ropemods.bench.grid import Plan, machine, survey
from ropemods.settings.files import write_text
from ropemods.settings.versions import versions_of

PAGE = Path(__file__).parent / "bench.md"
ABOUT = "machine.json"
PHASES = ("tune", "correct", "bench", "steps")
OURS = ("flash", "triton", "triton-rows")
TUNED = (
    "attend_kept", "key_gradients", "query_gradients", "statistics", "statistics_query_gradient",
    "statistics_key_gradient", "attend_entropy", "attend", "decode",
)  # fmt: skip
Job = tuple[str, Callable[[], Any]]


class Run:
    """One call of the program: where its parts go, what the machine is, and how long it may take."""

    def __init__(self, folder: Path, minutes: float, workers: int) -> None:
        self.folder, self.workers = folder, workers
        self.deadline = time.monotonic() + 60 * minutes
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.toy = self.device == "cpu"
        self.cells = Cells(folder, say=lambda line: print(line, flush=True))
        folder.mkdir(parents=True, exist_ok=True)
        about = {
            "machine": machine(self.device),
            "rehearsal": self.toy,
            "versions": versions_of("torch", "transformers"),
        }
        (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n")

    def all_of(self, jobs: Iterator[Job] | list[Job]) -> None:
        for name, job in jobs:
            if time.monotonic() > self.deadline:
                print(f"out of time before {name}; call again to go on", flush=True)
                return
            self.cells({name: partial(self.tried, job)})

    def tried(self, job: Callable[[], Any]) -> Any:
        """A part that fails is a result too: the rest is still worth measuring."""
        try:
            return job()
        except Exception as failed:
            return {"failed": f"{type(failed).__name__}: {str(failed)[:500]}"}


def correct(run: Run) -> None:
    able = tuple(p for p in OURS if paths.obstacle(p, torch.device(run.device)) is None)
    if run.toy:
        chosen = gpu_checks.cases(OURS, length=40, head_dims=(16,))
        run.all_of([(case.name, partial(checked, case, run.device)) for case in chosen])
        return
    chosen = gpu_checks.cases(able, length=1001)
    left = [case for case in chosen if time.monotonic() < run.deadline]
    share = [left[n :: run.workers] for n in range(run.workers)]
    rest = run.deadline - time.monotonic()
    with ProcessPoolExecutor(run.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_part_of_checks, share, [run.folder] * run.workers, [rest / 60] * run.workers))


def _part_of_checks(cases: list[gpu_checks.Case], folder: Path, minutes: float) -> None:
    run = Run(folder, minutes, 1)
    run.all_of([(case.name, partial(checked, case, run.device)) for case in cases])


def checked(case: gpu_checks.Case, device: str) -> dict[str, Any]:
    return {"case": asdict(case)} | gpu_checks.check(case, device)


def tune(run: Run) -> None:
    if run.toy:
        return  # times of an interpreter choose nothing
    from evals.gpu_tuning import tune as tuned

    options: dict[str, Any] = {"dtype": "bfloat16", "length": 4096, "heads": 16, "workers": run.workers}
    run.all_of(
        (f"tune/{kernel}/{dim}", partial(tuned, kernel, dim, **options)) for dim in (64, 128) for kernel in TUNED
    )


def bench(run: Run) -> None:
    lengths, heads, pairs = ((24,), 4, 1) if run.toy else ((4096, 16384, 1024, 32768), 32, 11)
    dims, dtype = ((16,), "float32") if run.toy else ((64, 128), "bfloat16")
    calls = [
        (Shape(length=length, head_dim=dim, heads=heads, group_ratio=4, dtype=dtype), kind, path)
        for length, dim, kind, path in itertools.product(lengths, dims, ("training", "forward", "decode"), OURS)
    ]
    if not run.toy:  # so that no time below is one of compilation, and many compile at once
        small = {(replace(shape, length=512), kind, path) for shape, kind, path in calls}
        with ProcessPoolExecutor(run.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            list(pool.map(_warmed, sorted(small, key=str)))
    run.all_of(
        (
            f"bench/{kind}/{shape.length}/{shape.head_dim}/{path}",
            partial(surveyed, shape, kind, path, run.device, pairs),
        )
        for shape, kind, path in calls
    )


def _warmed(call: tuple[Shape, str, str]) -> None:
    with contextlib.suppress(Exception):  # told when it is timed
        surveyed(*call, "cuda", 1)


def surveyed(shape: Shape, kind: str, path: str, device: str, pairs: int) -> list[dict[str, Any]]:
    plan = Plan(shapes=(shape,), kinds=(kind,), paths=(path,), subjects=subjects(), pairs=pairs, device=device)
    return [asdict(row) for row in survey(plan)]


def steps(run: Run) -> None:
    sizes = gpu_steps.TOY if run.toy else gpu_steps.SIZES
    jobs = [
        (
            f"steps/{size.name}/{path}/{name}",
            partial(gpu_steps.measured, size, mods, path, run.device, pairs=1 if run.toy else 3),
        )
        for size, path, (name, mods) in itertools.product(sizes, OURS, gpu_steps.MODS.items())
        if path == "flash" or name in ("AdaptiveTemperature", "LearnedSink", "UnrotatedBos", "rope, temperature, sink")
    ]
    run.all_of(jobs)


def gathered(folder: Path) -> dict[str, Any]:
    """What the parts found, by phase and name, and on which machine."""
    about = json.loads((folder / ABOUT).read_text())
    found: dict[str, Any] = about | {"command": "python -m evals gpu"} | {phase: {} for phase in PHASES}
    for file in sorted(folder.glob("*.json")):
        cell = json.loads(file.read_text())
        if "cell" in cell:
            found[cell["cell"].split("/")[0]][cell["cell"]] = cell["result"]
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m evals gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="begin nothing after so long (default: 8)")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), metavar="FOLDER", help="default: runs/gpu")
    parser.add_argument("--only", nargs="*", choices=PHASES, default=PHASES, metavar="PHASE", help=", ".join(PHASES))
    parser.add_argument("--workers", type=int, default=min(12, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument("--page", action="store_true", help="measure nothing; write what is in FOLDER to the page")
    options = parser.parse_args(arguments)
    if options.page:
        found = gathered(options.out)
        write_text(RESULTS / "gpu.json", json.dumps(found, indent=1) + "\n")
        write_text(PAGE, between(PAGE.read_text(encoding="utf-8"), *gpu_page.MARKS, gpu_page.page(found)))
        print(f"wrote {RESULTS / 'gpu.json'} and {PAGE}")
        return 0
    if not torch.cuda.is_available():
        print("no GPU here: toy sizes in Triton's interpreter, a rehearsal and no measurement", flush=True)
    run = Run(options.out, options.minutes, options.workers)
    for phase in options.only:
        print(f"== {phase}", flush=True)
        {"correct": correct, "tune": tune, "bench": bench, "steps": steps}[phase](run)
    found = gathered(options.out)
    (options.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    wrong = [name for name, each in found["correct"].items() if not each.get("holds")]
    print(f"{len(found['correct'])} checks, {len(wrong)} do not hold: {', '.join(wrong) or 'none'}", flush=True)
    return 1 if wrong else 0
