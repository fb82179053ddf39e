"""A protocol: everything that decides which number a measurement gives.

Two reports may be compared when they followed one protocol, so a protocol is small, frozen and
hashed. The hash covers every field that moves the numbers; `batch_size` does not move them and
stays out.

    Protocol(sequences=1024, length=512).hash()     # '3c1f…', 12 hex digits

It also answers the questions that follow from its fields alone: the bins of queries that a report
shows, the grid of query rows on which the mask term is measured, and what each group of documents
is for (`folds`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ropemods.settings.annotations import Unfit, fitted
from ropemods.settings.options import in_words

VERSION = 1
"""Raised whenever the same fields would give other numbers, so that old hashes no longer match."""

DTYPES = ("float32", "float64", "bfloat16", "float16", "model")
TEXTS = ("stationary", "unigram")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How leakage is measured. Every field has a default that gives a usable number."""

    sequences: int = 384
    """Crops that are read. The estimate's noise falls with their number."""
    length: int = 512
    """Tokens in a crop, BOS included."""
    groups: int = None  # type: ignore[assignment]
    """Groups of documents. Products of disjoint groups make the squares unbiased. Left out: as many as the sequences
    can be dealt to evenly, 32 at most."""
    window: int = 8
    """w: offsets 0 … w−1 are compared, for queries i ≥ w."""
    grid_rows: int = None  # type: ignore[assignment]
    """Query rows that are read whole, for the mask term. Left out: 64, or all where there are fewer."""
    early: tuple[int, int] = None  # type: ignore[assignment]
    """The early queries, first ≤ i < last. Left out: 8 to 64, or what of it a short length has before its last half."""
    seed: int = 0
    """Decides the crops and the bootstrap's draws."""
    dtype: str = "float32"
    """The model's dtype while it is measured; "model" leaves it as it is."""
    text: str = "stationary"
    """"stationary": BOS, then a crop from anywhere. "unigram": BOS, then i.i.d. tokens."""
    batch_size: int = 8
    """Crops in one forward pass. Changes memory and speed, not the numbers."""
    replicates: int = 400
    """Draws of the bootstrap over documents."""
    confidence: float = 0.95
    """Coverage that the intervals aim at."""
    mask_term: bool = True
    """Whether the mask term is measured (it costs whole rows of logits on the grid)."""

    def __post_init__(self) -> None:
        if isinstance(self.early, list):  # as JSON and YAML give it
            object.__setattr__(self, "early", tuple(self.early))
        self._check_numbers("sequences", "length", "window")
        for name, fit in (("groups", self._fit_groups), ("grid_rows", self._fit_grid), ("early", self._fit_early)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, fit())
        self._check_numbers(*(field.name for field in dataclasses.fields(self)))
        if self.sequences % self.groups:
            below = self.sequences // self.groups * self.groups
            counts = " or ".join(str(n) for n in (below, below + self.groups) if n)
            near = _most_groups(self.sequences)
            raise ValueError(
                f"sequences={self.sequences} cannot be dealt evenly to groups={self.groups}: use {counts} sequences"
                + (f", or groups={near}" if near else "")
            )
        _expect(
            len(self.early) == 2
            and all(isinstance(query, int) for query in self.early)
            and self.window <= self.early[0] < self.early[1],
            f"early={self.early}: two queries, the first at least window={self.window}, rising",
        )
        # The late half is what the early queries are compared with, so the two must not meet.
        _expect(
            self.early[1] <= self.length // 2,
            f"early={self.early} reaches into the last half of length={self.length}: "
            f"use a length of at least {2 * self.early[1]} or fewer early queries",
        )
        _expect(
            len(self._dyadic(1)) <= self.grid_rows <= self.length - self.window,
            f"grid_rows={self.grid_rows}: between {len(self._dyadic(1))} (one per octave) and "
            f"{self.length - self.window} (every query from {self.window}) at this length",
        )
        _expect(self.dtype in DTYPES, f"dtype={self.dtype!r}: one of {', '.join(DTYPES)}")
        _expect(self.text in TEXTS, f"text={self.text!r}: one of {', '.join(TEXTS)}")
        _expect(
            0.5 <= self.confidence < 1,
            f"confidence={self.confidence}: from 0.5 to below 1",
        )

    def _check_numbers(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            _expect_type(name, value, typing.get_type_hints(Protocol)[name])
            if name in _LEAST:
                _expect(value >= _LEAST[name], f"{name}={value}: at least {_LEAST[name]}")
                _expect(name == "seed" or value <= MOST, f"{name}={value}: at most {MOST}")

    def _fit_groups(self) -> int:
        found = _most_groups(self.sequences)
        if found is None:
            least = _LEAST["groups"]
            below = next((n for n in range(self.sequences, least - 1, -1) if _most_groups(n)), None)
            above = next(n for n in itertools.count(max(self.sequences, least)) if _most_groups(n))
            raise ValueError(
                f"protocol: sequences={self.sequences} cannot be dealt evenly to {least} to {MOST_GROUPS} groups of "
                f"documents, which intervals are formed over: use {' or '.join(str(n) for n in (below, above) if n)}"
            )
        return found

    def _fit_grid(self) -> int:
        return min(64, self.length - self.window)

    def _fit_early(self) -> tuple[int, int]:
        first = max(self.window, min(8, self.length // 4))
        stop = min(max(64, 2 * first), self.length // 2)
        _expect(
            first < stop,
            f"length={self.length} leaves no early queries between window={self.window} and the last half: use a "
            f"length of at least {2 * self.window + 2}, or a smaller window",
        )
        return first, stop

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `Protocol.from_dict` reads them back."""
        return {**dataclasses.asdict(self), "early": list(self.early)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Protocol:
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"a protocol has no {', '.join(unknown)}; it has {', '.join(known)}")
        return cls(**values)

    def hash(self) -> str:
        """12 hex digits that agree exactly when two protocols measure the same thing."""
        fields = {k: v for k, v in self.to_dict().items() if k != "batch_size"}
        canonical = json.dumps({"version": VERSION, **fields}, sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    def differences(self, other: Protocol) -> dict[str, tuple[Any, Any]]:
        """The fields that make the hashes differ, as {name: (mine, theirs)}."""
        mine, theirs = self.to_dict(), other.to_dict()
        return {k: (mine[k], theirs[k]) for k in mine if k != "batch_size" and mine[k] != theirs[k]}

    @property
    def per_group(self) -> int:
        """Sequences in each group."""
        return self.sequences // self.groups

    @property
    def late(self) -> int:
        """The first query of the last half, whose mean stands for "far from the start"."""
        return self.length // 2

    def bins(self) -> tuple[tuple[int, int], ...]:
        """[w, 2w), [2w, 4w), … up to the length; for w = 8: [8, 16), [16, 32), …"""
        edges, start = [], self.window
        while start < self.length:
            edges.append((start, min(2 * start, self.length)))
            start *= 2
        return tuple(edges)

    def folds(self) -> tuple[range, ...]:
        """What the groups are for, in the order in which they must be read.

        The mask term learns the mean logits from three eighths of the groups, the mean attention
        from the next eighth, either twice over (even and odd groups), and measures on the rest
        (`mask.py` says why). Everything else uses all groups alike. Without the mask term there is
        one fold.
        """
        if not self.mask_term:
            return (range(self.groups),)
        first = 2 * (3 * self.groups // 16)
        second = first + 2 * max(1, self.groups // 16)
        return range(first), range(first, second), range(second, self.groups)

    def grid(self) -> tuple[int, ...]:
        """Query rows read whole: up to four per octave, where log Z bends, and the rest evenly.

        Always with the first query w and the last, so that every query lies between two of them.
        """
        for per_octave in (4, 2, 1):
            dyadic = self._dyadic(per_octave)
            if len(dyadic) <= 0.75 * self.grid_rows:
                break
        others = sorted(set(range(self.window, self.length)) - dyadic)
        more = self.grid_rows - len(dyadic)
        evenly = {others[(2 * n + 1) * len(others) // (2 * more)] for n in range(more)}
        return tuple(sorted(dyadic | evenly))

    def _dyadic(self, per_octave: int) -> set[int]:
        octaves = math.log2((self.length - 1) / self.window)
        steps = range(math.ceil(octaves * per_octave))
        rows = {round(self.window * 2 ** (n / per_octave)) for n in steps}
        return {row for row in rows if row < self.length} | {self.length - 1}


MOST = 10**7
"""Of anything that is counted; no machine holds more."""
MOST_GROUPS = 32
"""Groups where they are left out; more add nothing to the intervals that is worth their memory."""


def _most_groups(sequences: int) -> int | None:
    """The largest number of groups that fits, or None."""
    return next((n for n in range(MOST_GROUPS, _LEAST["groups"] - 1, -1) if sequences % n == 0), None)


_LEAST = {
    "sequences": 1,
    "length": 16,
    "groups": 8,
    "window": 2,
    "grid_rows": 4,
    "seed": 0,
    "batch_size": 1,
    "replicates": 100,
}


def _expect(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(f"protocol: {message}")


def _expect_type(name: str, value: Any, hint: Any) -> None:
    """A field takes its annotation's type; an int is also a float, a bool is never an int."""
    try:
        if name == "early" and isinstance(value, tuple):  # that there must be two is said in other words
            hint = tuple[int, ...]
        fitted(hint, value)
    except Unfit:
        raise TypeError(f"protocol: {name} takes {in_words(hint)}, found {value!r}") from None
