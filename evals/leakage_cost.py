"""What a measurement costs: against the plain forward pass of the same tokens, and against `output_attentions=True`.

Times are CPU times of one thread, taken in turns in one process, so that other work on the machine does not count;
memory in a fresh process for each figure, as the growth of the resident set over the loaded model and as the peak of
the whole process, at the protocol's own batch size. Attention is modelled on prose3M and on a random llama whose shares
of attention, MLP and head are nearer to a real model's.

Targets, at T = 2048: at most 1.5 times the time and 1.3 times the peak memory of the plain forward, a tenth of the time
of output_attentions=True with post-processing, and memory linear in T from 512 to 8192. A figure beyond its target is a
miss, and the page says so.

Shapes: B batch, H query heads, T queries, S keys, W window.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from evals.claim import Cells
from evals.leakage_cost_page import learned, section
from ropemods.leakage.capture import capture, forward, losses
from ropemods.leakage.crops import Crops
from ropemods.leakage.estimate import estimate
from ropemods.leakage.protocol import Protocol
from ropemods.model.observation import observing

LENGTH, SEED = 2048, 0
RANDOM = "llama48M"
__all__ = ["PROTOCOL", "learned", "run", "section"]
ALONE = True
PROTOCOL = {
    "nano": {
        "seeds": [SEED],
        "length": LENGTH,
        "rounds": 2,
        "sequences_and_batch": {"prose3M": [16, 4], RANDOM: [8, 2]},
        "lengths": [512, 1024, 2048, 4096, 8192],
    }
}
STEADY = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
"""What is freed goes back to the system at once, so that a peak is what was in use and no fragmentation."""


def protocol_of(length: int, sequences: int, batch_size: int) -> Protocol:
    return Protocol(sequences=sequences, groups=sequences, length=length, batch_size=batch_size, seed=SEED)


def model_of(name: str, data: Path, *, attention: str = "sdpa") -> PreTrainedModel:
    """A folder under models/, or a random llama with shares of attention, MLP and head nearer to a real one's."""
    if name != RANDOM:
        return AutoModelForCausalLM.from_pretrained(data / "models" / name, attn_implementation=attention).eval()
    torch.manual_seed(SEED)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=16384,
        tie_word_embeddings=True,
        max_position_embeddings=LENGTH,
        attn_implementation=attention,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def crops_of(model: PreTrainedModel, protocol: Protocol) -> Crops:
    """Random tokens: what a token is does not change what it costs."""
    source = torch.Generator().manual_seed(protocol.seed)
    tokens = torch.randint(3, model.config.vocab_size, (protocol.sequences, protocol.length), generator=source)
    tokens[:, 0] = 1
    return Crops(
        protocol=protocol,
        tokens_NT=tokens,
        groups_N=torch.arange(protocol.groups).repeat_interleave(protocol.per_group),
        folds_N=torch.tensor([n for n, fold in enumerate(protocol.folds()) for _ in fold]).repeat_interleave(
            protocol.per_group
        ),
        documents=protocol.groups,
        source="random tokens",
        digest="0" * 12,
    )


@torch.no_grad()
def plain(model: PreTrainedModel, crops: Crops) -> None:
    for fold in crops.folds():
        for tokens_BT, _ in fold:
            forward(model, tokens_BT)


def measured(model: PreTrainedModel, crops: Crops) -> None:
    with observing(model) as observation:
        capture(observation, crops, crops.protocol)


@torch.no_grad()
def with_attentions(model: PreTrainedModel, crops: Crops) -> None:
    """The same numbers out of output_attentions=True, as one would write it without ropemods.

    Band, sink and entropy of every sequence; for the mask term the mean map of the first half of the sequences, and the
    denominators of the second half with its departure from Toeplitz taken off.
    """
    w, kept = crops.protocol.window, []
    batches = [tokens_BT for fold in crops.folds() for tokens_BT, _ in fold]
    maps: list[Tensor] = []
    for n, tokens_BT in enumerate(batches):
        out = model(input_ids=tokens_BT, use_cache=False, output_attentions=True)
        losses(out.logits, tokens_BT)
        if n == len(batches) // 2:
            maps = [map_HTS / n - toeplitz(map_HTS / n) for map_HTS in maps]
        for layer, p_BHTS in enumerate(out.attentions):
            T = p_BHTS.shape[-1]
            log_BHTS = p_BHTS.clamp(min=1e-30).log()
            band = torch.stack([log_BHTS.diagonal(-o, -2, -1)[..., w - o : T - o] for o in range(w)], -1)
            entropy = -(p_BHTS * log_BHTS).sum(-1)
            kept.append((band.sum(0), p_BHTS[..., :2].sum(0), entropy.sum(0)))
            if n >= len(batches) // 2:
                kept.append(((log_BHTS - maps[layer]).logsumexp(-1).sum(0),))
            elif n == 0:
                maps.append(log_BHTS.sum(0))
            else:
                maps[layer] += log_BHTS.sum(0)


