"""A tiny model, tokenizer and text for the tests of training, made on the spot: nothing is downloaded."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, set_seed

from ropemods.training.recipe import Recipe
from ropemods.training.recipe_file import from_values
from ropemods.training.small_models import train_tokenizer

STDLIB = Path(ast.__file__).parent
MODULES = (
    "ast argparse asyncio/base_events asyncio/streams asyncio/tasks base64 bdb bisect calendar cmd code codecs "
    "collections/__init__ configparser contextlib copy csv dataclasses datetime decimal difflib dis doctest enum "
    "filecmp fileinput fractions ftplib functools gettext glob gzip heapq inspect ipaddress json/decoder locale "
    "logging/__init__ lzma mailbox mimetypes nntplib numbers operator optparse os pathlib pdb pickle platform pprint "
    "queue random sched shelve shlex shutil smtplib socket statistics string subprocess tarfile tempfile textwrap "
    "threading timeit tokenize trace traceback types typing uuid weakref zipfile"
).split()
VOCABULARY = 400


def documents() -> list[str]:
    """Modules of Python's standard library: some 80 documents, long ones among them."""
    files = [STDLIB / f"{name}.py" for name in MODULES]
    return [file.read_text(encoding="utf-8")[:12_000] for file in files if file.is_file()]


def write_text(folder: Path) -> Path:
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents()), encoding="utf-8")
    return path


def write_model(folder: Path, config: PreTrainedConfig | None = None) -> Path:
    """A model with random weights of that architecture, and a tokenizer; token 0 is BOS."""
    tokenizer = train_tokenizer(documents(), vocab_size=VOCABULARY)
    config = config or llama()
    set_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def llama(**changes: Any) -> LlamaConfig:
    shape: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": None,
        "tie_word_embeddings": True,
    }
    return LlamaConfig(**(shape | changes))


def values(model: Path, text: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A small recipe: both mods own something to go wrong, a frequency table and a parameter."""
    recipe: dict[str, Any] = {
        "model_name_or_path": str(model),
        "output_dir": str(output),
        "data": str(text),
        "mods": [{"kind": "truncated_rope", "keep": 0.5}, {"kind": "learned_sink"}],
        "schedule": {"steps": 4},
        "length": 64,
        "held_out": 0.2,
        "held_out_rows": 16,
        "max_steps": 8,
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
    }
    return recipe | changes


def recipe(model: Path, text: Path, output: Path, **changes: Any) -> Recipe:
    return from_values(values(model, text, output, **changes), source="test")


def write_recipe(path: Path, *args: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(values(*args, **changes)), encoding="utf-8")
    return path
