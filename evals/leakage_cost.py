"""What a measurement costs, against the plain forward pass of the same tokens and against `output_attentions=True`.

    python evals/leakage_cost.py --data ../shared/data

Times are CPU times of one thread, taken in turns in one process, so that other work on the machine does not count;
memory in a fresh process for each figure, as the growth of the resident set over the loaded model and as the peak of
the whole process. Targets: at T = 2048 at most 1.5 times the time and 1.3 times the peak memory of the plain forward, a
tenth of the time of output_attentions=True with post-processing, and memory linear in T. Memory is taken at the
protocol's own batch size and number of groups. Writes results/leakage_cost.json.

Shapes: B batch, H query heads, T queries, S keys, W window.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from ropemods.atomic import write_text
from ropemods.hooks.listening import listening
from ropemods.leakage.capture import capture, forward, losses
from ropemods.leakage.crops import Crops
from ropemods.leakage.estimate import estimate
from ropemods.leakage.measure import versions
from ropemods.leakage.protocol import Protocol

RESULTS = Path(__file__).parent / "results"
LENGTH, SEED = 2048, 0
STEADY = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
"""What is freed goes back to the system at once, so that a peak is what was in use and no fragmentation."""
LENGTHS = (512, 1024, 2048, 4096, 8192)


def protocol_of(length: int, sequences: int, batch_size: int) -> Protocol:
    return Protocol(sequences=sequences, groups=sequences, length=length, batch_size=batch_size, seed=SEED)


def model_of(name: str, data: Path, *, attention: str = "sdpa") -> PreTrainedModel:
    """prose3M, or a random llama with shares of attention, MLP and head that are nearer to a real one's."""
    if name == "prose3M":
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
    with listening(model) as listened:
        capture(listened, crops, crops.protocol)


@torch.no_grad()
def with_attentions(model: PreTrainedModel, crops: Crops) -> None:
    """What one would write without ropemods: probabilities out of the model, and band, sink and entropy from them."""
    w, kept = crops.protocol.window, []
    for fold in crops.folds():
        for tokens_BT, _ in fold:
            out = model(input_ids=tokens_BT, use_cache=False, output_attentions=True)
            losses(out.logits, tokens_BT)
            for p_BHTS in out.attentions:
                T = p_BHTS.shape[-1]
                log_BHTS = p_BHTS.clamp(min=1e-30).log()
                band = torch.stack([log_BHTS.diagonal(-o, -2, -1)[..., w - o : T - o] for o in range(w)], -1)
                entropy = -(p_BHTS * log_BHTS).sum(-1)
                kept.append((band.sum(0), p_BHTS[..., :2].sum(0), entropy.sum(0)))


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
    words = ["--peak", way, name, str(length), str(batch_size), "--data", str(data)]
    done = subprocess.run([sys.executable, __file__, *words], env=STEADY, capture_output=True, text=True, check=True)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with models/")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak", nargs=4, metavar=("WAY", "MODEL", "LENGTH", "BATCH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        way, name, length, batch_size = options.peak
        return peak(way, name, options.data, int(length), int(batch_size))
    found: dict[str, Any] = {
        "command": "python evals/leakage_cost.py --data DATA",
        "versions": versions(),
        "seed": SEED,
        "machine": f"{platform.machine()} CPU, one thread",
        "length": LENGTH,
        "time": {},
        "memory": {},
        "growth": {},
    }
    for name, sequences, batch_size in (("prose3M", 32, 4), ("llama48M", 16, 2)):
        model = model_of(name, options.data)
        crops = crops_of(model, protocol_of(LENGTH, sequences, batch_size))
        models = dict.fromkeys(WAYS, model)
        against_plain = ratio("measured", "plain", models, crops, options.rounds)
        models["with_attentions"] = model_of(name, options.data, attention="eager")
        few = crops_of(model, protocol_of(LENGTH, 8, 1))
        against_attentions = ratio("with_attentions", "measured", models, few, 1)
        found["time"][name] = {"measured / plain": against_plain, "with_attentions / measured": against_attentions}
        own = Protocol.batch_size
        taken = {way: memory(way, name, options.data, LENGTH, own) for way in ("plain", "measured")}
        taken["with_attentions, batch 1"] = memory("with_attentions", name, options.data, LENGTH, 1)
        shares = {k: taken["measured"][k] / taken["plain"][k] for k in ("over_model", "process")}
        found["memory"][name] = {"bytes": taken, "measured / plain": shares, "batch_size": own}
        print(name, json.dumps(found["time"][name]), json.dumps(found["memory"][name]), flush=True)
    model = model_of("prose3M", options.data)
    start = time.process_time()
    with listening(model) as listened:
        crops = crops_of(model, protocol_of(LENGTH, 32, 4))
        sums, _ = capture(listened, crops, crops.protocol)
    middle = time.process_time()
    estimate(sums)
    found["estimate_seconds"] = {"pass": middle - start, "estimate": time.process_time() - middle}
    for length in LENGTHS:
        taken = {way: memory(way, "prose3M", options.data, length, 1) for way in ("plain", "measured")}
        found["growth"][str(length)] = {way: each["over_model"] for way, each in taken.items()}
        print(length, json.dumps(found["growth"][str(length)]), flush=True)
    print(f"wrote {write_text(RESULTS / 'leakage_cost.json', json.dumps(found, indent=1) + chr(10))}")


if __name__ == "__main__":
    main()
