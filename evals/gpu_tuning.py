"""Which block sizes are fastest on this card, for every kernel, head dim and dtype: `attention/triton/blocks.json`.

Candidates are compiled by many processes at once, which fills Triton's cache, and then timed one after the other by one
process. A candidate that does not fit the card is left out. What is timed is the whole call that the kernel is part of,
with the other kernels as they were.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from ropemods.attention.rows import Rows
from ropemods.attention.terms import EntropyScale
from ropemods.attention.triton import blocks
from ropemods.attention.triton.blocks import Blocks
from ropemods.bench.cases import Problem, Shape, subjects
from ropemods.mods.adaptive_temperature import PUBLISHED
from ropemods.settings.files import write_text

FORWARD = ((128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (64, 128, 4, 3), (128, 32, 4, 4))
CANDIDATES = {
    "attend": FORWARD,
    "attend_entropy": FORWARD,
    "attend_kept": FORWARD,
    "statistics": FORWARD,
    "query_gradients": (
        (128, 64, 8, 2),
        (128, 64, 4, 2),
        (64, 64, 4, 2),
        (128, 32, 4, 3),
        (64, 64, 4, 3),
        (64, 32, 4, 2),
    ),
    "key_gradients": (
        (64, 128, 8, 2),
        (64, 128, 4, 2),
        (64, 64, 4, 2),
        (32, 128, 4, 3),
        (64, 64, 4, 3),
        (32, 64, 4, 2),
    ),
    "decode": ((16, 64, 4, 2), (16, 128, 4, 2), (16, 64, 2, 3), (16, 128, 8, 3)),
}
CANDIDATES["statistics_query_gradient"] = CANDIDATES["query_gradients"]
CANDIDATES["statistics_key_gradient"] = CANDIDATES["key_gradients"]
"""Sizes worth trying: rows, keys, warps, stages. Tensor cores take 64 lines at a time or 128."""


def candidates(kernel: str) -> list[Blocks]:
    return [Blocks(*sizes) for sizes in CANDIDATES[kernel]]


def call(kernel: str, head_dim: int, dtype: str, length: int, heads: int) -> Callable[[], None]:
    """A call in which the kernel takes most of the time."""
    decode = kernel == "decode"
    training = "gradient" in kernel or kernel == "attend_kept"
    shape = Shape(length=length, head_dim=head_dim, heads=heads, group_ratio=4 if decode else 1, dtype=dtype)
    problem = Problem(shape, "decode" if decode else "training" if training else "forward", "cuda")
    if kernel.startswith("statistics"):
        from ropemods.attention.triton.entropy import entropy

        rule = EntropyScale(torch.tensor([PUBLISHED], device="cuda"), torch.ones((), device="cuda"))
        rows = Rows(problem.q, problem.k, problem.v, mask=None, causal=True, scale=problem.scale, entropy_scale=rule)

        def read() -> None:
            with torch.set_grad_enabled(training):
                found = entropy(rows)
            if training:
                torch.autograd.grad(found.sum(), (problem.q, problem.k))

        return read
    plain = kernel == "attend"
    subject = next(s for s in subjects() if s.name == ("sink" if plain else "temperature"))
    return problem.modified(subject, "triton")


def use(kernel: str, head_dim: int, dtype: str, size: Blocks | None) -> None:
    """Make the kernel run with this size, or with its default."""
    rows = blocks.table().setdefault(blocks.capability(torch.device("cuda", 0)), {})
    key = blocks.name(kernel, head_dim, getattr(torch, dtype))
    if size is None:
        rows.pop(key, None)
    else:
        rows[key] = size


def compiled(job: tuple[str, int, str, Blocks]) -> str | None:
    """Run once, small, so that the compiled kernel is in Triton's cache; why it cannot run, if so."""
    kernel, head_dim, dtype, size = job
    use(kernel, head_dim, dtype, size)
    try:
        call(kernel, head_dim, dtype, 512, 4)()
        torch.cuda.synchronize()
    except Exception as failed:
        return f"{type(failed).__name__}: {str(failed)[:200]}"
    return None


def milliseconds(run: Callable[[], None], *, times: int = 7) -> float:
    """Median time on the device."""
    run()
    taken = []
    for _ in range(times):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        taken.append(begin.elapsed_time(end))
    return statistics.median(taken)


def warm(jobs: Iterable[tuple[str, int, str, Blocks]], workers: int) -> dict[tuple[str, int, str, Blocks], str | None]:
    """Compile every candidate, by several processes."""
    listed = list(jobs)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return dict(zip(listed, pool.map(compiled, listed), strict=True))


def tune(kernel: str, head_dim: int, *, dtype: str, length: int, heads: int, workers: int) -> dict[str, Any]:
    """The fastest size, put in force and written to the table that ships; and every time that was taken."""
    jobs = [(kernel, head_dim, dtype, size) for size in candidates(kernel)]
    failures = warm(jobs, workers)
    run = call(kernel, head_dim, dtype, length * (4 if kernel == "decode" else 1), heads)
    use(kernel, head_dim, dtype, None)
    times = {"default": milliseconds(run)}
    for job in jobs:
        if failures[job] is None:
            use(*job)
            times["x".join(map(str, job[3]))] = milliseconds(run)
    best = min(times, key=lambda each: times[each])
    use(kernel, head_dim, dtype, None if best == "default" else Blocks(*map(int, best.split("x"))))
    write_text(blocks.MEASURED, json.dumps(blocks.table(), indent=1, sort_keys=True) + "\n")
    return {"best": best, "ms": times, "failed": sorted({f for f in failures.values() if f is not None})[:3]}
