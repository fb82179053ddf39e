"""What measuring costs on a real model: time and memory against a plain forward of the same tokens, and the page.

    python -m evals.measuring --model .cache/SmolLM2-135M --text ../shared/data/text/books.valid.jsonl.xz \\
        --page evals/profile.md

64 crops of 256 tokens with everything that a report holds, the same without the mask term, and eight crops of 8,192, in
CPU time of two threads, in turns with the plain forward. Memory is the growth of the resident set over the loaded
model, each in a process of its own. Then, of the measurement of 64 crops: the seconds of its estimates, of its page,
and of a comparison's.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ropemods as rm
from evals.between import marks, write_between
from evals.leakage_cost import crops_of, measured, memory, plain, protocol_of
from ropemods.leakage.capture import capture
from ropemods.leakage.crops import Crops
from ropemods.leakage.estimate import estimate
from ropemods.model.observation import observing
from ropemods.report.words import markdown_table

PART = "measuring"
THREADS, BATCH, ROUNDS = 2, 8, 3
SHORT, LONG = (256, 64), (8192, 8)
"""Tokens of a crop, and crops."""


def ratios(model: Any, crops: Crops, ways: dict[str, Crops], rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        base = seconds(partial(plain, model, crops))
        for name, read in ways.items():
            found[name].append(seconds(partial(measured, model, read)) / base)
    return found


def seconds(call: Callable[[], Any], clock: Callable[[], float] = time.process_time) -> float:
    start = clock()
    call()
    return clock() - start


def pages(model: Any, crops: Crops, tokenizer: Any, text: Path) -> dict[str, float]:
    with observing(model) as observation:
        sums, _ = capture(observation, crops, crops.protocol)
    report = rm.measure(model, tokenizer, str(text), crops.protocol, progress=False, command="evals")
    with tempfile.TemporaryDirectory() as folder:
        return {
            "estimates with their bootstrap": seconds(lambda: estimate(sums), time.perf_counter),
            "a report's page": seconds(lambda: report.to_html(f"{folder}/one.html"), time.perf_counter),
            "a comparison with its page": seconds(
                lambda: rm.compare(report, report).to_html(f"{folder}/two.html"), time.perf_counter
            ),
        }


def table(folder: Path, text: Path) -> str:
    torch.set_num_threads(THREADS)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    short, long = (
        crops_of(model, protocol_of(length, sequences, min(BATCH, sequences // 8)))
        for length, sequences in (SHORT, LONG)
    )
    # Made anew, since which crops are read, and when, follows from whether there is a mask term.
    no_mask = crops_of(model, dataclasses.replace(short.protocol, mask_term=False))
    measured(model, crops_of(model, protocol_of(128, 8, 4)))  # what is made once is no part of it
    found = ratios(model, short, {"everything": short, "without the mask term": no_mask}, ROUNDS)
    found = {f"{SHORT[1]} × {SHORT[0]} tokens, {name}": each for name, each in found.items()}
    found[f"{LONG[1]} × {LONG[0]} tokens, everything"] = ratios(model, long, {"all": long}, 1)["all"]
    lines = [(n, f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})") for n, each in found.items()]
    place = str(folder.resolve())
    taken = {way: memory(way, place, folder, SHORT[0], BATCH)["over_model"] for way in ("plain", "measured")}
    parts = pages(model, short, tokenizer, text)
    return "\n\n".join(
        (
            f"torch {torch.__version__}, {THREADS} threads.",
            markdown_table(("measuring", "time / plain forward"), lines),
            f"Memory over the loaded model: plain forward {taken['plain'] / 1e6:.0f} MB, measuring "
            f"{taken['measured'] / 1e6:.0f} MB, {(taken['measured'] - taken['plain']) / 1e6:.0f} MB more.",
            "Seconds: " + ", ".join(f"{name} {each:.1f}" for name, each in parts.items()) + ".",
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--page", type=Path, help=f"write the tables between {' and '.join(marks(PART))} of this file")
    options = parser.parse_args()
    written = table(options.model, options.text)
    print(written)
    if options.page is not None:
        write_between(options.page, PART, written)


if __name__ == "__main__":
    main()
