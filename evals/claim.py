"""One program a claim: what a program is, how it is run cell by cell, and what its result file holds.

A program is a module `evals/<name>.py` with

    its docstring          the claim, the frozen protocol in words, and what would count against the claim
    PROTOCOL               {scale: {"seeds": [...], every number that the result depends on}}
    run(scale, data, cells) -> dict           what was found, as JSON can hold it
    section(found) -> str                     its Markdown in evals/README.md, from "## Title" on
    learned(found) -> list[Learned]           its rows of "What we learned"
    figure(found) -> str                      optional: an SVG, which the page puts below the section
    ALONE                                     optional: True where it times something, so nothing may run beside it

`found` is what `run` returned, with the protocol, its hash, scale, seeds, versions, command and seconds beside it.
A program cuts its work into cells (a seed of a variant, say) and hands them to `cells`. A finished cell is kept under
runs/evals/, so an interrupted run goes on where it stopped; one of another protocol is never taken up.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import platform
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from evals.locks import held
from ropemods.settings.files import write_text
from ropemods.settings.versions import versions_of

PROGRAMS = (
    "untrained",
    "prope_untrained",
    "penalty",
    "max_retrieval",
    "prope_from_scratch",
    "retrieval",
    "usage",
    "designs",
    "interventions",
    "leakage_cost",
    "step_cost",
    "growth",
    "schedule",
    "before_after",
    "dose",
    "harness",
    "engines",
    "llama_cpp",
)
"""In the order of the page."""
RESULTS = Path(__file__).parent / "results"
KEPT = Path(__file__).parent.parent / "runs" / "evals"
ADDED = ("program", "scale", "seeds", "protocol", "protocol_hash", "versions", "machine", "command", "seconds")
"""What every result file holds beside what its program found."""


class Unavailable(Exception):
    """What a program needs is not installed; the others go on without it."""


class Learned(NamedTuple):
    """A row of the page "What we learned". All are text as it is to be read."""

    claim: str
    figure: str
    interval: str
    paper: str
    """What the paper has, and whether ours agrees."""
    limits: str


class Cells:
    """Runs the parts of a program, and keeps each that is finished. Several processes may run one program together."""

    def __init__(self, folder: Path, *, say: Callable[[str], None] = print) -> None:
        self.folder, self.say, self.seconds = folder, say, 0.0

    def __call__(self, jobs: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
        """The result of each job by its name, as JSON gives it back."""
        results: dict[str, Any] = {}
        while len(results) < len(jobs):
            before = len(results)
            for name in (name for name in jobs if name not in results):
                path = self.folder / (re.sub(r"[^\w.=-]+", "_", name) + ".json")
                with held(path.with_suffix(".lock"), wait=False) as ours:
                    if not ours:
                        continue  # another process is at it
                    told = "kept" if path.exists() else self._run(name, jobs[name], path)
                cell = json.loads(path.read_text())
                if cell["cell"] != name:
                    raise ValueError(f"the cells {cell['cell']!r} and {name!r} share the file {path.name}: rename one")
                results[name] = cell["result"]
                self.seconds += cell["seconds"]
                self.say(f"[{len(results)}/{len(jobs)}] {name}: {told}")
            if len(results) == before:
                time.sleep(1)
        return {name: results[name] for name in jobs}

    def _run(self, name: str, job: Callable[[], Any], path: Path) -> str:
        begun = time.monotonic()
        result = job()
        seconds = round(time.monotonic() - begun, 1)
        write_text(path, json.dumps({"cell": name, "seconds": seconds, "result": result}, allow_nan=False))
        return f"{seconds} s"


def program(name: str) -> ModuleType:
    if name not in PROGRAMS:
        raise ValueError(f"no program {name!r}; there are {', '.join(PROGRAMS)}")
    return importlib.import_module(f"evals.{name}")


def alone(name: str) -> bool:
    return bool(getattr(program(name), "ALONE", False))


def protocol(module: ModuleType, scale: str) -> dict[str, Any]:
    if scale not in module.PROTOCOL:
        known = ", ".join(module.PROTOCOL)
        raise ValueError(f"{module.__name__} has no scale {scale!r}; its protocol is written for {known}")
    # Through JSON, so that what is hashed is what the file shows.
    return json.loads(json.dumps(module.PROTOCOL[scale]))


def hash_of(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def result_path(name: str, scale: str, folder: Path = RESULTS) -> Path:
    """The scale is in the name of all but the smallest, so no file holds two."""
    return folder / (f"{name}.json" if scale == "nano" else f"{name}.{scale}.json")


def run(
    name: str, scale: str, data: Path, *, results: Path = RESULTS, kept: Path = KEPT, say: Callable[[str], None] = print
) -> Path:
    """Run a program, or what is left of it, and write its result file."""
    module = program(name)
    values = protocol(module, scale)
    cells = Cells(kept / name / f"{scale}-{hash_of(values)}", say=say)
    found = module.run(scale, data, cells)
    return write(name, scale, found, seconds=cells.seconds, results=results)


def write(
    name: str,
    scale: str,
    found: Mapping[str, Any],
    *,
    seconds: float,
    results: Path = RESULTS,
    machine: str | None = None,
) -> Path:
    """The result file of a program; `machine` where its cells were run on another than this."""
    values = protocol(program(name), scale)
    taken = set(ADDED) & set(found)
    if taken:
        raise ValueError(f"{name}: run returned {sorted(taken)}, which are written by evals.claim; rename them")
    added = {
        "program": name,
        "scale": scale,
        "seeds": values["seeds"],
        "protocol": values,
        "protocol_hash": hash_of(values),
        "versions": versions_of("torch", "transformers"),
        "machine": machine or f"{platform.machine()} {'GPU' if torch.cuda.is_available() else 'CPU'}",
        "command": f"python -m evals run {name} --scale {scale} --data DATA",
        "seconds": round(seconds),
    }
    results.mkdir(exist_ok=True)
    text = json.dumps({**added, **found}, indent=1, ensure_ascii=False, allow_nan=False)
    return write_text(result_path(name, scale, results), text + "\n")
