"""The data of a run: training rows, held-out rows and held-out documents, made once and the same for all.

`prepare` reads as much text as the run needs, sets apart the documents that never train, makes rows of the others and
writes all of it to a folder. Every rank, arm, seed and resumed run then reads those same bytes, so that "the same
tokens in the same order" is a fact of the files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ropemods.settings.files import write_text
from ropemods.training.batches import Rows
from ropemods.training.text import Source, digest, is_held_out
from ropemods.training.token_rows import Packing, Row, Text, Tokenized, natural, stationary, tokenizer_for

SURPLUS = 8
"""From local text so many times the rows are made, and a random choice of them is kept: a few long documents would
otherwise be all that a short run reads. A stream is read no further than needed; its documents are many."""


class TooLittleText(ValueError):
    """The source does not hold what the run needs."""


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What the rows are made of. Equal options give equal rows."""

    source: Source
    held_out_source: Source | None = None
    """Where the held-out documents come from; None takes a share of `source`."""
    held_out: float = 0.05
    """The share of the documents that never trains."""
    held_out_rows: int = 128
    """At most so many rows for the held-out loss."""
    held_out_join: int = 0
    """Join held-out documents into ones of so many characters for the measurement; 0 leaves them as they are."""
    held_out_characters: int = 0
    """Held-out text that the measurement wants; a stream is read until it has given so much."""
    text: Text = "natural"
    packing: Packing | None = None
    """None: "restart" for natural text; stationary sequences fill their rows, so "none" is all they take."""
    length: int = 1024
    """Tokens in a row."""

    def __post_init__(self) -> None:
        if self.length < 16:
            raise ValueError(f"length={self.length}: a row has at least 16 tokens")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out={self.held_out}: a share of the documents, above 0 and below 1")
        if self.text not in ("natural", "stationary"):
            raise ValueError(f"text={self.text!r}: 'natural' or 'stationary'")
        if self.packing not in (None, "none", "restart", "continuous"):
            raise ValueError(f"packing={self.packing!r}: 'none', 'restart' or 'continuous'")
        if self.packing is None:
            object.__setattr__(self, "packing", "restart" if self.text == "natural" else "none")
        if self.text == "stationary" and self.packing != "none":
            raise ValueError(
                f"packing={self.packing!r} with text='stationary': stationary sequences are as long as the row, so "
                "there is nothing to pack; leave packing out"
            )

    @property
    def row_packing(self) -> Packing:
        assert self.packing is not None
        return self.packing

    def describe(self) -> str:
        """The line that every result states."""
        begin = {"natural": "beginning at document and paragraph starts", "stationary": "beginning anywhere"}
        packing = {
            "none": "one a row",
            "restart": "packed, positions restart at each BOS",
            "continuous": "packed, positions run on",
        }
        return (
            f"{self.source.name}: {self.text} text, sequences {begin[self.text]}, BOS first, "
            f"{packing[self.row_packing]}, rows of {self.length} tokens"
        )


@dataclass(frozen=True, kw_only=True)
class Data:
    """What `prepare` made."""

    options: DataOptions
    rows: Rows
    held_out_rows: Rows
    held_out_documents: tuple[str, ...]
    facts: dict[str, Any]
    """Counts of what was read and used, and a digest of the training rows."""


