"""From documents to rows of tokens: where sequences begin, and how they share a row.

A sequence is BOS and then a stretch of one document. What the stretch begins with is part of the treatment, since a
model whose text looks different near BOS has a reason to know where it is (LEAKAGE, "the training text is itself a
treatment"), so it is chosen and stated, never left to chance:

    natural      at the start of a document, and in a long document at the starts of paragraphs
    stationary   anywhere: documents are cut at random offsets, never near their own start

A row holds one sequence or several:

    none         one a row; a shorter one is padded
    restart      sequences fill the row; position ids restart at each BOS and attention keeps them apart
    continuous   sequences fill the row; positions run on and attention crosses from one to the next

Stationary sequences are as long as the row, so they need no packing. A row is two arrays: its tokens, and the position
of each token, −1 for padding. Whatever differs between the three packings is in those positions.

Shapes: N rows, T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ropemods.leakage.crops import MARGIN

Text = Literal["natural", "stationary"]
Packing = Literal["none", "restart", "continuous"]
Ints = npt.NDArray[np.int32]

EMPTY_LINE, LINE_END = re.compile(r"\n[^\S\n]*\n\s*"), re.compile(r"\n\s*")
"""Paragraphs are parted by empty lines; in a document that has none, each line is one."""


class Tokenized(NamedTuple):
    """A document's tokens, and the indices of those that open a paragraph (the first is 0)."""

    tokens: Ints
    starts: npt.NDArray[np.int64]


class Row(NamedTuple):
    tokens: Ints
    positions: Ints


Tokenize = Callable[[str], Tokenized]


def tokenizer_for(tokenizer: Any) -> Tokenize:
    """How documents are tokenised: whole, so that no token depends on where sequences will begin."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} cannot tell which characters a token stands for, and paragraph starts are "
            "found by them; load the fast tokenizer (a tokenizer.json)"
        )

    def tokenize(text: str) -> Tokenized:
        # verbose=False: documents longer than the model's context are meant to be cut.
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        tokens = np.asarray(encoded["input_ids"], dtype=np.int32)
        first_character = np.fromiter((start for start, _ in encoded["offset_mapping"]), dtype=np.int64)
        parting = EMPTY_LINE if EMPTY_LINE.search(text.strip()) else LINE_END
        paragraphs = [0, *(match.end() for match in parting.finditer(text))]
        starts = np.unique(np.searchsorted(first_character, paragraphs))
        return Tokenized(tokens, starts[starts < len(tokens)])

    return tokenize


def natural(documents: Iterable[Tokenized], *, bos: int, length: int, packing: Packing) -> Iterator[Row]:
    """Rows of sequences that begin at document and paragraph starts.

    What does not fit a row is cut, and the next sequence begins at the next paragraph, so text is lost there.
    """
    tokens, positions = np.empty(length, np.int32), np.empty(length, np.int32)
    filled = 0
    for document in documents:
        cursor = 0
        while cursor < len(document.tokens):
            taken = min(length - filled - 1, len(document.tokens) - cursor)
            here = slice(filled, filled + 1 + taken)
            tokens[here] = [bos, *document.tokens[cursor : cursor + taken]]
            first = filled if packing == "continuous" else 0
            positions[here] = np.arange(first, first + 1 + taken)
            filled += 1 + taken
            # Where not even one token fitted behind BOS, the same stretch opens the next row.
            later = document.starts[document.starts >= cursor + taken]
            cursor = int(later[0]) if len(later) else len(document.tokens)
            if packing == "none" or filled == length:
                tokens[filled:], positions[filled:] = bos, -1
                yield Row(tokens.copy(), positions.copy())
                filled = 0


def stationary(documents: Iterable[Tokenized], *, bos: int, length: int, seed: int) -> Iterator[Row]:
    """Rows of one sequence each, cut end to end from a random offset, at least MARGIN tokens into its document."""
    size = length - 1
    source = np.random.default_rng((seed, 11))
    for document in documents:
        inside = document.tokens[MARGIN:]
        count = len(inside) // size
        if count == 0:
            continue
        offset = int(source.integers(0, len(inside) - count * size + 1))
        for n in range(count):
            piece = inside[offset + n * size : offset + (n + 1) * size]
            yield Row(np.concatenate(([bos], piece)).astype(np.int32), np.arange(length, dtype=np.int32))
