"""What the modifications cost a training step of a whole model, in transformers' Trainer.

A llama of about six million parameters at T = 512 on one CPU thread: the Trainer's step (forward, backward, clipping,
AdamW) with a modification at full strength, over the same step of the stock model. Stock and modified run in turns, a
few steps each, in CPU time, so that other work on the machine does not count. "stock again" is the noise.

Target: at most 1.5 with all modifications. A figure beyond it is a miss, and the page says so.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import ropemods as rm
from evals.claim import Cells, Learned
from ropemods.mods import Mod
from ropemods.report.words import markdown_table

MODS: dict[str, tuple[Mod, ...]] = {
    "stock again": (),
    "TruncatedRoPE": (rm.TruncatedRoPE(keep=0.75),),
    "AdaptiveTemperature, trained": (rm.AdaptiveTemperature(trainable="head"),),
    "ReplacedBos": (rm.ReplacedBos(by="zero"),),
    "UnrotatedBos": (rm.UnrotatedBos(),),
    "LearnedSink": (rm.LearnedSink(),),
    "all five": (
        rm.TruncatedRoPE(keep=0.75),
        rm.AdaptiveTemperature(trainable="head"),
        rm.ReplacedBos(by="zero"),
        rm.UnrotatedBos(),
        rm.LearnedSink(read_bos=True),
    ),
}
TARGET = 1.5
ALONE = True
PROTOCOL = {
    "nano": {
        "seeds": [0],
        "length": 512,
        "batch": 2,
        "rounds": 3,
        "steps": 4,
        "hidden": 256,
        "layers": 7,
        "heads": 8,
        "vocabulary": 4096,
        "mods": {name: [str(mod) for mod in mods] for name, mods in MODS.items()},
    }
}


class StepTimes(TrainerCallback):
    """CPU seconds of every step but the first, which warms up."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = time.process_time()

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > 1:
            self.seconds.append(time.process_time() - self.begun)


def model_of(p: dict[str, Any]) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=p["hidden"],
            intermediate_size=p["hidden"] * 8 // 3,
            num_hidden_layers=p["layers"],
            num_attention_heads=p["heads"],
            num_key_value_heads=p["heads"] // 2,
            vocab_size=p["vocabulary"],
            max_position_embeddings=p["length"],
            bos_token_id=1,
            tie_word_embeddings=True,
        )
    )


def run(scale: str, data: Path, cells: Cells) -> dict[str, Any]:
    protocol = PROTOCOL[scale]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {"steps": cells({name: partial(paired, protocol, mods) for name, mods in MODS.items()})}
    finally:
        torch.set_num_threads(threads)


def paired(p: dict[str, Any], mods: tuple[Mod, ...]) -> dict[str, Any]:
    """The modified step's time over the stock step's, a figure a round."""
    stock, modified = model_of(p), model_of(p)
    source = torch.Generator().manual_seed(0)
    tokens_NT = torch.randint(3, p["vocabulary"], (p["steps"] * p["batch"], p["length"]), generator=source)
    tokens_NT[:, 0] = 1
    if mods:
        batch = tokens_NT[: p["batch"]] if any(mod.calibrates for mod in mods) else None
        rm.apply(modified, *mods, strength=1.0, calibration=batch)
    ratios = [seconds(modified, tokens_NT, p) / seconds(stock, tokens_NT, p) for _ in range(p["rounds"])]
    return {
        "parameters": sum(each.numel() for each in stock.parameters()),
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
    }


def seconds(model: LlamaForCausalLM, tokens_NT: torch.Tensor, p: dict[str, Any]) -> float:
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=p["batch"],
            max_steps=p["steps"],
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            use_cpu=True,
        )
        rows = [{"input_ids": row, "labels": row} for row in tokens_NT]
        Trainer(model, arguments, train_dataset=rows, callbacks=[times]).train()
    return statistics.median(times.seconds)


def section(found: dict[str, Any]) -> str:
    p, steps = found["protocol"], found["steps"]
    rows = [(name, f"{each['ratio']:.2f}", f"{each['low']:.2f} to {each['high']:.2f}") for name, each in steps.items()]
    all_five = steps["all five"]["ratio"]
    verdict = "met" if all_five <= TARGET else "**missed**"
    return "\n\n".join(
        (
            "## What a training step costs",
            f"{steps['all five']['parameters'] / 1e6:.1f}M parameters, T = {p['length']}, the Trainer's step on one "
            f"CPU thread, over the stock step. The target of {TARGET} for all modifications is {verdict}.",
            markdown_table(("modification", "time / stock", "least to largest of the rounds"), rows),
        )
    )


def learned(found: dict[str, Any]) -> list[Learned]:
    each = found["steps"]["all five"]
    return [
        Learned(
            claim="All modifications together are affordable in training",
            figure=f"{each['ratio']:.2f} times the stock step",
            interval=f"{each['low']:.2f} to {each['high']:.2f} (range)",
            paper="no figure known",
            limits=f"CPU, {each['parameters'] / 1e6:.1f}M parameters, T = {found['protocol']['length']}",
        )
    ]
