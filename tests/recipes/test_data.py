"""The data of a run: held-out documents that never train, the same bytes for everyone, and an error for too little."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ropemods.training.data import Data, DataOptions, TooLittleText, prepare
from ropemods.training.text import Source, digest, is_held_out
from tests.recipes import tiny


@pytest.fixture(scope="module")
def tokenizer(model: Path):
    return AutoTokenizer.from_pretrained(model)


def made(folder: Path, tokenizer, source: Path | str, *, rows: int | None = None, seed: int = 0, **options) -> Data:
    chosen = DataOptions(source=Source(name=str(source), seed=seed), length=64, held_out=0.2, **options)
    return prepare(chosen, tokenizer, folder, bos=0, rows=rows)


def words_of(rows, tokenizer) -> list[str]:
    return [tokenizer.decode(row[position > 0]) for row, position in zip(*rows, strict=True)]


@given(st.lists(st.text(min_size=1), min_size=1, max_size=30), st.floats(0.05, 0.95))
def test_holding_out_depends_on_the_text_alone(texts: list[str], fraction: float) -> None:
    chosen = [is_held_out(text, fraction) for text in texts]
    assert [is_held_out(text, fraction) for text in reversed(texts)] == chosen[::-1]
    # A larger share keeps what a smaller one had.
    assert all(is_held_out(text, min(1.0, fraction + 0.05)) for text, held in zip(texts, chosen, strict=True) if held)


def test_about_the_asked_share_is_held_out() -> None:
    held = sum(is_held_out(f"document {n}", 0.2) for n in range(4000))
    assert 700 < held < 900  # 800 expected, standard deviation 25


def test_no_held_out_document_trains(tmp_path: Path, tokenizer, text: Path) -> None:
    data = made(tmp_path, tokenizer, text, packing="none")
    apart = {document.strip() for document in data.held_out_documents}
    assert apart and len(apart) + data.facts["documents"] == len(tiny.documents())
    trained = words_of((data.rows.tokens_NT, data.rows.positions_NT), tokenizer)
    assert not [words for words in trained for document in apart if words.strip() in document and len(words) > 60]


def test_copies_of_a_document_fall_on_one_side(tmp_path: Path, tokenizer) -> None:
    documents = tiny.documents()
    path = tmp_path / "twice.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents + documents))
    data = made(tmp_path, tokenizer, path)
    held = {digest(text) for text in data.held_out_documents}
    assert len(data.held_out_documents) == 2 * len(held)


def test_files_of_every_kind_give_the_same_rows(tmp_path: Path, tokenizer, text: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    documents = tiny.documents()
    packed = tmp_path / "text.jsonl.xz"
    packed.write_bytes(lzma.compress(text.read_bytes()))
    table = tmp_path / "text.parquet"
    parquet.write_table(pyarrow.table({"text": documents}), table)
    plain = tmp_path / "text.txt"
    plain.write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    first = made(tmp_path, tokenizer, text).facts["digest"]
    assert made(tmp_path, tokenizer, packed).facts["digest"] == first
    assert made(tmp_path, tokenizer, table).facts["digest"] == first
    assert made(tmp_path, tokenizer, plain).facts["documents"] > 0


def test_a_folder_is_a_document_a_file(tmp_path: Path, tokenizer) -> None:
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    for n, document in enumerate(tiny.documents()):
        (folder / ("deep" if n % 2 else "") / f"{n}.py").write_text(document, encoding="utf-8")
    (folder / "weights.bin").write_bytes(b"\0" * 100)
    data = made(tmp_path, tokenizer, folder)
    assert data.facts["documents"] + data.facts["held_out_documents"] == len(tiny.documents())


def test_a_dataset_is_streamed_no_further_than_needed(tmp_path: Path, tokenizer) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    lines = [json.dumps({"text": text}) for text in tiny.documents()]
    for n in range(4):
        (folder / f"train-{n}.jsonl").write_text("\n".join(lines[n::4]) + "\n")
    data = made(tmp_path, tokenizer, f"{folder}::train", rows=8, held_out_characters=2000)
    assert len(data.rows) == 8
    assert sum(map(len, data.held_out_documents)) >= 2000
    assert data.facts["documents"] + len(data.held_out_documents) < len(lines)
    with pytest.raises(ValueError, match="no column 'words'; found"):
        list(Source(name=f"{folder}::train", column="words").documents())
    with pytest.raises(ValueError, match="name:config:split"):
        list(Source(name=str(tmp_path / "nothing")).documents())


def test_a_short_run_reads_from_many_documents(tmp_path: Path, tokenizer, text: Path) -> None:
    data = made(tmp_path, tokenizer, text, rows=16, packing="none")
    held_out = set(data.held_out_documents)
    trained = [document for document in tiny.documents() if document not in held_out]
    pieces = words_of((data.rows.tokens_NT, data.rows.positions_NT), tokenizer)
    found = [sum(piece.strip() in document for piece in pieces) for document in trained]
    assert len(data.rows) == 16 and sum(count > 0 for count in found) >= 4  # some 50 rows fit in one document


def test_rows_are_made_once_and_found_again(tmp_path: Path, tokenizer, text: Path) -> None:
    first = made(tmp_path, tokenizer, text, rows=20)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    again = made(tmp_path, tokenizer, text, rows=20)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")} == files
    assert (first.rows.tokens_NT == again.rows.tokens_NT).all()
    other = made(tmp_path, tokenizer, text, rows=20, seed=1)
    assert other.facts["digest"] != first.facts["digest"]


def test_an_interrupted_preparation_is_done_anew(tmp_path: Path, tokenizer, text: Path) -> None:
    first = np.array(made(tmp_path, tokenizer, text, rows=20).rows.tokens_NT)  # a copy: its file is torn below
    (place,) = (path.parent for path in tmp_path.rglob("facts.json"))
    (place / "facts.json").unlink()  # it is written last
    (place / "train_tokens.npy").write_bytes(b"half")
    assert (made(tmp_path, tokenizer, text, rows=20).rows.tokens_NT == first).all()


def test_a_source_of_its_own_is_held_out_and_keeps_its_documents_from_training(tmp_path: Path, tokenizer, text) -> None:
    documents = tiny.documents()
    apart = tmp_path / "apart.jsonl"
    apart.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents[:5]))
    data = made(tmp_path, tokenizer, text, held_out_source=Source(name=str(apart)))
    assert set(data.held_out_documents) == set(documents[:5])
    assert data.facts["documents"] == len(documents) - 5


def test_too_little_text_says_what_there_was_and_what_to_do(tmp_path: Path, tokenizer, text: Path) -> None:
    with pytest.raises(TooLittleText, match=r"reads 1,000,000 rows of 64 tokens, and .* gave [\d,]+ \(\d+ training"):
        made(tmp_path, tokenizer, text, rows=1_000_000)
    one = tmp_path / "one.txt"
    one.write_text(tiny.documents()[0])
    with pytest.raises(TooLittleText, match=r"held_out_data|num_train_epochs"):
        made(tmp_path, tokenizer, one)
    assert not list(tmp_path.rglob("facts.json"))


def test_stationary_text_takes_no_packing() -> None:
    source = Source(name="x.txt")
    assert DataOptions(source=source, text="stationary").packing == "none"
    assert DataOptions(source=source).packing == "restart"
    with pytest.raises(ValueError, match="leave packing out"):
        DataOptions(source=source, text="stationary", packing="restart")


def test_every_result_says_how_its_text_begins(tmp_path: Path, tokenizer, text: Path) -> None:
    natural, stationary = (made(tmp_path, tokenizer, text, text=kind).facts for kind in ("natural", "stationary"))
    assert "natural text, sequences beginning at document and paragraph starts" in natural["description"]
    assert "stationary text, sequences beginning anywhere" in stationary["description"]
    # Natural text loses what rows cut off; stationary text only the ends of documents.
    assert 0.2 < natural["share_used"] < 0.8 and 0.9 < stationary["share_used"] < 1
