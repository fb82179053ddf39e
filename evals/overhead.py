"""What each modification costs a whole model, before and after a change of the inside.

    git worktree add ../before 00d0a08
    OMP_NUM_THREADS=1 python -m evals.overhead --model .cache/SmolLM2-135M --before ../before \\
        --cases "decode 1024" "decode 8192" --page evals/profile.md
    OMP_NUM_THREADS=1 python -m evals.overhead --model .cache/SmolLM2-135M --cases forward \\
        --page evals/profile.md

A token decoded on a cache of 1,024 or 8,192, and 4 × 256 tokens forward and in training (forward and backward), the
modified model and the stock one in turn, in CPU time of one thread; median and quartiles of the ratios. Each checkout
is timed in a process of its own. The cache is filled with random numbers, which cost what others do.
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
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

import ropemods as rm
from evals.between import marks, write_between
from ropemods.model import bos, cached_bos
from ropemods.report.words import markdown_table

MODS = {
    "stock again": (),
    "TruncatedRoPE": (rm.TruncatedRoPE(0.75),),
    "AdaptiveTemperature": (rm.AdaptiveTemperature(),),
    "LogTemperature": (rm.LogTemperature(),),
    "LearnedSink, BOS read": (rm.LearnedSink(init=0.0, read_bos=True),),
    "LearnedSink, BOS closed": (rm.LearnedSink(init=0.0),),
    "UnrotatedBos": (rm.UnrotatedBos(),),
    "AnchoredBos": (rm.AnchoredBos(offset=32),),
    "KeyedSink": (rm.KeyedSink(offset=32),),
}
CASES = {"decode 1024": 21, "decode 8192": 9, "forward": 7, "training": 5}
"""With the rounds that each is timed for."""
BATCH, LENGTH = 4, 256
PARTS = {"decode": "decode", "forward": "passes", "training": "passes"}
"""The table of a page that a kind of case belongs to."""
Quartiles = list[float]


def step(model: PreTrainedModel, case: str) -> Callable[[], None]:
    kind, *length = case.split()
    return decoding(model, int(length[0])) if kind == "decode" else passing(model, kind == "training")


def passing(model: PreTrainedModel, training: bool) -> Callable[[], None]:
    ids = torch.randint(3, model.config.vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = model.config.bos_token_id

    def once() -> None:
        with torch.set_grad_enabled(training):
            out = model(input_ids=ids, labels=ids, use_cache=False)
        if training:
            out.loss.backward()
            model.zero_grad()

    return once


def decoding(model: PreTrainedModel, length: int) -> Callable[[], None]:
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


def ratios(folder: Path, cases: Sequence[str]) -> dict[str, dict[str, Quartiles]]:
    torch.set_num_threads(1)
    stock, found = AutoModelForCausalLM.from_pretrained(folder).eval(), {}
    for name, mods in MODS.items():
        modified = copy.deepcopy(stock)
        if mods:
            rm.apply(modified, *mods)
        found[name] = {case: _ratios(step(stock, case), step(modified, case), CASES[case]) for case in cases}
    return found


def _ratios(stock: Callable[[], None], modified: Callable[[], None], rounds: int) -> Quartiles:
    pairs = []
    for round in range(rounds + 1):  # one to warm up
        times = []
        for call in (stock, modified):
            start = time.process_time()
            call()
            times.append(time.process_time() - start)
        if round:
            pairs.append(times[1] / times[0])
    return statistics.quantiles(pairs, n=4)


def timed(checkout: Path, options: argparse.Namespace) -> dict[str, dict[str, Quartiles]]:
    """The same in a process that imports the `ropemods` of another checkout."""
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve()), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--model", str(options.model.resolve()), "--json"]
    command += ["--cases", *options.cases]
    said = subprocess.run(command, cwd=checkout, env=environment, check=True, capture_output=True, text=True).stdout
    return json.loads(said.splitlines()[-1])


def table(columns: dict[str, dict[str, dict[str, Quartiles]]], cases: Sequence[str]) -> str:
    heads = [f"{case}{', ' + column if len(columns) > 1 else ''}" for case in cases for column in columns]
    lines = []
    for name in MODS:
        of = [found[name][case] for case in cases for found in columns.values()]
        lines.append((name, *(f"{middle:.2f} [{low:.2f}, {high:.2f}]" for low, middle, high in of)))
    return markdown_table(("step / stock step", *heads), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--before", type=Path, help="another checkout, timed too")
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    where = " or ".join(marks(part)[0] for part in dict.fromkeys(PARTS.values()))
    parser.add_argument("--page", type=Path, help=f"write the table behind {where} of this file: cases of one of them")
    parser.add_argument("--json", action="store_true", help="print the quartiles alone")
    options = parser.parse_args()
    if options.json:
        print(json.dumps(ratios(options.model, options.cases)))
        return
    parts = {PARTS[case.split()[0]] for case in options.cases}
    if options.page is not None and len(parts) > 1:
        parser.error("decoding and whole passes have a table each on the page: ask for one of them with --cases")
    columns = {} if options.before is None else {"before": timed(options.before, options)}
    columns["after"] = timed(Path(__file__).parent.parent, options)
    written = f"torch {torch.__version__}.\n\n{table(columns, options.cases)}"
    print(written)
    if options.page is not None:
        write_between(options.page, parts.pop(), written)


if __name__ == "__main__":
    main()
