"""Tiny checkpoints to run the commands on, and ways to run them."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ropemods.cli import main
from tests import zoo

REPOSITORY = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
PROGRAM = [sys.executable, "-m", "ropemods.cli"]


def save_tiny(folder: Path, architecture: str = "llama", backend: str = "sdpa") -> Path:
    zoo.build(architecture, backend).save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path, *, bos: bool = True) -> None:
    words = ["<pad>", "<s>", "</s>", *(f"w{index}" for index in range(3, zoo.VOCAB))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", zoo.BOS)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def run(line: str) -> None:
    assert main(shlex.split(line)) == 0


def refused(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a user's mistake is answered with."""
    capsys.readouterr()
    assert main(shlex.split(line)) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert "Traceback" not in message
    return message


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(zoo.tokens()).logits


def hidden(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if entry.name.startswith(".")]


def shown(path: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What `ropemods show` says of a path, as JSON."""
    capsys.readouterr()
    run(f"show {path} --json")
    return json.loads(capsys.readouterr().out)


def start(*words: str, program: Sequence[str] = PROGRAM, **options: Any) -> subprocess.Popen[str]:
    """The real program, started."""
    return subprocess.Popen([*program, *words], env=ENVIRONMENT, text=True, stderr=subprocess.PIPE, **options)
