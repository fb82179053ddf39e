"""Training text: documents from a file or a dataset, and which of them never train.

Which documents are held out is decided by a hash of each document's own text: the choice does not depend on the order
of reading, on the number of ranks or on the run's seed, and two copies of one document always fall on the same side.

A source is a .txt, .jsonl or .parquet file (also .xz or .gz), a folder of text files, each of which is a document, or a
Hugging Face dataset as `name:config:split`, which is streamed, so that no more of it is downloaded than the run reads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ropemods.leakage.documents import SUFFIXES, dataset_stream, read_documents

TEXT_FILES = (".txt", ".md", ".rst", ".py")
"""What counts as a text file in a folder."""
SHUFFLE_BUFFER = 8192
"""Documents of a stream among which the next one is drawn."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where text comes from."""

    name: str
    column: str = "text"
    """The field that holds the text, in jsonl, parquet and datasets."""
    separator: str = "auto"
    """What parts the documents of a .txt file: "auto", "blank-line", "none", or a literal string."""
    seed: int = 0
    """Order of the documents."""

    def is_local(self) -> bool:
        """Whether all of it can be read at once."""
        path = Path(self.name)
        return path.exists() or any(suffix in path.suffixes for suffix in SUFFIXES)

    def stamp(self) -> list[tuple[int, int]]:
        """Sizes and times of the files behind it, by which a change is noticed."""
        path = Path(self.name)
        files = _text_files(path) if path.is_dir() else [path] if path.is_file() else []
        return [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]

    def documents(self) -> Iterator[str]:
        """Every document with any text, in an order that follows from the seed."""
        if not self.is_local():
            yield from _stream(self)
            return
        texts = _folder(Path(self.name)) if Path(self.name).is_dir() else self._file()
        for n in np.random.default_rng((self.seed, 10)).permutation(len(texts)):
            yield texts[n]

    def _file(self) -> Sequence[str]:
        return read_documents(self.name, separator=self.separator, column=self.column).texts


def _text_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in TEXT_FILES and path.is_file())


def _folder(folder: Path) -> list[str]:
    files = _text_files(folder)
    texts = [text for path in files if (text := path.read_text(encoding="utf-8", errors="replace")).strip()]
    if not texts:
        raise ValueError(f"{folder}: no text files in this folder; looked for {', '.join(TEXT_FILES)}")
    return texts


def _stream(source: Source) -> Iterator[str]:
    for row in dataset_stream(source.name).shuffle(seed=source.seed, buffer_size=SHUFFLE_BUFFER):
        if source.column not in row:
            raise ValueError(
                f"{source.name}: no column {source.column!r}; found {sorted(row)}. Name the one with the text "
                "(column: ...)"
            )
        text = row[source.column]
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{source.name}: {source.column!r} holds {type(text).__name__}, not text")
        if text and text.strip():
            yield text


def digest(text: str) -> int:
    """64 bits that stand for a document, the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.strip().encode()).digest()[:8], "big")


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document is one of the `fraction` that never trains."""
    return digest(text) < fraction * 2**64