def prepare(
    options: DataOptions,
    tokenizer: Any,
    folder: Path,
    *,
    bos: int,
    rows: int | None,
    first_of_ranks: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Data:
    """Make `rows` training rows (None: all there are) and the held-out ones, or find them in `folder`.

    Every rank calls this and enters `first_of_ranks()`, which lets one of them in before the others; that one works.
    """
    place = folder / fingerprint(options, tokenizer, bos=bos, rows=rows)
    with first_of_ranks():
        if not (place / "facts.json").is_file():
            _write(place, options, _Reader(options, tokenizer), bos=bos, wanted=rows)
    return _read(options, place)


def fingerprint(options: DataOptions, tokenizer: Any, *, bos: int, rows: int | None) -> str:
    """12 hex digits of everything that the rows follow from."""
    stamps = [source.stamp() for source in (options.source, options.held_out_source) if source is not None]
    vocabulary = hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest()
    everything = json.dumps([asdict(options), stamps, vocabulary, bos, rows], sort_keys=True)
    return hashlib.sha256(everything.encode()).hexdigest()[:12]


class _Reader:
    """Reads the source once: training documents come out tokenised, held-out ones are put aside on the way."""

    def __init__(self, options: DataOptions, tokenizer: Any) -> None:
        self.options, self.tokenize = options, tokenizer_for(tokenizer)
        self.held_out: list[str] = []
        self.apart: set[int] = set()
        self.documents = self.tokens = 0
        if options.held_out_source is not None:
            wanted = options.held_out_characters if not options.held_out_source.is_local() else None
            for text in options.held_out_source.documents():
                self.held_out.append(text)
                if wanted is not None and sum(map(len, self.held_out)) >= wanted:
                    break
            self.apart = {digest(text) for text in self.held_out}
        self._texts = options.source.documents()

    def training(self) -> Iterator[Tokenized]:
        for text in self._texts:
            if self._put_aside(text):
                continue
            document = self.tokenize(text)
            self.documents, self.tokens = self.documents + 1, self.tokens + len(document.tokens)
            yield document

    def finish(self) -> None:
        """Read on, for held-out documents only: a file to its end, a stream until it has given enough."""
        stream = not self.options.source.is_local()
        enough = self.options.held_out_characters
        for text in self._texts:
            if stream and sum(map(len, self.held_out)) >= enough:
                return
            self._put_aside(text)

    def _put_aside(self, text: str) -> bool:
        if self.options.held_out_source is not None:
            return digest(text) in self.apart
        if not is_held_out(text, self.options.held_out):
            return False
        self.held_out.append(text)
        return True

    def rows(self, documents: Iterator[Tokenized], bos: int) -> Iterator[Row]:
        options = self.options
        if options.text == "stationary":
            return stationary(documents, bos=bos, length=options.length, seed=options.source.seed)
        return natural(documents, bos=bos, length=options.length, packing=options.row_packing)


def _write(place: Path, options: DataOptions, reader: _Reader, *, bos: int, wanted: int | None) -> None:
    times = SURPLUS if options.source.is_local() else 1
    train = list(islice(reader.rows(reader.training(), bos), None if wanted is None else times * wanted))
    reader.finish()
    tokens_used = sum(int((row.positions > 0).sum()) for row in train)
    if len(train) < (wanted or 1):
        wants = f"{wanted:,} rows of" if wanted is not None else "at least one row of"
        raise TooLittleText(
            f"this run reads {wants} {options.length} tokens, and {options.source.name} gave {len(train):,} "
            f"({reader.documents:,} training documents, {reader.tokens:,} tokens, as {options.text} text). Give more "
            "text, lower max_steps, the batch or the length, or let it be read several times (num_train_epochs)"
        )
    if wanted is not None:
        chosen = np.random.default_rng((options.source.seed, 13)).permutation(len(train))[:wanted]
        train = [train[n] for n in np.sort(chosen)]
    held_out = list(islice(reader.rows(map(reader.tokenize, reader.held_out), bos), options.held_out_rows))
    if not held_out:
        raise TooLittleText(
            f"no held-out rows: {len(reader.held_out)} of {len(reader.held_out) + reader.documents} documents were set "
            f"apart (held_out={options.held_out}), too few or too short for a row of {options.length} tokens as "
            f"{options.text} text. Raise held_out, name a source of its own (held_out_data), or say what parts the "
            'documents of a text file (separator: "blank-line")'
        )
    place.mkdir(parents=True, exist_ok=True)
    digest_ = hashlib.sha256()
    for name, rows in (("train", train), ("held_out", held_out)):
        for what in Row._fields:
            array = np.stack([getattr(row, what) for row in rows])
            _save(place / f"{name}_{what}.npy", array)
            if name == "train":
                digest_.update(array.astype("<i4").tobytes())
    write_text(place / "held_out.json", json.dumps(reader.held_out))
    facts = {
        "description": options.describe(),
        "documents": reader.documents,
        "held_out_documents": len(reader.held_out),
        "tokens_read": reader.tokens,
        "rows": len(train),
        "held_out_rows": len(held_out),
        # Natural text loses what a row cuts off; stationary text the ends of documents and short documents.
        "share_used": tokens_used / reader.tokens,
        "digest": digest_.hexdigest()[:12],
    }
    write_text(place / "facts.json", json.dumps(facts, indent=2) + "\n")  # last: it says that all is there


def _save(path: Path, array: np.ndarray) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.save(file, array)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(options: DataOptions, place: Path) -> Data:
    def rows(name: str) -> Rows:
        return Rows(*(np.load(place / f"{name}_{what}.npy", mmap_mode="r") for what in Row._fields))

    return Data(
        options=options,
        rows=rows("train"),
        held_out_rows=rows("held_out"),
        held_out_documents=tuple(json.loads((place / "held_out.json").read_text(encoding="utf-8"))),
        facts=json.loads((place / "facts.json").read_text(encoding="utf-8")),
    )
