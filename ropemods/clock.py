"""Two calls timed in turn, so that what else a machine does falls on both.

The ratio is taken within each pair and its median reported: a slow moment then spoils one pair, not the figure.
On a CPU with one thread it is CPU time that is compared, in which other programs' turns do not count.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

WARM_UP = 1
"""Calls of each that are not counted."""
QUEUED = 5
"""Calls that are handed to a GPU at a time."""
FEWEST = 3
"""Pairs that are timed however long they take."""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times as long as the first call of each pair the second took."""

    median: float
    low: float
    high: float
    first_ms: float
    """Median time of the first call. Of other machines it says nothing; ratios do."""
    pairs: int


def ratio(
    first: Callable[[], None], second: Callable[[], None], *, pairs: int, device: str, patience: float = 10.0
) -> Ratio:
    """Of up to `pairs` pairs: once FEWEST are timed and `patience` seconds are over, those at hand must do."""
    for _ in range(WARM_UP):
        first()
        second()
    times: list[tuple[float, float]] = []
    while len(times) < pairs and (len(times) < FEWEST or sum(map(sum, times)) < patience):
        times.append((seconds(first, device), seconds(second, device)))
    ratios = [b / a for a, b in times]
    return Ratio(
        median=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
        first_ms=1000 * statistics.median(a for a, _ in times),
        pairs=len(times),
    )


def seconds(call: Callable[[], None], device: str) -> float:
    """Of one call. On a GPU of several in a row, so that, as in a model, the next is on its way while one runs."""
    times = QUEUED if device == "cuda" else 1
    if device == "cuda":
        torch.cuda.synchronize()
    now = _now(device)
    start = now()
    for _ in range(times):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (now() - start) / times


def _now(device: str) -> Callable[[], float]:
    return time.process_time if alone(device) else time.perf_counter


def alone(device: str) -> bool:
    """Whether CPU time is compared."""
    return device == "cpu" and torch.get_num_threads() == 1


def peak_bytes(call: Callable[[], None], device: str) -> int:
    """The most memory that a call holds at once, beyond what was held before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    # The profiler's own tables drop what an operator allocates and frees within itself; its raw events do not.
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
