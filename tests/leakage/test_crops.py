"""Crops: where they are cut, how they are grouped, how ranks share them, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ropemods.leakage.crops import MARGIN, Crops, TooLittleText, make_crops
from ropemods.leakage.documents import Documents, join_short
from ropemods.leakage.protocol import Protocol
from tests.leakage.words import make_texts, make_tokenizer, places

PROTOCOL = Protocol(sequences=16, groups=8, length=32, early=(8, 16), grid_rows=8)


def crops_of(lengths: list[int], protocol: Protocol = PROTOCOL, **options: Any) -> tuple[Crops, list[Any]]:
    """Crops of documents with these lengths in words, and for each crop its (document, index) pairs."""
    texts = make_texts(lengths)
    tokenizer = make_tokenizer(texts)
    crops = make_crops(Documents(texts, "words"), tokenizer, protocol, **options)
    return crops, [places(tokenizer, row[1:]) for row in crops.tokens_NT.tolist()]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(140, 900), min_size=8, max_size=24), st.integers(0, 5))
def test_crops_are_stretches_of_long_documents_and_groups_share_none(lengths, seed):
    protocol = dataclasses.replace(PROTOCOL, seed=seed)
    crops, found = crops_of(lengths, protocol)
    assert crops.tokens_NT.shape == (16, 32)
    assert (crops.tokens_NT[:, 0] == 0).all()  # BOS
    assert crops.groups_N.bincount().tolist() == [2] * 8
    starts: dict[int, list[int]] = {}
    for crop in found:
        document, start = crop[0]
        assert crop == [(document, start + n) for n in range(31)]  # whole words, one document, in order
        assert start >= MARGIN
        starts.setdefault(document, []).append(start)
    for cuts in starts.values():
        cuts.sort()
        assert all(later - earlier >= 31 for earlier, later in itertools.pairwise(cuts))
    if crops.documents == len(starts):  # documents were not split
        groups = {(crop[0][0], int(group)) for crop, group in zip(found, crops.groups_N, strict=True)}
        assert len(groups) == len(starts)


def test_many_documents_give_one_crop_each():
    crops, found = crops_of([200] * 40)
    assert crops.documents == 16 == len({crop[0][0] for crop in found})
    assert not crops.notes


def test_offsets_are_uniform_so_content_does_not_depend_on_position():
    """Uniform offsets in 1000 words: the mean start of 128 crops scatters by 25 about 500."""
    protocol = dataclasses.replace(PROTOCOL, sequences=128)
    _, found = crops_of([1000] * 128, protocol)
    starts = torch.tensor([float(crop[0][1]) for crop in found])
    assert abs(float(starts.mean()) - 500) < 4 * 25
    assert float(starts.min()) < 100 and float(starts.max()) > 900


def test_a_book_is_split_into_blocks_that_stand_for_documents():
    crops, found = crops_of([4000])
    assert crops.documents == 8
    assert any("1 document(s) are too few" in note and "8 contiguous blocks" in note for note in crops.notes)
    blocks = [
        {i // 500 for crop, g in zip(found, crops.groups_N, strict=True) if g == n for _, i in crop} for n in range(8)
    ]
    assert sorted(map(len, blocks)) == [1] * 8 and set().union(*blocks) == set(range(8))


def test_blocks_of_a_book_keep_their_distance():
    """Blocks of 150 words, each less a tenth (15 words): over 30 seeds no two groups come nearer."""
    nearest = 1000
    for seed in range(30):
        crops, found = crops_of([1200], dataclasses.replace(PROTOCOL, seed=seed))
        spans = []
        for group in range(8):
            words = [i for crop, g in zip(found, crops.groups_N, strict=True) if g == group for _, i in crop]
            spans.append((min(words), max(words)))
        gaps = [later[0] - earlier[1] for earlier, later in itertools.pairwise(sorted(spans))]
        nearest = min(nearest, *gaps)
    assert 15 <= nearest < 50


def test_one_huge_document_among_short_ones_is_split_too():
    crops, _ = crops_of([70] * 10 + [6000])
    assert crops.groups_N.bincount().tolist() == [2] * 8
    assert any("too unequal" in note for note in crops.notes)


def test_same_seed_same_crops_and_another_seed_others():
    first, again = crops_of([300] * 20)[0], crops_of([300] * 20)[0]
    other = crops_of([300] * 20, dataclasses.replace(PROTOCOL, seed=1))[0]
    assert torch.equal(first.tokens_NT, again.tokens_NT) and first.digest == again.digest
    assert not torch.equal(first.tokens_NT, other.tokens_NT) and first.digest != other.digest


@pytest.mark.parametrize("world", [1, 2, 3, 5, 40])
def test_shards_share_out_every_sequence_once_in_equal_numbers(world):
    crops, _ = crops_of([300] * 20)
    shards = [crops.shard(rank, world) for rank in range(world)]
    by_fold = [[[len(g) for _, g in fold] for fold in shard.folds(3)] for shard in shards]
    assert all(counts == by_fold[0] for counts in by_fold)  # the same batches on every rank
    assert len(by_fold[0]) == len(PROTOCOL.folds())
    seen = []
    for shard in shards:
        for fold, batches in zip(PROTOCOL.folds(), shard.folds(3), strict=True):
            for tokens, groups in batches:
                assert all(g == -1 or g in fold for g in groups.tolist())
                seen += [(int(g), *t.tolist()) for t, g in zip(tokens, groups, strict=True) if g >= 0]
    wanted = [(int(g), *t.tolist()) for t, g in zip(crops.tokens_NT, crops.groups_N, strict=True)]
    assert sorted(seen) == sorted(wanted)


def test_no_more_text_is_tokenised_than_the_crops_need():
    few = make_texts([300] * 7)
    tokenizer, read = make_tokenizer(few), []
    words = [text.split() for text in few]
    texts = [" ".join(words[n % 7][n // 7 :] + words[n % 7][: n // 7]) for n in range(2000)]

    class Counting(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, text: str, **options: Any) -> Any:
            read.append(len(text))
            return super().__call__(text, **options)

    tokenizer.__class__ = Counting
    make_crops(Documents(texts, "many"), tokenizer, PROTOCOL)
    assert len(read) == 16 and sum(read) < 0.01 * sum(map(len, texts))


def test_unigram_control_has_the_frequencies_but_not_the_order():
    protocol = dataclasses.replace(PROTOCOL, sequences=64)
    text = "a a a b " * 2000
    tokenizer = make_tokenizer(["a b"])
    stationary = make_crops(Documents([text], "ab"), tokenizer, protocol)
    unigram = make_crops(Documents([text], "ab"), tokenizer, dataclasses.replace(protocol, text="unigram"))
    assert (unigram.tokens_NT[:, 0] == 0).all() and unigram.tokens_NT.shape == (64, 32)

    def share_of_b(x: torch.Tensor) -> float:
        return float((x == 3).double().mean())

    content = unigram.tokens_NT[:, 1:]
    # 1984 draws with chance ¼: a standard error of 0.01.
    assert share_of_b(content) == pytest.approx(0.25, abs=0.04)
    after_b = content[:, 1:][content[:, :-1] == 3]
    assert share_of_b(after_b) == pytest.approx(0.25, abs=0.08)
    b_then_b = stationary.tokens_NT[:, 1:]
    assert share_of_b(b_then_b[:, 1:][b_then_b[:, :-1] == 3]) == 0


def test_too_little_text_says_how_much_is_needed_and_how_much_there_is():
    with pytest.raises(TooLittleText) as error:
        crops_of([40] * 30)
    text = str(error.value)
    assert "16 crops of 32 tokens need at least 496 tokens in documents of 63 or more" in text
    assert "about 1,200 tokens in 30 document(s), the longest of about 4" in text and "hold about 0 crops" in text
    with pytest.raises(TooLittleText, match=r"found about 300 tokens in 1 document\(s\), .* about 8 crops"):
        crops_of([300])


def test_short_documents_can_be_joined():
    texts = make_texts([40] * 100)
    tokenizer, documents = make_tokenizer(texts), Documents(texts, "short")
    crops = make_crops(join_short(documents, characters=2000), tokenizer, PROTOCOL)
    assert crops.tokens_NT.shape == (16, 32)
    assert "joined" in crops.notes[0]
    borders = [len({document for document, _ in places(tokenizer, row[1:])}) for row in crops.tokens_NT.tolist()]
    assert max(borders) == 2  # a crop of 31 words crosses at most one border of 40-word documents


def test_short_offsets_are_noted():
    crops, _ = crops_of([70] * 20)
    assert any("median document has about 70 tokens" in note for note in crops.notes)


def test_a_tokenizer_without_bos_is_refused_with_the_fix_and_a_given_one_is_used():
    texts = make_texts([300] * 20)
    tokenizer, documents = make_tokenizer(texts, bos=False), Documents(texts, "words")
    with pytest.raises(ValueError, match="bos_token_id="):
        make_crops(documents, tokenizer, PROTOCOL)
    assert (make_crops(documents, tokenizer, PROTOCOL, bos_token_id=1).tokens_NT[:, 0] == 1).all()
    with pytest.raises(ValueError, match="not in the vocabulary of 6002"):
        make_crops(documents, tokenizer, PROTOCOL, bos_token_id=6002)
    with pytest.raises(ValueError, match=r"a whole number, not '<s>'; for a token by its name"):
        make_crops(documents, tokenizer, PROTOCOL, bos_token_id="<s>")  # type: ignore[arg-type]


def test_crops_never_contain_bos_inside():
    texts = [text.replace("w0_150", "<s>") for text in make_texts([300] * 20)]
    tokenizer = make_tokenizer(make_texts([300] * 20))
    crops = make_crops(Documents(texts, "words"), tokenizer, PROTOCOL)
    assert (crops.tokens_NT[:, 1:] != 0).all()


def test_a_rank_outside_the_world_is_refused():
    crops, _ = crops_of([300] * 20)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        crops.shard(2, 2)


def test_copies_of_a_document_are_no_further_documents():
    texts = make_texts([4000])
    tokenizer = make_tokenizer(texts)
    once, often = (make_crops(Documents(texts * n, "copies"), tokenizer, PROTOCOL) for n in (1, 40))
    assert torch.equal(once.tokens_NT, often.tokens_NT) and once.documents == often.documents
    assert "39 of 40 documents are copies of others and were left out" in often.notes


def test_crops_that_repeat_each_other_are_pointed_out():
    texts = [f"t{n} " + "one two three " * 200 for n in range(20)]
    crops = make_crops(Documents(texts, "rhyme"), make_tokenizer(texts), PROTOCOL)
    assert any("crops are copies of others" in note for note in crops.notes)


def test_a_tokenizer_that_does_not_know_the_text_is_pointed_out():
    known = make_texts([200] * 20)
    tokenizer = make_tokenizer(known)
    mixed = [" ".join(word if n % 5 else "новое" for n, word in enumerate(text.split())) for text in known]
    assert not any("unknown token" in note for note in make_crops(Documents(known, "a"), tokenizer, PROTOCOL).notes)
    notes = make_crops(Documents(mixed, "b"), tokenizer, PROTOCOL).notes
    assert any("20% of the text is the unknown token '<unk>'" in note for note in notes)
    foreign = [f"совсем другое {n} " * 100 for n in range(20)]
    with pytest.raises(ValueError, match="100% of the text in c is one token, '<unk>'"):
        make_crops(Documents(foreign, "c"), tokenizer, PROTOCOL)


@pytest.mark.parametrize("wrong", [None, "gpt2", 3])
def test_what_is_no_tokenizer_is_named(wrong):
    with pytest.raises(TypeError, match=f"found {type(wrong).__name__}; give the model's own"):
        make_crops(Documents(["a text"], "a"), wrong, PROTOCOL)
