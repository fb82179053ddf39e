"""Small things to measure: a tokenizer over the zoo's vocabulary, random documents, and real models."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from ropemods.leakage.protocol import Protocol
from ropemods.report.report import Report
from tests import zoo

DATA = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
PROTOCOL = Protocol(sequences=16, length=32, groups=8, early=(8, 16), grid_rows=12, batch_size=4, replicates=100)


@cache
def tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", *(f"w{index}" for index in range(3, zoo.VOCAB))]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="w3"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>"} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="<pad>", **special)


@cache
def documents(length: int = 200, count: int = 24) -> list[str]:
    """Random words: what follows a word is as likely anywhere."""
    draw = random.Random(0)
    return [" ".join(f"w{draw.randrange(3, zoo.VOCAB)}" for _ in range(length)) for _ in range(count)]


def real(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    folder = DATA / "models" / name
    if not folder.is_dir():
        pytest.skip(f"needs the weights in {folder}")
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def text(name: str) -> Path:
    path = DATA / "text" / name
    if not path.is_file():
        pytest.skip(f"needs the text in {path}")
    return path


def apart(a: Report, b: Report) -> float:
    """The largest relative difference of any value or interval end of two reports' terms."""
    pairs = []
    for name, term in a.terms.items():
        other = b.terms[name]
        scale = abs(term.early.high - term.early.low)
        for x, y in ((term.all, other.all), (term.early, other.early)):
            pairs += [abs(getattr(x, end) - getattr(y, end)) / scale for end in ("value", "low", "high")]
        for row, rows in zip(term.heads.all, other.heads.all, strict=True):
            pairs += [abs(x - y) / scale for x, y in zip(row, rows, strict=True)]
    assert a.held_out_loss is not None and b.held_out_loss is not None
    return max(*pairs, abs(a.held_out_loss.value / b.held_out_loss.value - 1))
