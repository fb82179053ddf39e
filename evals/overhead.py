"""What each modification costs a decoded token of a whole model, before and after a change of the inside.

    git worktree add ../before 00d0a08
    OMP_NUM_THREADS=1 python -m evals.overhead --model .cache/SmolLM2-135M --before ../before --page evals/profile.md

A step of one token on a cache that is already full, the modified model and the stock one in turn, in CPU time of one
thread; median and quartiles of the ratios. Each checkout is timed in a process of its own. The cache is filled with
random numbers, which cost what others do.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

import ropemods as rm
from evals.between import marks, write_between
from ropemods.model import bos, cached_bos

MODS = {
    "stock again": (),
    "TruncatedRoPE": (rm.TruncatedRoPE(0.75),),
    "AdaptiveTemperature": (rm.AdaptiveTemperature(),),
    "LogTemperature": (rm.LogTemperature(),),
    "LearnedSink, BOS read": (rm.LearnedSink(init=0.0, read_bos=True),),
    "LearnedSink, BOS closed": (rm.LearnedSink(init=0.0),),
    "UnrotatedBos": (rm.UnrotatedBos(),),
}
PART = "decode"
Quartiles = list[float]


def step(model: PreTrainedModel, length: int) -> Callable[[], None]:
    config = model.config
    cache = DynamicCache(config=config)
    dim = config.head_dim or config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        k, v = torch.randn(2, 1, config.num_key_value_heads, length, dim).unbind()
        cache.update(k, v, layer)
    at = torch.zeros(1, 1, dtype=torch.long)
    memory = bos.Memory(at, at, at.bool(), torch.tensor(length))
    token = torch.tensor([[55]])

    @torch.no_grad()
    def once() -> None:
        cached_bos.remember(cache, memory)
        model(token, past_key_values=cache)
        cache.crop(-1)

    return once


def ratios(folder: Path, length: int, rounds: int) -> dict[str, Quartiles]:
    torch.set_num_threads(1)
    stock, found = AutoModelForCausalLM.from_pretrained(folder).eval(), {}
    for name, mods in MODS.items():
        modified = copy.deepcopy(stock)
        if mods:
            rm.apply(modified, *mods)
        calls, pairs = (step(stock, length), step(modified, length)), []
        for round in range(rounds + 2):  # two to warm up
            times = []
            for call in calls:
                start = time.process_time()
                call()
                times.append(time.process_time() - start)
            if round >= 2:
                pairs.append(times[1] / times[0])
        found[name] = statistics.quantiles(pairs, n=4)
    return found


def timed(checkout: Path, options: argparse.Namespace) -> dict[str, Quartiles]:
    """The same in a process that imports the `ropemods` of another checkout."""
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve()), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--model", str(options.model.resolve()), "--json"]
    command += ["--cache", str(options.cache), "--rounds", str(options.rounds)]
    said = subprocess.run(command, cwd=checkout, env=environment, check=True, capture_output=True, text=True).stdout
    return json.loads(said.splitlines()[-1])


def table(columns: dict[str, dict[str, Quartiles]]) -> str:
    lines = [f"| step / stock step | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for name in MODS:
        cells = [f"{middle:.2f} [{low:.2f}, {high:.2f}]" for low, middle, high in (c[name] for c in columns.values())]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--before", type=Path, help="another checkout, timed too")
    parser.add_argument("--cache", type=int, default=1024, help="tokens in the cache (default: 1024)")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--page", type=Path, help=f"write the table between {' and '.join(marks(PART))} of this file")
    parser.add_argument("--json", action="store_true", help="print the quartiles alone")
    options = parser.parse_args()
    if options.json:
        print(json.dumps(ratios(options.model, options.cache, options.rounds)))
        return
    columns = {} if options.before is None else {"before": timed(options.before, options)}
    columns["after"] = timed(Path(__file__).parent.parent, options)
    written = f"Cache of {options.cache}, {options.rounds} rounds, torch {torch.__version__}.\n\n{table(columns)}"
    print(written)
    if options.page is not None:
        write_between(options.page, PART, written)


if __name__ == "__main__":
    main()
