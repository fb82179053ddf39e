"""Texts and tokenizers of any make, handed to what reads text: the numbers of the same text, or an error."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import ropemods as rm
from tests import zoo
from tests.leakage import small
from tests.strangers.uses import NEVER, Subject, use

SMALLEST = {"sequences": 8, "length": 16, "window": 4, "replicates": 100, "mask_term": False}


@cache
def texts() -> list[str]:
    draw = random.Random(0)
    return [" ".join(f"w{draw.randrange(4, zoo.VOCAB)}" for _ in range(80)) for _ in range(10)]


def rows(named: str = "text") -> str:
    return "".join(json.dumps({named: text}) + "\n" for text in texts())


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


SAME: dict[str, Callable[[Path], Any]] = {
    "list": lambda folder: texts(),
    "tuple": lambda folder: tuple(texts()),
    "generator": lambda folder: (text for text in texts()),
    "values": lambda folder: dict(enumerate(texts())).values(),
    "with empty ones": lambda folder: [*texts(), "", " \n"],
    "twice": lambda folder: texts() * 2,
    "jsonl": lambda folder: written(folder, "a.jsonl", rows()),
    "jsonl as text": lambda folder: str(written(folder, "a.jsonl", rows())),
    "jsonl marked": lambda folder: written(folder, "a.jsonl", b"\xef\xbb\xbf" + rows().encode()),
    "jsonl packed": lambda folder: written(folder, "a.jsonl.gz", gzip.compress(rows().encode())),
    "txt": lambda folder: written(folder, "a.txt", "<|endoftext|>".join(texts())),
}
"""The same documents, however they come."""

WRONG: dict[str, Callable[[Path], Any]] = {
    "none": lambda folder: None,
    "none within": lambda folder: [*texts(), None],
    "number": lambda folder: 3,
    "bytes": lambda folder: "".join(texts()).encode(),
    "columns": lambda folder: {"text": texts()},
    "rows": lambda folder: [{"text": text} for text in texts()],
    "ids": lambda folder: [[3, 4, 5] * 40] * 10,
    "empty": lambda folder: [],
    "blank": lambda folder: ["", " "],
    "short": lambda folder: [text[:20] for text in texts()],
    "one word": lambda folder: ["w9 " * 300] * 10,
    "unknown words": lambda folder: [f"x{n} " * 300 for n in range(10)],
    "other column": lambda folder: written(folder, "a.jsonl", rows("body")),
    "latin": lambda folder: written(folder, "a.txt", "é".encode("latin-1") * 2000),
    "cut short": lambda folder: written(folder, "a.jsonl.gz", gzip.compress(rows().encode())[:200]),
    "not json": lambda folder: written(folder, "a.jsonl", "text\n" * 99),
    "no file": lambda folder: folder / "none.txt",
    "folder": lambda folder: folder,
    "suffix": lambda folder: written(folder, "a.pdf", "x"),
}


def loss(model: Any, tokenizer: Any, documents: Any, **options: Any) -> Tensor:
    report = rm.measure(model, tokenizer, documents, SMALLEST, progress=False, **options)
    assert report.held_out_loss is not None
    return torch.tensor([report.held_out_loss.value, report.terms["residual"].all.value], dtype=torch.float64)


@use(every=False, documents=tuple(SAME))
def test_the_same_text_gives_the_same_numbers(subject: Subject, documents: str) -> Iterator[Tensor]:
    model = subject.model()
    yield loss(model, small.tokenizer(), SAME[documents](subject.folder))
    yield loss(model, small.tokenizer(), texts())


@use(every=False, documents=tuple(WRONG))
def test_what_is_no_text_is_refused(subject: Subject, documents: str) -> Iterator[Any]:
    model = subject.model()
    if subject.mod is None:
        yield NEVER
        yield NEVER
    yield loss(model, small.tokenizer(), WRONG[documents](subject.folder))
    yield NEVER


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "name": lambda: "gpt2",
    "function": lambda: str.split,
    "without BOS": lambda: small.tokenizer(bos=False),
    "larger": lambda: grown(small.tokenizer()),
}


def grown(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """One with more tokens than the model has, which occur in the text."""
    import copy

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["w7 w8", *(f"w{n}" for n in range(61, 99))])
    tokenizer.add_tokens([f"w{n} " for n in range(4, 60)])
    return tokenizer


@use(every=False, tokenizer=tuple(TOKENIZERS), reader=("measure", "suggest"))
def test_what_is_no_tokenizer_of_this_model_is_refused(subject: Subject, tokenizer: str, reader: str) -> Iterator[Any]:
    model = subject.model()
    if subject.mod is None:
        yield NEVER
        yield NEVER
    if reader == "measure":
        yield loss(model, TOKENIZERS[tokenizer](), texts())
    yield rm.suggest(model, TOKENIZERS[tokenizer](), texts(), 64, sequences=8, crop=16, progress=False)
    yield NEVER


CALIBRATION: dict[str, Any] = {
    "rows": lambda ids: ids,
    "list": lambda ids: ids.tolist(),
    "one row": lambda ids: ids[0],
    "floats": lambda ids: ids.float(),
    "empty": lambda ids: ids[:0],
    "no columns": lambda ids: ids[:, :0],
    "BOS alone": lambda ids: ids[:1, :1],
    "no BOS": lambda ids: ids[:, 1:],
    "padded right": lambda ids: torch.nn.functional.pad(ids, (0, 3)),
    "padded left": lambda ids: torch.nn.functional.pad(ids, (3, 0)),
    "out of range": lambda ids: torch.where(ids == ids[0, 3], 999, ids),
    "batch": lambda ids: {"input_ids": ids},
}


@use(every=False, rows=tuple(CALIBRATION))
@torch.no_grad()
def test_calibration_reads_rows_that_begin_with_bos(subject: Subject, rows: str) -> Iterator[Any]:
    """Given to a modification that has no use for it, it is refused; so is anything but BOS and text."""
    ids = subject.ids(2, 8)
    model = subject.stock()
    if subject.mod is None:
        yield NEVER
        yield NEVER
    assert subject.mod is not None
    rm.apply(model, subject.mod, calibration=CALIBRATION[rows](ids))
    yield model(ids).logits
    if not subject.mod.calibrates or rows not in ("rows", "list"):
        yield NEVER
    yield rm.apply(subject.stock(), subject.mod, calibration=ids)(ids).logits
