"""What 7 billion parameters at 128k tokens on 64 GPUs would take. Computed, and nothing of it was run.

From three things: the products that a step consists of, the times that an H200 showed (results/gpu.json: a stock
attention call, a stock step of 135M parameters, and our paths over stock), and the bytes that a measurement keeps.
A sequence a GPU, states in ZeRO-3 over all, activations checkpointed, so that the forward pass is taken twice. A small
model uses a card worse than a large one, so the linear part is rather less than it says.

Products are causal, half a square: T² · D · heads multiplications and additions each.

Shapes: T tokens, D head channels.
"""

from __future__ import annotations

import json
import statistics
from typing import Any

from evals import gpu_steps
from evals.claim import RESULTS
from ropemods.report.words import markdown_table

SIZE = gpu_steps.Size(
    name="7B", hidden=4096, inner=14336, layers=32, heads=32, groups=8, vocabulary=32768, batch=1, length=131_072
)
GPUS = 64
FORWARD, BACKWARD = 2, 5
"""Products of an attention call; with checkpoints the forward ones are made twice."""
STATES = 16
"""Bytes a parameter: weight, gradient and Adam's two in mixed precision."""
GROUPS = 32


def products(size: gpu_steps.Size, count: int) -> float:
    return count * size.batch * size.layers * size.length**2 * size.hidden


def training_calls(shown: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for part in shown["bench"].values() for row in part if row["kind"] == "training"]


def rates(shown: dict[str, Any]) -> tuple[float, float]:
    """Operations a second of stock attention and of all else, in training."""
    rows = training_calls(shown)
    each = rows[0]["shape"]
    work = (FORWARD + BACKWARD) * each["length"] ** 2 * each["head_dim"] * each["heads"]
    attention = work / (statistics.median(row["ratio"]["first_ms"] for row in rows) / 1000)
    small = next(size for size in gpu_steps.SIZES if size.name == "135M")
    step = statistics.median(v["ratio"]["first_ms"] for k, v in shown["steps"].items() if k.startswith("steps/135M"))
    rest = step / 1000 - products(small, FORWARD + BACKWARD) / attention
    return attention, 6 * gpu_steps.parameters(small) * small.batch * small.length / rest


def seconds(shown: dict[str, Any], size: gpu_steps.Size = SIZE) -> tuple[float, float]:
    """Of one step with checkpoints: what is not attention, and attention on stock kernels."""
    attention, linear = rates(shown)
    tokens = size.batch * size.length
    return 8 * gpu_steps.parameters(size) * tokens / linear, products(size, 2 * FORWARD + BACKWARD) / attention


def gib(size: gpu_steps.Size = SIZE) -> dict[str, float]:
    """On each GPU."""
    tokens, dim = size.batch * size.length, size.hidden // size.heads
    of_layers = gpu_steps.parameters(size) - size.vocabulary * size.hidden
    kept = {
        "weights, gradients and optimizer, sharded": STATES * gpu_steps.parameters(size) / GPUS,
        "a layer's weights, gathered, and the next one's, bf16": 2 * 2 * of_layers / size.layers,
        "checkpoints: the stream before each layer, bf16": 2 * tokens * size.hidden * size.layers,
        "one layer at work, bf16": 2 * tokens * (4 * size.hidden + 2 * size.groups * dim + 3 * size.inner),
        "logits and their gradient, fp32, if not cut in chunks": 2 * 4 * tokens * size.vocabulary,
        "a temperature or slot: three numbers a row, fp32": 3 * 4 * tokens * size.heads,
        "a temperature on stock kernels: keys averaged for each row, bf16": 2 * tokens * size.hidden,
    }
    return {name: bytes / 2**30 for name, bytes in kept.items()}


def section(bytes_of_sums: float) -> str:
    """`bytes_of_sums`: a layer, head and token, with GROUPS groups of documents."""
    shown = json.loads((RESULTS / "gpu.json").read_text(encoding="utf-8"))
    rest, attention = seconds(shown)
    stock, rows, lines = rest + attention, training_calls(shown), []
    for subject in dict.fromkeys(row["subject"] for row in rows):
        of = [row for row in rows if row["subject"] == subject]
        least = min(row["ratio"]["median"] for row in of), min(row["floor"] for row in of)
        times = [rest + attention * ratio for ratio in least]
        lines.append((subject.replace("stock again", "stock"), *(f"{t:.0f} s, {t / stock:.2f}" for t in times)))
    sums = bytes_of_sums * SIZE.layers * SIZE.heads * SIZE.length / 2**30
    return "\n\n".join(
        (
            f"Computed by `evals/at_scale.py` from products and from what one H200 showed at 135M parameters; nothing "
            f"of it was run. {GPUS} GPUs, a sequence of {SIZE.length:,} tokens on each, {SIZE.layers} layers of "
            f"{SIZE.heads} heads on {SIZE.groups}, checkpoints. A stock step: {rest:.0f} s without attention and "
            f"{attention:.0f} s in it. With a modification, by the faster of our paths as measured at 4,096 tokens, "
            "and at the floor of the better path; what follows the comma is the ratio to the stock step:",
            markdown_table(("modification", "as measured", "at the floor"), lines),
            "Memory on each GPU:",
            markdown_table(("what", "GiB"), [(name, f"{each:.2f}") for name, each in gib().items()]),
            f"Measuring with {GROUPS} groups of documents keeps {bytes_of_sums:.0f} bytes a layer, head and token: "
            f"{sums:.0f} GiB here, whatever is read. So much is kept in the memory beside the GPU; "
            "a measurement at that length wants fewer groups or shorter crops.",
        )
    )
