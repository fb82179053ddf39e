"""Documents from lists, files and datasets."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import pytest

from ropemods.leakage.documents import Documents, joined, read_documents

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


def test_anything_but_strings_is_refused():
    with pytest.raises(TypeError, match="found int"):
        read_documents(["a", 3])  # type: ignore[list-item]


def test_joined_documents_hold_every_text_at_most_once():
    texts = [f"text {n} " * 5 for n in range(50)]
    long = joined(Documents(texts, "short", ("a note",)), characters=300, seed=1)
    assert all(len(text) >= 300 for text in long.texts)
    found = [part for text in long.texts for part in text.split("\n\n")]
    assert len(found) == len(set(found)) and set(found) <= set(texts)
    assert len(found) > 40
    assert found != texts[: len(found)]  # random order
    assert long.notes[0] == "a note" and "50 documents were joined" in long.notes[1]
