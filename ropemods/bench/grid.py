"""Every subject, path, kind and shape, measured one after the other."""

from __future__ import annotations

import dataclasses
import itertools
import platform
from collections.abc import Callable
from typing import Any

import torch
import transformers

import ropemods
from ropemods import clock
from ropemods.attention import paths
from ropemods.bench.cases import KINDS, PATHS, Problem, Shape, Subject, subjects
from ropemods.settings.json_records import decode


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure."""

    shapes: tuple[Shape, ...]
    decode_shapes: tuple[Shape, ...] = ()
    """Those of decoding, which has the heads of a whole model; `shapes` where there are none."""
    kinds: tuple[str, ...] = KINDS
    paths: tuple[str, ...] = (paths.DEFAULT,)
    subjects: tuple[Subject, ...] = dataclasses.field(default_factory=subjects)
    pairs: int = 7
    device: str = "cpu"
    longest_eager: int = 2048
    """Eager attention holds heads × T² numbers several times over; past this length it is left out, and said to be."""

    def __post_init__(self) -> None:
        for name, found, known in (("kinds", self.kinds, KINDS), ("paths", self.paths, PATHS)):
            if not found or set(found) - set(known):
                raise ValueError(f"{name} must be some of {', '.join(known)}, not {', '.join(found) or 'none'}")
        if self.pairs < 1:
            raise ValueError(f"pairs must be 1 or more, not {self.pairs}")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda, not {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device cuda was asked for and torch finds none; use cpu")
        for path in set(self.paths) - {"eager"}:
            with paths.using(path):
                paths.chosen(torch.device(self.device))  # says why where it cannot run

    def calls(self) -> list[tuple[str, Shape]]:
        decode = self.decode_shapes or self.shapes
        return [(kind, shape) for kind in self.kinds for shape in (decode if kind == "decode" else self.shapes)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One subject on one path and shape, against stock attention."""

    subject: str
    path: str
    kind: str
    shape: Shape
    ratio: clock.Ratio
    memory: float
    """Peak memory over that of the stock call."""
    floor: float | None
    stock: str = "as torch picks"
    """The kernel that stock attention ran on."""


def survey(plan: Plan, told: Callable[[Row], None] = lambda row: None) -> list[Row]:
    """Measure; `told` is called with each row as soon as it is known."""
    rows = []
    for kind, shape in plan.calls():
        problem = Problem(shape, kind, plan.device)
        stock = problem.stock()
        stock_bytes = clock.peak_bytes(stock, plan.device)
        for path, subject in itertools.product(plan.paths, plan.subjects):
            if not problem.takes(subject, path) or (path == "eager" and shape.length > plan.longest_eager):
                continue
            call = problem.modified(subject, path)
            row = Row(
                subject=subject.name,
                path=path,
                kind=kind,
                shape=shape,
                ratio=clock.ratio(stock, call, pairs=plan.pairs, device=plan.device),
                memory=clock.peak_bytes(call, plan.device) / stock_bytes,
                floor=subject.floor(path, kind),
                stock=Row.stock if problem.backend is None else problem.backend.name.lower(),
            )
            rows.append(row)
            told(row)
    return rows


def machine(device: str) -> str:
    """The kind of machine, which is all that a figure should say of it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} thread{'' if threads == 1 else 's'}"


def as_json(plan: Plan, rows: list[Row]) -> dict[str, Any]:
    return {
        "machine": machine(plan.device),
        "versions": {
            "ropemods": ropemods.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "clock": "CPU time" if clock.alone(plan.device) else "elapsed time",
        "pairs": plan.pairs,
        "warm_up": clock.WARM_UP,
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def from_json(written: Any, source: str) -> list[Row]:
    """The rows of what `as_json` wrote; `source` is the file, for an error."""
    if not isinstance(written, dict) or "rows" not in written:
        raise ValueError(f"{source} has no rows: it is no bench.json. `ropemods bench --output FOLDER` writes one")
    return list(decode(tuple[Row, ...], written["rows"], f"{source}: rows"))
