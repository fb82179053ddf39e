"""How much of an attention call a program of each kernel holds at once, on which card.

`blocks.json` holds what was measured to be fastest, by compute capability, kernel, head dim and bits of a number; it is
written by `python -m evals gpu`. What it does not hold gets sizes that fit any GPU of compute capability 8.0 on: its
shared memory, and for numbers of 16 bits the registers of a thread too, by what the compiler says (`fitting.json`,
written by `python -m evals.compiled --fit`).
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from ropemods.attention.measured_paths import card

MEASURED = Path(__file__).with_name("blocks.json")
FITTING = Path(__file__).with_name("fitting.json")
KERNELS = {
    "attend": 2,
    "attend_entropy": 2,
    "attend_kept": 2,
    "query_gradients": 1,
    "key_gradients": 1,
    "decode": 2,
    "statistics": 2,
    "statistics_query_gradient": 2,
    "statistics_key_gradient": 2,
}
"""Every kernel, with its stages where nothing was measured. `attend` is three: without and with an entropy to read, and
with one and a backward to come, for which more is kept."""


class Blocks(NamedTuple):
    """Queries and keys that a program holds at once (powers of two, 16 or more), and how it is compiled."""

    rows: int
    keys: int
    warps: int = 4
    stages: int = 2


def padded(head_dim: int) -> int:
    """Tensor cores take 16 channels or more, and a tile a power of two."""
    return max(16, triton.next_power_of_2(head_dim))


def blocks_of(kernel: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> Blocks:
    """The sizes that were measured for this card, or sizes that fit any."""
    if device.type == "cuda":
        measured = table().get(capability(device), {}).get(name(kernel, head_dim, dtype))
        if measured is not None:
            return measured
    return default(kernel, head_dim, dtype)


def default(kernel: str, head_dim: int, dtype: torch.dtype) -> Blocks:
    # Without a backward to come `attend` keeps less, so what fits with one fits without.
    fits = fitting().get(name("attend_kept" if kernel.startswith("attend") else kernel, max(64, head_dim), dtype))
    if fits is not None:
        return fits
    stages, width = KERNELS[kernel], padded(head_dim) * dtype.itemsize
    if kernel.startswith("statistics"):  # which hold no values
        return Blocks(32, 32, stages=stages) if width > 256 else Blocks(64, 64, stages=stages)
    if width > 512:
        return Blocks(16, 16, stages=stages)
    return Blocks(32, 32, stages=stages) if width > 128 else Blocks(64, 64, stages=stages)


def name(kernel: str, head_dim: int, dtype: torch.dtype) -> str:
    return f"{kernel}/{padded(head_dim)}/{8 * dtype.itemsize}"


@functools.cache
def capability(device: torch.device) -> str:
    return card(device)


@functools.cache
def fitting() -> dict[str, Blocks]:
    """Of numbers of 16 bits, by `name`."""
    return {key: Blocks(*sizes) for key, sizes in json.loads(FITTING.read_text(encoding="utf-8")).items()}


@functools.cache
def table() -> dict[str, dict[str, Blocks]]:
    """What was measured, by compute capability and `name`; a program that measures changes it in place."""
    if not MEASURED.exists():
        return {}
    found = json.loads(MEASURED.read_text(encoding="utf-8"))
    return {card: {key: Blocks(*sizes) for key, sizes in rows.items()} for card, rows in found.items()}
