"""Rows: where sequences begin, how they share a row, and that no token is read twice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropemods.leakage.crops import MARGIN
from ropemods.training.batches import Ordered, Rows, collator, order
from ropemods.training.token_rows import Row, Tokenized, natural, stationary, tokenizer_for
from tests.recipes import tiny

BOS = 0


def document(length: int, starts: list[int], first: int) -> Tokenized:
    """Tokens first, first + 1, …, so that every token tells where it comes from."""
    inside = sorted({0, *(start for start in starts if start < length)})
    return Tokenized(np.arange(first, first + length, dtype=np.int32), np.array(inside))


@st.composite
def texts(draw: st.DrawFn) -> list[Tokenized]:
    made, first = [], 1
    for _ in range(draw(st.integers(1, 6))):
        length = draw(st.integers(1, 90))
        made.append(document(length, draw(st.lists(st.integers(1, 89), max_size=8)), first))
        first += length
    return made


PACKINGS = st.sampled_from(["none", "restart", "continuous"])


@settings(deadline=None)
@given(texts(), st.integers(16, 40), PACKINGS)
def test_every_sequence_is_bos_and_a_stretch_from_a_start(documents: list[Tokenized], length: int, packing) -> None:
    starts = {int(d.tokens[s]) for d in documents for s in d.starts}
    for row in natural(documents, bos=BOS, length=length, packing=packing):
        real = row.tokens[row.positions >= 0]
        assert real[0] == BOS
        for piece in np.split(real, np.flatnonzero(real == BOS))[1:]:
            assert len(piece) == 1 or piece[1] in starts
            assert (np.diff(piece[1:]) == 1).all()


@settings(deadline=None)
@given(texts(), st.integers(16, 40), PACKINGS)
def test_no_token_is_read_twice_and_rows_are_full(documents: list[Tokenized], length: int, packing) -> None:
    rows = list(natural(documents, bos=BOS, length=length, packing=packing))
    content = np.concatenate([row.tokens[row.positions >= 0] for row in rows] or [np.array([], int)])
    content = content[content != BOS]
    assert len(content) == len(set(content.tolist()))
    if packing != "none":
        assert all((row.positions >= 0).all() for row in rows)
    else:
        assert len(rows) >= len(documents)  # no text is left over in a row that never fills


@settings(deadline=None)
@given(texts(), st.integers(16, 40))
def test_the_packings_differ_in_positions_only_as_they_say(documents: list[Tokenized], length: int) -> None:
    for row in natural(documents, bos=BOS, length=length, packing="restart"):
        assert (row.positions[row.tokens == BOS] == 0).all()
        assert ((np.diff(row.positions) == 1) | (row.positions[1:] == 0)).all()
    for row in natural(documents, bos=BOS, length=length, packing="continuous"):
        assert (row.positions == np.arange(length)).all()
    for row in natural(documents, bos=BOS, length=length, packing="none"):
        real = int((row.positions >= 0).sum())
        assert (row.positions[:real] == np.arange(real)).all() and (row.positions[real:] == -1).all()


@settings(deadline=None)
@given(st.integers(0, 400), st.integers(16, 50), st.integers(0, 5))
def test_stationary_rows_are_full_disjoint_and_never_near_a_document_start(size: int, length: int, seed: int) -> None:
    made = document(size, [], 1)
    rows = list(stationary([made], bos=BOS, length=length, seed=seed))
    assert len(rows) == max(0, size - MARGIN) // (length - 1)
    content = np.concatenate([row.tokens[1:] for row in rows] or [np.array([], int)])
    assert len(content) == len(set(content.tolist()))
    assert (content > MARGIN).all()
    for row in rows:
        assert row.tokens[0] == BOS and (np.diff(row.tokens[1:]) == 1).all()


def test_stationary_offsets_are_spread_evenly() -> None:
    # Of 200 documents with room for one crop and 15 places for it, each place must turn up about as often.
    length, room = 17, 15
    made = [document(MARGIN + 16 + room - 1, [], 1) for _ in range(600)]
    first = [int(row.tokens[1]) - 1 - MARGIN for row in stationary(made, bos=BOS, length=length, seed=0)]
    counts = np.bincount(first, minlength=room)
    assert len(counts) == room and counts.min() > 15 and counts.max() < 75  # 40 expected, standard deviation 6


def test_paragraphs_begin_after_empty_lines_and_lines_where_there_are_none() -> None:
    tokenizer = tiny.train_tokenizer(tiny.documents(), vocab_size=tiny.VOCABULARY)
    tokenize = tokenizer_for(tokenizer)
    made = tokenize("one two\nstill one\n\nthree\n \n\tfour")
    assert [tokenizer.decode(made.tokens[s:]).lstrip() for s in made.starts] == [
        "one two\nstill one\n\nthree\n \n\tfour",
        "three\n \n\tfour",
        "four",
    ]
    lines = tokenize("one\ntwo\nthree\n")
    assert [tokenizer.decode(lines.tokens[s:]) for s in lines.starts] == [
        "one\ntwo\nthree\n",
        "two\nthree\n",
        "three\n",
    ]


def test_a_text_is_tokenised_whole() -> None:
    tokenizer = tiny.train_tokenizer(tiny.documents(), vocab_size=tiny.VOCABULARY)
    text = tiny.documents()[0]
    assert tokenizer_for(tokenizer)(text).tokens.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_an_order_reads_every_row_once_before_any_twice() -> None:
    made = order(7, wanted=18, seed=3)
    assert sorted(made[:7]) == sorted(made[7:14]) == list(range(7))
    assert made[:7].tolist() != made[7:14].tolist()
    assert (
        len(made) == 18 and (order(7, wanted=18, seed=3) == made).all() and (order(7, wanted=18, seed=4) != made).any()
    )


def test_what_the_model_is_told_follows_from_the_packing() -> None:
    packed = Row(np.array([0, 5, 6, 0, 7], np.int32), np.array([0, 1, 2, 0, 1], np.int32))
    padded = Row(np.array([0, 5, 6, 0, 0], np.int32), np.array([0, 1, 2, -1, -1], np.int32))
    running = Row(packed.tokens, np.arange(5, dtype=np.int32))
    batch = collator("restart")([packed])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]] and "attention_mask" not in batch
    assert batch["labels"].tolist() == [[-100, 5, 6, -100, 7]]
    batch = collator("none")([padded])
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0]] and batch["labels"].tolist() == [
        [-100, 5, 6, -100, -100]
    ]
    batch = collator("continuous")([running])
    assert set(batch) == {"input_ids", "labels"} and batch["labels"].tolist() == [[-100, 5, 6, 0, 7]]


def test_tokens_are_counted_without_padding() -> None:
    rows = Rows(np.zeros((2, 4), np.int32), np.array([[0, 1, -1, -1], [0, 1, 2, 3]], np.int32))
    assert rows.tokens() == 6
    assert Ordered(rows, np.array([0, 0, 1])).tokens() == 8


@pytest.mark.parametrize("packing", ["none", "restart"])
def test_packing_gives_the_model_the_same_losses_as_one_sequence_a_row(packing: str) -> None:
    # Two short documents in one row must be read as if each stood alone.
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(tiny.llama()).eval()
    made = [Tokenized(np.arange(10, 10 + n, dtype=np.int32), np.array([0])) for n in (7, 7)]
    alone = [row for row in natural(made, bos=BOS, length=16, packing="none")]
    together = list(natural(made, bos=BOS, length=16, packing=packing))  # type: ignore[arg-type]
    with torch.no_grad():
        a = model(**collator("none")(alone), use_cache=False).loss
        b = model(**collator(packing)(together), use_cache=False).loss  # type: ignore[arg-type]
    assert len(together) == (1 if packing == "restart" else 2)
    assert torch.allclose(a, b, atol=1e-6)
