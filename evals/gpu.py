"""Everything that a GPU must show, in one command, in an order that loses least if it is cut short.

    python -m evals gpu --minutes 8 --out FOLDER          what is not in FOLDER yet
    python -m evals gpu --page --out FOLDER               what is there into evals/results/gpu.json and evals/bench.md

1. `correct`: every kernel path, compiled, against fp64: dtypes, head dims, shared heads, windows, soft cap, padding,
   packing, decoding (`gpu_checks`).
2. `bench`: one attention call at T = 4096 and 1024 against the fastest stock kernel, forward and backward, forward,
   decoding.
3. `steps`: whole training steps of models of 135M and 1B parameters with each modification (`gpu_steps`).
4. `measure`: leakage measured with everything, against a plain forward of the same tokens.
5. `long`: what `bench` does, at T = 16384 and 32768.
6. `tune`: block sizes (`gpu_tuning`), written to ropemods/attention/triton/blocks.json. What is timed after it runs
   with them: call again with another FOLDER.

Each finished part is a file in FOLDER, so a second call goes on where the first stopped. Without a GPU the same program
runs at toy sizes, its kernels in Triton's interpreter, and says how long a GPU would take (`gpu_minutes`): that is the
rehearsal, and nothing of it is a measurement.
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

from evals import gpu_checks, gpu_minutes, gpu_page, gpu_steps
from evals.between import write_between
from evals.claim import RESULTS, Cells
from ropemods.attention import paths
from ropemods.bench.bench_tables import between
from ropemods.bench.cases import Shape, Subject, subjects
from ropemods.bench.grid import Plan, machine, survey
from ropemods.settings.files import write_text
from ropemods.settings.versions import versions_of

PAGE = Path(__file__).parent / "bench.md"
ABOUT = "machine.json"
PHASES = ("correct", "bench", "steps", "measure", "long", "tune")
SHORT, LONG = {4096: 5, 1024: 5}, {16384: 3, 32768: 3}
"""Lengths, with the pairs that are timed."""
DIMS, KINDS = (64, 128), ("training", "forward", "decode")
TIMED = ("stock again", "temperature", "sink", "unrotated BOS", "keyed sink", "temperature, sink, BOS closed")
STEP_PAIRS = 2
COMPILING = 12
"""Processes, of the machines that this is meant for."""
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
        self.sizes, self.step_pairs = (gpu_steps.TOY, 1) if self.toy else (gpu_steps.SIZES, STEP_PAIRS)
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
    run.all_of((f"tune/{kernel}/{dim}", partial(tuned, kernel, dim, **options)) for dim in DIMS for kernel in TUNED)


def bench(run: Run, pairs: dict[int, int]) -> None:
    pairs, heads = ({24: 1}, 4) if run.toy else (pairs, 32)
    dims, dtype = ((16,), "float32") if run.toy else (DIMS, "bfloat16")
    calls = [
        (Shape(length=length, head_dim=dim, heads=heads, group_ratio=4, dtype=dtype), kind, path)
        for length, dim, kind, path in itertools.product(pairs, dims, KINDS, OURS)
    ]
    if not run.toy:  # so that no time below is one of compilation, and many compile at once
        small = {(replace(shape, length=512), kind, path) for shape, kind, path in calls}
        with ProcessPoolExecutor(run.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            list(pool.map(_warmed, sorted(small, key=str)))
    run.all_of(
        (
            f"bench/{kind}/{shape.length}/{shape.head_dim}/{path}",
            partial(surveyed, shape, kind, path, run.device, pairs[shape.length]),
        )
        for shape, kind, path in calls
    )


def _warmed(call: tuple[Shape, str, str]) -> None:
    with contextlib.suppress(Exception):  # told when it is timed
        surveyed(*call, "cuda", 1)


def timed() -> tuple[Subject, ...]:
    return tuple(subject for subject in subjects() if subject.name in TIMED)


def surveyed(shape: Shape, kind: str, path: str, device: str, pairs: int) -> list[dict[str, Any]]:
    plan = Plan(shapes=(shape,), kinds=(kind,), paths=(path,), subjects=timed(), pairs=pairs, device=device)
    return [asdict(row) for row in survey(plan)]


def steps(run: Run) -> None:
    run.all_of(
        (
            f"steps/{size.name}/{path}/{name}",
            partial(gpu_steps.measured, size, gpu_steps.MODS[name], path, run.device, pairs=run.step_pairs),
        )
        for size, path, name in steps_of(run.sizes)
    )


def steps_of(sizes: tuple[gpu_steps.Size, ...]) -> list[tuple[gpu_steps.Size, str, str]]:
    """On our paths only what is computed there."""
    ours = ("AdaptiveTemperature", "LearnedSink", "UnrotatedBos", "rope, temperature, sink")
    of = itertools.product(sizes, OURS, gpu_steps.MODS)
    return [(size, path, name) for size, path, name in of if path == "flash" or name in ours]


def measure(run: Run) -> None:
    run.all_of(
        (f"measure/{size.name}", partial(gpu_steps.measuring, size, run.device, pairs=run.step_pairs))
        for size in run.sizes
    )


def plan() -> dict[str, Any]:
    """What a GPU would be asked for, as `gpu_minutes` reads it."""
    return {
        "paths": OURS, "dims": DIMS, "kinds": KINDS, "bench": SHORT, "long": LONG, "subjects": len(TIMED),
        "step_pairs": STEP_PAIRS, "steps": len(steps_of(gpu_steps.SIZES)), "tuned": TUNED,
    }  # fmt: skip


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
    parser.add_argument(
        "--workers", type=int, default=min(COMPILING, os.cpu_count() or 1), help="processes that compile"
    )
    parser.add_argument("--page", action="store_true", help="measure nothing; write what is in FOLDER to the page")
    parser.add_argument("--predict", type=Path, metavar="PAGE", help="measure nothing; write how long it would take")
    options = parser.parse_args(arguments)
    if options.page:
        found = gathered(options.out)
        write_text(RESULTS / "gpu.json", json.dumps(found, indent=1) + "\n")
        write_text(PAGE, between(PAGE.read_text(encoding="utf-8"), *gpu_page.MARKS, gpu_page.page(found)))
        print(f"wrote {RESULTS / 'gpu.json'} and {PAGE}")
        return 0
    predicted = gpu_minutes.table(gpu_minutes.minutes(plan(), COMPILING))
    if options.predict:
        print(f"wrote {write_between(options.predict, 'gpu minutes', predicted)}")
        return 0
    if not torch.cuda.is_available():
        print("no GPU here: toy sizes in Triton's interpreter, a rehearsal and no measurement", flush=True)
        print(f"\nOn an H200, as computed:\n\n{predicted}\n", flush=True)
    run = Run(options.out, options.minutes, options.workers)
    phases = {
        "correct": correct, "bench": partial(bench, pairs=SHORT), "steps": steps, "measure": measure,
        "long": partial(bench, pairs=LONG), "tune": tune,
    }  # fmt: skip
    for phase in options.only:
        print(f"== {phase}", flush=True)
        phases[phase](run)
    found = gathered(options.out)
    (options.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    wrong = [name for name, each in found["correct"].items() if not each.get("holds")]
    print(f"{len(found['correct'])} checks, {len(wrong)} do not hold: {', '.join(wrong) or 'none'}", flush=True)
    return 1 if wrong and not run.toy else 0
