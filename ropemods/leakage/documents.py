"""Documents to measure on: from a list, a file, or a Hugging Face dataset.

    read_documents(["one long text", "another"])        # or whatever else gives texts, a generator too
    read_documents("books.jsonl.xz")                    # also .txt, .jsonl, .parquet, and .gz
    read_documents("Salesforce/wikitext:wikitext-103-raw-v1:test")
    read_documents("my_folder::train")                  # a folder that `datasets` can load

A text file is split at `<|endoftext|>` where that occurs and is one document otherwise: a blank line ends a
paragraph in most texts, not a document. `separator="blank-line"` says that it does here.

Crops want long documents (`crops.py` says how long). `joined` makes long ones out of short ones.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ropemods.settings.extras import need
from ropemods.settings.files import not_utf8

END_OF_TEXT = "<|endoftext|>"
SUFFIXES = (".txt", ".jsonl", ".parquet")
PACKED: dict[str, Callable[..., IO[Any]]] = {".xz": lzma.open, ".gz": gzip.open}
UNPACKING = (lzma.LZMAError, gzip.BadGzipFile, EOFError, zlib.error)
STREAMED = 8192
"""Documents taken from a dataset's shuffled stream."""


@dataclass(frozen=True)
class Documents:
    """Texts, where they came from, and what a reader of the result should know about them."""

    texts: Sequence[str]
    source: str
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.texts:
            raise ValueError(f"{self.source}: no documents found (none with any text); check what it holds")


def read_documents(
    source: Documents | Iterable[str] | str | os.PathLike[str],
    *,
    separator: str = "auto",
    column: str = "text",
    seed: int = 0,
) -> Documents:
    """All documents of `source`; empty ones are left out.

    separator (.txt): "auto" (see the module's docstring), "blank-line", "none", or a literal string.
    column: the text's field in jsonl, parquet and datasets.
    seed: order of a dataset's stream, of which the first 8192 documents are taken.
    """
    if isinstance(source, Documents):
        return source
    if not isinstance(source, str | os.PathLike):
        texts = _listed(source)
        return Documents(_with_text(texts), f"{len(texts)} texts")
    path = Path(source)
    kind = _kind(path)
    if path.is_file() and kind in SUFFIXES:
        if kind == ".txt":
            return _text_file(path, separator)
        rows = _parquet(path, column) if kind == ".parquet" else _jsonl(path, column)
        return Documents(_with_text(rows), path.name)
    if path.is_file() or kind in SUFFIXES:
        raise ValueError(
            f"{path}: {'this kind of file is not read' if path.is_file() else 'no such file'}. "
            f"Give a {', '.join(SUFFIXES)} file (also .xz or .gz), or a dataset as name:config:split."
        )
    return _dataset(str(source), column, seed)


def _listed(source: Any) -> list[str]:
    """The texts of anything but a file or a dataset; what is not a text is named, with its place."""
    if isinstance(source, Mapping):
        columns = ", ".join(map(repr, itertools.islice(source, 5)))
        raise TypeError(
            f"documents are strings, and this is a {type(source).__name__} with the keys {columns}; give the list of "
            "texts in it, as documents['text']"
        )
    if isinstance(source, bytes | bytearray) or not isinstance(source, Iterable):
        raise TypeError(f"give documents as a list of strings, a file or a dataset; found {type(source).__name__}")
    texts = list(source)
    for n, text in enumerate(texts):
        if not isinstance(text, str):
            rows = "; give one field of every row, as [row['text'] for row in documents]"
            raise TypeError(
                f"give every document as a string; found {type(text).__name__} as number {n}"
                f"{rows if isinstance(text, Mapping) else ''}"
            )
    return texts


def without_copies(documents: Documents) -> Documents:
    """Each text once. A copy tells nothing new, and in another group it would pass for a second document."""
    kept: dict[bytes, str] = {}
    for text in documents.texts:
        kept.setdefault(hashlib.blake2b(text.strip().encode("utf-8", "surrogatepass"), digest_size=16).digest(), text)
    copies = len(documents.texts) - len(kept)
    if not copies:
        return documents
    note = f"{copies} of {len(documents.texts)} documents are copies of others and were left out"
    return Documents(list(kept.values()), documents.source, (*documents.notes, note))


