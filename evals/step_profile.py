"""Where the time of a training step goes, with and without the modifications, by torch's profiler.

    OMP_NUM_THREADS=1 python -m evals.step_profile                          measure, write the JSON and the page's table
    python -m evals.step_profile --redraw                                   the table again, from the JSON

A llama of two layers, 4:2 heads of 64 channels, T = 1024, one sequence, forward and backward in fp32 on a CPU; stock,
then with each attention modification, then with all of them, on the stock kernels (`flash`) and on the eager path. An
operator's own time counts once, under the first name of `KINDS` that fits it or the operator it runs in.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

import ropemods as rm
from evals.between import write_between
from ropemods.bench.grid import machine
from ropemods.mods import Mod
from ropemods.report.words import markdown_table
from ropemods.settings.files import write_text
from ropemods.settings.versions import versions_of

FOLDER = Path(__file__).parent
LENGTH, STEPS, VOCABULARY, BOS = 1024, 3, 512, 1
SUBJECTS: dict[str, tuple[Mod, ...]] = {
    "stock": (),
    "AdaptiveTemperature": (rm.AdaptiveTemperature(trainable="head"),),
    "UnrotatedBos": (rm.UnrotatedBos(),),
    "LearnedSink": (rm.LearnedSink(init=0.0),),
    "all": (
        rm.TruncatedRoPE(keep=0.75),
        rm.AdaptiveTemperature(trainable="head"),
        rm.UnrotatedBos(),
        rm.LearnedSink(init=0.0, read_bos=True),
    ),
}
KINDS: dict[str, Callable[[list[str]], bool]] = {
    "attention kernels": lambda names: "flash_attention_for_cpu" in names[0],
    "around them, in our operators": lambda names: any(name.startswith("ropemods::") for name in names),
    "matrix products": lambda names: names[0] in ("aten::mm", "aten::addmm", "aten::bmm"),
    "softmax and exponentials": lambda names: any(word in names[0] for word in ("softmax", "aten::exp", "aten::log")),
    "the rest: copies, sums, products by element": lambda names: True,
}
PATHS = {"sdpa": "flash", "eager": "eager"}
"""attn_implementation, and what its kernels are called."""
PART = "table"


def step(mods: tuple[Mod, ...], attention: str) -> Callable[[], None]:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=LENGTH, bos_token_id=BOS,
    )  # fmt: skip
    config._attn_implementation = attention
    model = LlamaForCausalLM(config)
    if mods:
        rm.apply(model, *mods)
    ids = torch.randint(3, VOCABULARY, (1, LENGTH))
    ids[:, 0] = BOS

    def once() -> None:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()

    return once


def milliseconds(call: Callable[[], None]) -> dict[str, float]:
    """Of one step, by kind."""
    call()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(STEPS):
            call()
    spent = dict.fromkeys(KINDS, 0.0)
    for event in recorded.events():
        names, above = [event.name], event.cpu_parent
        while above is not None:
            names.append(above.name)
            above = above.cpu_parent
        kind = next(kind for kind, fits in KINDS.items() if fits(names))
        spent[kind] += event.self_cpu_time_total / 1000 / STEPS
    return spent


def measured() -> dict[str, Any]:
    rows = []
    for attention, path in PATHS.items():
        for name, mods in SUBJECTS.items():
            rows.append({"subject": name, "path": path, "milliseconds": milliseconds(step(mods, attention))})
            print(path, name, f"{sum(rows[-1]['milliseconds'].values()):.0f} ms", flush=True)
    return {
        "command": "OMP_NUM_THREADS=1 python -m evals.step_profile",
        "machine": machine("cpu"),
        "versions": versions_of("torch", "transformers"),
        "length": LENGTH,
        "steps": STEPS,
        "rows": rows,
    }


def table(found: dict[str, Any]) -> str:
    """Each kind in units of the whole stock step on the same path."""
    lines = []
    for row in found["rows"]:
        stock = next(r for r in found["rows"] if r["path"] == row["path"] and r["subject"] == "stock")
        whole = sum(stock["milliseconds"].values())
        spent = [row["milliseconds"][kind] / whole for kind in KINDS]
        lines.append((f"{row['subject']} ({row['path']})", *(f"{x:.2f}" for x in spent), f"{sum(spent):.2f}"))
    return markdown_table(("step", *KINDS, "together"), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--redraw", action="store_true", help="make the table from the JSON at hand")
    parser.add_argument("--json", type=Path, default=FOLDER / "results" / "profile_cpu.json")
    parser.add_argument("--page", type=Path, default=FOLDER / "profile.md")
    options = parser.parse_args()
    if options.redraw:
        found = json.loads(options.json.read_text(encoding="utf-8"))
    else:
        found = measured()
        write_text(options.json, json.dumps(found, indent=1) + "\n")
    write_between(options.page, PART, table(found))


if __name__ == "__main__":
    main()