def toeplitz(map_HTS: Tensor) -> Tensor:
    """Each diagonal's mean, at its place."""
    T = map_HTS.shape[-1]
    means_HT = torch.stack([map_HTS.diagonal(-offset, -2, -1).mean(-1) for offset in range(T)], -1)
    offsets_TS = (torch.arange(T)[:, None] - torch.arange(T)).clamp(min=0)
    return means_HT[:, offsets_TS]


WAYS: dict[str, Callable[[PreTrainedModel, Crops], None]] = {
    "plain": plain,
    "measured": measured,
    "with_attentions": with_attentions,
}


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak(way: str, name: str, data: Path, length: int, batch_size: int) -> None:
    """In a process of its own: print what one way takes in memory, over the model and in all."""
    model = model_of(name, data, attention="eager" if way == "with_attentions" else "sdpa")
    short = crops_of(model, protocol_of(128, 16, 16))
    plain(model, short)  # what libraries allocate once is no part of it
    before = resident()
    crops = crops_of(model, protocol_of(length, 32, batch_size))
    if way == "with_attentions":
        crops = crops_of(model, protocol_of(length, 8, batch_size))
    if way == "plain":  # two batches are as large as all of them
        crops = crops_of(model, protocol_of(length, 2 * batch_size if batch_size > 3 else 8, batch_size))
    WAYS[way](model, crops)
    # Not ru_maxrss: a child starts with its parent's.
    lines = Path("/proc/self/status").read_text().splitlines()
    most = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    print(json.dumps({"over_model": most - before, "process": most}))


def memory(way: str, name: str, data: Path, length: int, batch_size: int) -> dict[str, int]:
    words = [way, name, str(data.resolve()), str(length), str(batch_size)]
    done = subprocess.run(
        [sys.executable, "-m", __name__, *words], env=STEADY, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def timed(way: str, model: PreTrainedModel, crops: Crops) -> float:
    start = time.process_time()
    WAYS[way](model, crops)
    return time.process_time() - start


def ratio(way: str, against: str, models: dict[str, PreTrainedModel], crops: Crops, rounds: int) -> dict[str, Any]:
    """The time of one way over another's, in turns; the first round warms up."""
    pairs = [(timed(way, models[way], crops), timed(against, models[against], crops)) for _ in range(rounds + 1)][1:]
    ratios = [a / b for a, b in pairs]
    return {
        "ratio": statistics.median(ratios),
        "min": min(ratios),
        "max": max(ratios),
        "seconds": [[round(x, 3) for x in pair] for pair in pairs],
        "sequences": crops.protocol.sequences,
        "batch_size": crops.protocol.batch_size,
    }


def run(scale: str, data: Path, cells: Cells) -> dict[str, Any]:
    protocol = PROTOCOL[scale]
    names = protocol["sequences_and_batch"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        done = cells(
            {
                **{f"time {name}": partial(times, name, data, protocol) for name in names},
                **{f"memory {name}": partial(memories, name, data) for name in names},
                **{f"T = {length}": partial(growth, length, data) for length in protocol["lengths"]},
            }
        )
        return {
            "time": {name: done[f"time {name}"] for name in names},
            "memory": {name: done[f"memory {name}"] for name in names},
            "growth": {str(length): done[f"T = {length}"] for length in protocol["lengths"]},
        }
    finally:
        torch.set_num_threads(threads)


def times(name: str, data: Path, protocol: dict[str, Any]) -> dict[str, Any]:
    sequences, batch_size = protocol["sequences_and_batch"][name]
    model = model_of(name, data)
    models = dict.fromkeys(WAYS, model) | {"with_attentions": model_of(name, data, attention="eager")}
    crops, few = crops_of(model, protocol_of(LENGTH, sequences, batch_size)), crops_of(model, protocol_of(LENGTH, 8, 1))
    return {
        "measured / plain": ratio("measured", "plain", models, crops, protocol["rounds"]),
        "with_attentions / measured": ratio("with_attentions", "measured", models, few, 1),
        "whole_over_pass": whole_over_pass(model, crops),
    }


def whole_over_pass(model: PreTrainedModel, crops: Crops) -> float:
    """The time of pass and estimates together over that of the pass alone: what the bootstrap adds."""
    start = time.process_time()
    with observing(model) as observation:
        sums, _ = capture(observation, crops, crops.protocol)
    middle = time.process_time()
    estimate(sums)
    return (time.process_time() - start) / (middle - start)


def memories(name: str, data: Path) -> dict[str, Any]:
    own = Protocol.batch_size
    taken = {way: memory(way, name, data, LENGTH, own) for way in ("plain", "measured")}
    taken["with_attentions, batch 1"] = memory("with_attentions", name, data, LENGTH, 1)
    shares = {k: taken["measured"][k] / taken["plain"][k] for k in ("over_model", "process")}
    return {"bytes": taken, "measured / plain": shares, "batch_size": own}


def growth(length: int, data: Path) -> dict[str, int]:
    return {way: memory(way, "prose3M", data, length, 1)["over_model"] for way in ("plain", "measured")}


if __name__ == "__main__":
    way, name, data, length, batch_size = sys.argv[1:]
    torch.set_num_threads(1)
    peak(way, name, Path(data), int(length), int(batch_size))