def join_short(documents: Documents, *, characters: int, seed: int = 0) -> Documents:
    """Long documents made of short ones, in random order, a blank line between two.

    Each text goes into one joined document only, so the joined ones are as independent as the texts.
    """
    documents = without_copies(documents)
    order = np.random.default_rng((seed, 3)).permutation(len(documents.texts))
    long: list[str] = []
    parts: list[str] = []
    for n in order:
        parts.append(documents.texts[n])
        if sum(map(len, parts)) >= characters:
            long.append("\n\n".join(parts))
            parts = []
    if parts and not long:
        long.append("\n\n".join(parts))
    note = (
        f"{len(documents.texts)} documents were joined, in random order, to {len(long)} of at least "
        f"{characters} characters; crops run across their borders"
    )
    return Documents(long, documents.source, (*documents.notes, note))


def _with_text(texts: Iterable[str]) -> list[str]:
    return [text for text in texts if text.strip()]


def _kind(path: Path) -> str:
    """The suffix, without the packing: ".jsonl" for a.jsonl.xz."""
    return path.with_suffix("").suffix if path.suffix in PACKED else path.suffix


def _open(path: Path) -> IO[str]:
    unpack: Callable[..., IO[Any]] = PACKED.get(path.suffix, open)
    return unpack(path, "rt", encoding="utf-8-sig")


def _text_file(path: Path, separator: str) -> Documents:
    try:
        with _open(path) as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from None
    except UNPACKING as error:
        raise _damaged(path, error) from None
    if separator == "auto":
        separator = END_OF_TEXT if END_OF_TEXT in text else "none"
    if separator == "none":
        return Documents(_with_text([text]), path.name)
    if separator == "blank-line":
        return Documents(_with_text(re.split(r"\n\s*\n", text)), path.name)
    if separator not in text:
        raise ValueError(
            f'{path}: the separator {separator!r} does not occur. Give another, or "auto", "blank-line" or "none"'
        )
    return Documents(_with_text(text.split(separator)), path.name)


def _jsonl(path: Path, column: str) -> Iterator[str]:
    with _open(path) as file:
        for number, line in _lines(path, file):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{where}: not JSON ({error.msg}); a .jsonl file must be a JSON object a line"
                ) from None
            except RecursionError:
                raise ValueError(f"{where}: its lists are nested too deeply to be read") from None
            yield _field(row, column, where)


def _lines(path: Path, file: IO[str]) -> Iterator[tuple[int, str]]:
    try:
        yield from enumerate(file, 1)
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from None
    except UNPACKING as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: cannot be unpacked ({error}). Was it cut short, or is it not {path.suffix[1:]}?")


def _parquet(path: Path, column: str) -> Iterator[str]:
    need("pyarrow", f"{path}: reading parquet")
    from pyarrow import ArrowInvalid, parquet

    try:
        file = parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise ValueError(f"{path}: no parquet file, or a damaged one ({error})") from None
    names = file.schema_arrow.names
    if column not in names:
        raise ValueError(_no_column(column, names, str(path)))
    for batch in file.iter_batches(columns=[column]):
        for value in batch.column(0).to_pylist():
            yield _field({column: value}, column, str(path))


def _dataset(name: str, column: str, seed: int) -> Documents:
    rows = itertools.islice(dataset_stream(name).shuffle(seed=seed, buffer_size=STREAMED), STREAMED)
    texts = _with_text(_field(row, column, name) for row in rows)
    note = f"{name}: the first {len(texts)} documents of a stream shuffled with seed {seed}"
    return Documents(texts, name, (note,))


def dataset_stream(name: str) -> Any:
    """The stream of a dataset given as name, name:config or name:config:split; the split is "train" unless given."""
    need("datasets", f"{name!r} is no file here; reading it as a dataset")
    from datasets import load_dataset

    path, config, split, *rest = [*name.split(":"), "", ""][: max(3, name.count(":") + 1)]
    if rest or not path:
        raise ValueError(f"{name!r}: a dataset is given as name, name:config or name:config:split")
    try:
        return load_dataset(path, config or None, split=split or "train", streaming=True)
    except Exception as error:
        raise ValueError(
            f"{name!r} is no file here, and as a dataset (name:config:split) it did not load: {error}"
        ) from error


def _field(row: Any, column: str, where: str) -> str:
    if not isinstance(row, dict) or column not in row:
        found = list(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(_no_column(column, found, where))
    value = row[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{where}: {column!r} holds {type(value).__name__}, not text")
    return value


def _no_column(column: str, found: Any, where: str) -> str:
    return f"{where}: no column {column!r}; found {found}. Name the one with the text (column=...)"
