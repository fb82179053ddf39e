"""Two calls timed in turn, so that what else a machine does falls on both.

The ratio is taken within each pair and its median reported: a slow moment then spoils one pair, not the figure.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

WARM_UP = 2
"""Calls of each that are not counted."""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times as long as the first call of each pair the second took."""

    median: float
    low: float
    high: float
    first_ms: float
    """Median time of the first call. Of other machines it says nothing; ratios do."""


def ratio(first: Callable[[], None], second: Callable[[], None], *, pairs: int, device: str) -> Ratio:
    for _ in range(WARM_UP):
        first()
        second()
    times = [(_seconds(first, device), _seconds(second, device)) for _ in range(pairs)]
    ratios = [b / a for a, b in times]
    return Ratio(
        median=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
        first_ms=1000 * statistics.median(a for a, _ in times),
    )


def _seconds(call: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


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
