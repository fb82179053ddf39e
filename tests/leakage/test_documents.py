"""Documents from lists, files and datasets."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import pytest

from ropemods.leakage.documents import Documents, join_short, read_documents

TEXTS = ["First text.\nIts second line.", "Zweiter Text: äöü", "third\n\nafter a blank line"]


def rows(texts: list[str], column: str = "text") -> str:
    return "".join(json.dumps({"id": n, column: text}) + "\n" for n, text in enumerate(texts))


def test_a_list_is_taken_as_it_is_without_its_empty_texts():
    documents = read_documents([*TEXTS, "  \n"])
    assert documents.texts == TEXTS and documents.source == "4 texts"


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.xz", ".jsonl.gz"])
def test_jsonl_plain_and_packed(tmp_path: Path, suffix):
    pack = {".xz": lzma.compress, ".gz": gzip.compress}.get(Path(suffix).suffix, lambda data: data)
    path = tmp_path / f"texts{suffix}"
    path.write_bytes(pack((rows(TEXTS) + "\n").encode()))
    assert list(read_documents(path).texts) == TEXTS
    assert read_documents(str(path)).source == path.name


def test_parquet(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "texts.parquet"
    parquet.write_table(pyarrow.table({"body": [*TEXTS, None], "id": [1, 2, 3, 4]}), path)
    assert list(read_documents(path, column="body").texts) == TEXTS
    with pytest.raises(ValueError, match=r"no column 'text'; found \['body', 'id'\]"):
        read_documents(path)


def test_a_dataset_by_name_config_and_split(tmp_path: Path):
    """A folder is a dataset to `datasets`, so its real streaming loader runs without a network."""
    pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_text(rows(TEXTS))
    (tmp_path / "test.jsonl").write_text(rows(["held out"]))
    for name in (str(tmp_path), f"{tmp_path}:default", f"{tmp_path}:default:train"):
        assert sorted(read_documents(name).texts) == sorted(TEXTS)
    held_out = read_documents(f"{tmp_path}::test")
    assert list(held_out.texts) == ["held out"]
    assert "shuffled with seed 0" in held_out.notes[0]
    with pytest.raises(ValueError, match="no column 'body'"):
        read_documents(str(tmp_path), column="body")


def test_a_text_file_is_split_at_end_of_text_and_else_is_one_document(tmp_path: Path):
    path = tmp_path / "texts.txt"
    path.write_text("<|endoftext|>\n".join(TEXTS), encoding="utf-8")
    assert [text.strip() for text in read_documents(path).texts] == TEXTS
    path.write_text("\n\n".join(TEXTS), encoding="utf-8")
    assert len(read_documents(path).texts) == 1
    assert read_documents(path, separator="blank-line").texts[2] == "third"
    assert len(read_documents(path, separator="none").texts) == 1
    assert len(read_documents(path, separator="blank").texts) == 2
    with pytest.raises(ValueError, match="'###' does not occur"):
        read_documents(path, separator="###")


@pytest.mark.parametrize(
    ("content", "name", "says"),
    [
        (b'{"text": "a"}\nnot json\n', "a.jsonl", "line 2: not JSON"),
        (b'{"body": "a"}\n', "a.jsonl", r"line 1: no column 'text'; found \['body'\]"),
        (b'{"text": 3}\n', "a.jsonl", "holds int, not text"),
        (b"[1]\n", "a.jsonl", "no column 'text'; found list"),
        (b"\xff\xfe\x00", "a.txt", "not UTF-8"),
        (b"\n \n", "a.txt", "no documents"),
        (b'{"text": "\xe9"}\n', "a.jsonl", "a.jsonl: not UTF-8 text .byte 0xe9 at 10"),
        (b"\x1f\x8b\x08 cut short", "a.jsonl.gz", "a.jsonl.gz: cannot be unpacked"),
        (b"no xz", "a.txt.xz", "a.txt.xz: cannot be unpacked"),
        (b"no parquet", "a.parquet", "a.parquet: no parquet file"),
        (b"[" * 200_000, "a.jsonl", "line 1: its lists are nested too deeply"),
        (b"x", "a.pdf", "this kind of file is not read"),
        (None, "missing.txt", "no such file"),
        (None, "a:b:c:d", "name:config:split"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, content, name, says):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=says):
        read_documents(path if content is not None or "." in name else name)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (["a", 3], "found int as number 1"),
        (["a", None], "found NoneType as number 1"),
        ([{"text": "a"}], r"found dict as number 0; give one field of every row, as \[row\['text'\] for row"),
        ({"text": ["a", "b"]}, r"a dict with the keys 'text'; give the list of texts in it, as documents\['text'\]"),
        (b"a text", "found bytes"),
        (3, "found int"),
        (None, "found NoneType"),
    ],
)
def test_anything_but_strings_is_refused(source, says):
    with pytest.raises(TypeError, match=says):
        read_documents(source)


def test_a_generator_of_texts_is_read_once():
    documents = read_documents(text for text in TEXTS)
    assert documents.texts == TEXTS and documents.source == "3 texts"


def test_a_byte_order_mark_is_no_text(tmp_path: Path):
    for name, content in (("a.txt", "one"), ("a.jsonl", '{"text": "one"}')):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert list(read_documents(tmp_path / name).texts) == ["one"]


def test_copies_are_joined_once():
    once = join_short(Documents(TEXTS, "a"), characters=10)
    often = join_short(Documents(TEXTS * 3, "a"), characters=10)
    assert once.texts == often.texts and "6 of 9 documents are copies" in often.notes[0]


def test_joined_documents_hold_every_text_at_most_once():
    texts = [f"text {n} " * 5 for n in range(50)]
    long = join_short(Documents(texts, "short", ("a note",)), characters=300, seed=1)
    assert all(len(text) >= 300 for text in long.texts)
    found = [part for text in long.texts for part in text.split("\n\n")]
    assert len(found) == len(set(found)) and set(found) <= set(texts)
    assert len(found) > 40
    assert found != texts[: len(found)]  # random order
    assert long.notes[0] == "a note" and "50 documents were joined" in long.notes[1]
