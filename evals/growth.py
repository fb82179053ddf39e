"""How cost grows with the length, the layers and the heads: a training step, a decoded token, measuring, comparing.

A random llama with heads of 16 channels on a stream of 64, so that every cost is linear in layers and in heads, in CPU
time of one thread. One size grows at a time and the others stay small. The exponent is the slope of the logarithm of
the time over that of the size, over the upper half of the sizes, where the term that grows fastest stands out; one
slope a round, and the interval is Student's t over rounds. "Modified" is TruncatedRoPE, a trained AdaptiveTemperature
and a LearnedSink together.

What theory says is the highest power in the cost: 2 for attention over a whole text, 1 for a decoded token over its
cache, 1 for layers and heads. An exponent may lie below it where fixed costs are still seen, and above it where what is
read grows out of the CPU's caches, so the stock model is timed too. Counting against us: an interval that lies above
theory and above that of the stock model. For that verdict the intervals are widened to 95% for all of them together.

What a model of seven billion parameters would take at 128k tokens is computed, by `evals/at_scale.py`.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import ropemods as rm
from evals import at_scale
from evals.claim import Cells, Learned
from evals.intervals import ends, over_seeds, shown
from evals.leakage_cost import crops_of, measured, protocol_of
from evals.overhead import decoding
from ropemods import clock
from ropemods.leakage.capture import capture
from ropemods.model.observation import observing
from ropemods.report.words import markdown_table

ALONE = True
HEAD_DIM, STREAM = 16, 64
LONG = 5.0
"""Seconds of CPU after which a call needs no other to warm up for it."""
THEORY = {
    "training, stock": {"length": 2, "layers": 1, "heads": 1},
    "training, modified": {"length": 2, "layers": 1, "heads": 1},
    "decoding, stock": {"length": 1, "layers": 1, "heads": 1},
    "decoding, modified": {"length": 1, "layers": 1, "heads": 1},
    "measuring": {"length": 2, "layers": 1, "heads": 1},
    "comparing": {"length": 1, "layers": 1, "heads": 1},
}
DOUBLED = [256 * 2**n for n in range(8)]
PROTOCOL = {
    "nano": {
        "seeds": [0],
        "rounds": 7,
        "base": {"length": 256, "layers": 2, "heads": 2},
        "sizes": {"length": DOUBLED, "layers": [2, 4, 8, 16, 32, 48], "heads": [4, 8, 16, 32, 64]},
        "fewer": {"comparing": {"length": DOUBLED[:4]}},
        "wider": {f"decoding, {which}": {"length": {"heads": 32}} for which in ("stock", "modified")},
        "sequences": 8,
    }
}
"""`fewer`: where a report has to be made first; `wider`: where two heads would be lost in what a call costs anyway."""


def run(scale: str, data: Path, cells: Cells) -> dict[str, Any]:
    p = PROTOCOL[scale]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        jobs = {f"{kind} · {axis}": partial(grown, kind, axis, data, p) for kind in THEORY for axis in THEORY[kind]}
        return {"grown": cells(jobs | {"sums": partial(bytes_of_sums, p)})}
    finally:
        torch.set_num_threads(threads)


def grown(kind: str, axis: str, data: Path, p: dict[str, Any]) -> dict[str, Any]:
    sizes = p["fewer"].get(kind, {}).get(axis, p["sizes"][axis])
    base = p["base"] | p["wider"].get(kind, {}).get(axis, {})
    times = [timed(CALLS[kind](base | {axis: size}, data, p), p["rounds"]) for size in sizes]
    upper = slice(len(sizes) // 2, None)
    slopes = [slope(sizes[upper], round[upper]) for round in zip(*times, strict=True)]
    return {"sizes": sizes, "seconds": [statistics.median(each) for each in times], "exponent": over_seeds(slopes)}


def timed(call: Callable[[], Any], rounds: int) -> list[float]:
    seconds: list[float] = []
    for n in itertools.count():
        seconds.append(clock.seconds(call, "cpu"))
        if n == 0 and seconds[0] < LONG:
            seconds.clear()
        if len(seconds) == rounds:
            return seconds


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    return statistics.linear_regression([math.log(x) for x in sizes], [math.log(x) for x in seconds]).slope


def model_of(size: dict[str, int], *, modified: bool, vocabulary: int = 512) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=STREAM,
            intermediate_size=2 * STREAM,
            num_hidden_layers=size["layers"],
            num_attention_heads=size["heads"],
            num_key_value_heads=size["heads"] // 2,
            head_dim=HEAD_DIM,
            vocab_size=vocabulary,
            max_position_embeddings=size["length"] + 1,
            bos_token_id=1,
            tie_word_embeddings=True,
        )
    )
    if modified:
        mods = rm.TruncatedRoPE(0.75), rm.AdaptiveTemperature(trainable="head"), rm.LearnedSink(init=0, read_bos=True)
        rm.apply(model, *mods)
    return model


def training(size: dict[str, int], data: Path, p: dict[str, Any], *, modified: bool) -> Callable[[], Any]:
    model = model_of(size, modified=modified)
    tokens_BT = torch.randint(3, 512, (1, size["length"]), generator=torch.Generator().manual_seed(0))
    tokens_BT[:, 0] = 1

    def once() -> None:
        model(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss.backward()
        model.zero_grad()

    return once


def decoded(size: dict[str, int], data: Path, p: dict[str, Any], *, modified: bool) -> Callable[[], Any]:
    return decoding(model_of(size, modified=modified).eval(), size["length"])


def reading(size: dict[str, int], data: Path, p: dict[str, Any]) -> Callable[[], Any]:
    model = model_of(size, modified=False).eval()
    return partial(measured, model, crops_of(model, protocol_of(size["length"], p["sequences"], 1)))


def comparing(size: dict[str, int], data: Path, p: dict[str, Any]) -> Callable[[], Any]:
    """Of two reports, with every interval of the difference."""
    tokenizer = AutoTokenizer.from_pretrained(data / "models" / "prose3M")
    words = [tokenizer.decode([token]) for token in range(100, 200)]
    texts = [" ".join(words[(n + k * k) % 100] for k in range(2 * size["length"])) for n in range(p["sequences"])]
    model = model_of(size, modified=False, vocabulary=len(tokenizer)).eval()
    protocol = protocol_of(size["length"], p["sequences"], 1)
    report = rm.measure(model, tokenizer, texts, protocol, progress=False, command="evals")
    return partial(rm.compare, report, report)


CALLS: dict[str, Callable[[dict[str, int], Path, dict[str, Any]], Callable[[], Any]]] = {
    "training, stock": partial(training, modified=False),
    "training, modified": partial(training, modified=True),
    "decoding, stock": partial(decoded, modified=False),
    "decoding, modified": partial(decoded, modified=True),
    "measuring": reading,
    "comparing": comparing,
}


def bytes_of_sums(p: dict[str, Any]) -> dict[str, float]:
    """What a measurement with so many groups as at_scale has keeps a layer, head and token, at two lengths.

    Counted at that number: some sums are by group and some are not.
    """
    found = {}
    for length in (p["base"]["length"], 2 * p["base"]["length"]):
        size = p["base"] | {"length": length}
        model = model_of(size, modified=False).eval()
        protocol = protocol_of(length, at_scale.GROUPS, 1)
        with observing(model) as observation:
            sums, _ = capture(observation, crops_of(model, protocol), protocol)
        kept = sum(x.numel() * x.element_size() for layer in sums.layers.values() for x in layer.tensors.values())
        found[str(length)] = kept / (size["layers"] * size["heads"] * length)
    return found


def above(found: dict[str, Any]) -> list[str]:
    """What grows faster than it must, and faster than the same of the stock model."""
    rounds = {(k, a): found["grown"][f"{k} · {a}"]["exponent"]["seeds"] for k in THEORY for a in THEORY[k]}
    together = 1 - 0.025 / len(rounds)
    of = {each: over_seeds(slopes, probability=together) for each, slopes in rounds.items()}
    faster = []
    for kind, axis in of:
        stock = kind.replace("modified", "stock")
        must = THEORY[kind][axis] if stock == kind else max(THEORY[kind][axis], of[stock, axis]["high"])
        if of[kind, axis]["low"] > must:
            faster.append(f"{kind} by {axis}")
    return faster


def section(found: dict[str, Any]) -> str:
    axes = {axis: (min(sizes), max(sizes)) for axis, sizes in found["protocol"]["sizes"].items()}
    lines = []
    for kind, powers in THEORY.items():
        cells = [found["grown"][f"{kind} · {axis}"] for axis in powers]
        by_axis = zip(cells, powers.values(), strict=True)
        lines.append((kind, *(f"{shown(each['exponent'], '{:.2f}')}, theory {power}" for each, power in by_axis)))
    head = ("cost", *(f"{axis}, {low} to {high}" for axis, (low, high) in axes.items()))
    faster = above(found)
    longest = found["grown"]["training, modified · length"]["seconds"][-1]
    ratio = longest / found["grown"]["training, stock · length"]["seconds"][-1]
    return "\n\n".join(
        (
            "## How cost grows",
            f"The power of the size with which the time grows, over the upper half of the sizes. "
            f"{'Faster than theory: ' + ', '.join(faster) if faster else 'Nothing grows faster than theory'}"
            f"{' (stock: a long cache outgrows those of the CPU)' if any('stock' in each for each in faster) else ''}. "
            f"A modified training step at {axes['length'][1]} tokens takes {ratio:.2f} of the stock one, where the "
            "model is hardly more than its attention.",
            markdown_table(head, lines),
            "### Seven billion parameters at 128k tokens, computed",
            at_scale.section(statistics.mean(found["grown"]["sums"].values())),
        )
    )


def learned(found: dict[str, Any]) -> list[Learned]:
    rows = []
    for kind in ("training, modified", "measuring"):
        each = found["grown"][f"{kind} · length"]["exponent"]
        rows.append(
            Learned(
                claim=f"Cost grows with the length as attention does ({kind})",
                figure=f"exponent {each['value']:.2f}",
                interval=ends(each, "{:.2f}"),
                paper="theory: 2" + ("" if each["low"] <= 2 else "; ours grows faster"),
                limits=f"up to {found['protocol']['sizes']['length'][-1]} tokens, 2 layers of 2 heads, one CPU thread",
            )
        )
    return rows
