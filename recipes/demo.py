"""The whole loop in a few minutes on a CPU, without network: pretrain, modify, fine-tune four arms, measure, compare.

    python recipes/demo.py
    python recipes/demo.py --model my-model --text my-text.jsonl

A Llama of a million parameters learns from the source and docstrings of Python's standard library until it clearly
beats token frequencies. Then its positional encoding is modified and the four arms of a comparison are run. The table
is printed; `runs/demo/report.html` shows modified against control. `--model` takes a model of yours in its place,
and `--text` a text (a file, a folder of text files, or a dataset).

At this size the numbers show how the tool works and not what the modifications do for a large model.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch

from ropemods.atomic import write_text
from ropemods.extras import MissingPackage
from ropemods.training import measuring, session
from ropemods.training.arm import Arm
from ropemods.training.arms import run_arm
from ropemods.training.reading import from_values
from ropemods.training.reference import Architecture, train_tokenizer, write_untrained
from ropemods.training.results import write_results
from ropemods.training.table import duration
from ropemods.training.text import Source

FOLDER = Path("runs/demo")
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


def main(model: str | None, text: str | None) -> None:
    began = time.monotonic()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    if text is None:
        text = str(standard_library(FOLDER / "text.jsonl"))
    if model is None:
        torch.set_num_threads(1)  # a million parameters are too few to be worth sharing between cores
        model = pretrained(text)
    print(f"\n# Four arms from {model}\n", flush=True)
    values = {**FINETUNE, "model_name_or_path": model, "data": text, "output_dir": str(FOLDER)}
    this = session.begin(from_values(values, source="demo"), command=" ".join(sys.orig_argv))
    this.introduce()
    results = [run_arm(this, arm, seed) for arm, seed in this.plan()]
    print("\n" + write_results(this, results))
    shutil.copyfile(FOLDER / "comparison.html", FOLDER / "report.html")
    print(f"\nThe page is {FOLDER / 'report.html'}. This took {duration(time.monotonic() - began)}.")


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
    parser.add_argument("--model", help="a model of your own; by default one is trained first")
    parser.add_argument("--text", help="text of your own; by default Python's standard library")
    given = parser.parse_args()
    try:
        main(given.model or None, given.text or None)
    except (ValueError, OSError, MissingPackage) as error:
        sys.exit(f"demo: {error}")
