"""The standing stranger: uses of a modified model that nobody listed, found by crossing what a user may choose.

A use is a relation that a model owes to itself, such as "with a cache it says what it says without one", written once
for any model and spread over everything that a user may vary:

    @use(cache=("dynamic", "static"), padding=("none", "left"))
    def test_decoding(subject, cache, padding):
        model, ids = subject.model(), subject.ids()
        yield step_by_step(model, ids, cache, padding)   # what the use gives
        yield whole(model, ids, padding)                 # what it should give

The first `yield` is the use itself, the second what it must agree with, or `NEVER` where an answer would be wrong. Each
relation is asked of the stock model first: what stock does not hold to (it reads across sequences that are packed
without a mask, say) is `moot` and asked of nobody. A modified model then either

    held       gives what it should, or
    refused    raises an error of the library's own that names a remedy,

and anything else fails: another answer, an answer where plain use is refused, an error that helps nobody.

Modifications are taken from `MODS`, their variants from the types of their options, so that a new modification or a new
choice is met by strangers without a line here. Every combination of axes meets every modification on every architecture
of `ARCHITECTURES`; which variant and which attention backend it meets goes round.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
import re
import traceback
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import ropemods as rm
from ropemods.mods import MODS, Mod
from tests import zoo
from tests.contract import perturb

ARCHITECTURES = ("llama", "gemma3_text", "gpt_neox")
"""One rope table and groups of heads; one table a layer type and sliding windows; partial rotary in parallel blocks."""

NEVER = object()
"""What a use should give where any answer would be wrong."""

REMEDY = re.compile(
    r"\b(use|pass|give|call|set|apply|load|leave|remove|choose|name|write|save|instead|first|run|put|read|add|take|turn|"
    r"make|merge|mend|repair|export|install|train|start|begin|cut|ask|keep|replace|move|drop|reload|override|"
    r"convert|check|possible|it has|must be|one of|takes|known|did you mean|at least|at most|no such|from .+ to .+)\b",
    re.IGNORECASE,
)
"""Words with which an error says what to do."""

TOLERANCE = 5e-5
"""Of the largest value, in fp32: paths sum in other orders."""


def variants(mod: type[Mod]) -> list[Mod]:
    """The modification as it is by default, and with each other choice that the types of its options name."""
    if (examples := getattr(mod, "examples", None)) is not None:
        return list(examples())
    found = [mod()]
    hints = typing.get_type_hints(mod)
    for field in dataclasses.fields(mod):
        for value in _choices(hints[field.name]):
            if value != field.default:
                found.append(mod(**{field.name: value}))
    with contextlib.suppress(ValueError):  # some cannot be put on some layers
        found.append(mod(layers=(-1,)))
    return found


def _choices(hint: Any) -> list[Any]:
    if hint is bool:
        return [True, False]
    parts = (hint, *typing.get_args(hint))
    return [choice for part in parts if typing.get_origin(part) is Literal for choice in typing.get_args(part)]


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to use: stock, or with one modification."""

    architecture: str
    backend: str
    mod: Mod | None
    folder: Path

    def model(self, strength: float = 1.0) -> PreTrainedModel:
        """A new one, its own parameters moved off their initial values so that losing them shows."""
        return self.modified(self.stock(), strength)

    def stock(self) -> PreTrainedModel:
        return zoo.build(self.architecture, self.backend)

    def load_stock(self) -> Any:
        """The stock model from a folder, as adapters want their base."""
        from transformers import AutoModelForCausalLM

        folder = self.folder / "base"
        if not folder.is_dir():
            self.stock().save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=self.backend).eval()

    def modified(self, model: Any, strength: float = 1.0) -> Any:
        if self.mod is not None:
            rm.apply(model, self.mod, strength=strength)
            perturb(model)
        return model

    def ids(self, rows: int = 2, length: int = 10, *, seed: int = 0) -> Tensor:
        return zoo.tokens(rows, length, seed=seed)

    def saved(self, model: Any, name: str = "saved") -> Path:
        model.save_pretrained(self.folder / name)
        return self.folder / name

    def load(self, folder: Path, **options: Any) -> Any:
        """As a user of this model would."""
        from transformers import AutoModelForCausalLM

        options = {"attn_implementation": self.backend} | options
        return (AutoModelForCausalLM if self.mod is None else rm).from_pretrained(folder, **options)


class Refused(ValueError):
    """For a relation to raise where what refuses is not the library itself, and rightly."""


Relation = Callable[..., Iterator[Any]]


@dataclasses.dataclass(frozen=True)
class Case:
    """One use, one modification, one architecture."""

    architecture: str
    backend: str
    mod: Mod
    axes: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        chosen = "-".join(str(value) for _, value in self.axes)
        return f"{chosen}-{self.mod}-{self.architecture}-{self.backend}".replace(" ", "")

    def judge(self, relation: Relation, folder: Path) -> str:
        """`held`, `refused` or `moot`; a failure otherwise."""
        asked = stock_gives(relation, self.architecture, self.backend, Axes(self.axes))
        if asked is not None:
            return f"moot: {asked}"
        torch.manual_seed(0)
        steps = relation(Subject(self.architecture, self.backend, self.mod, folder), **dict(self.axes))
        try:
            given = next(steps)
        except Exception as error:
            return f"refused: {_own(error)}"
        try:
            wanted = next(steps)
        except Exception as error:
            pytest.fail(f"silent: an answer is given where plain use is refused ({error})", pytrace=False)
        steps.close()
        if wanted is NEVER:
            pytest.fail("silent: an answer is given where there is no right one", pytrace=False)
        off = distance(given, wanted)
        if not off <= TOLERANCE:
            pytest.fail(f"silent: off by {off:.2g} of the largest value", pytrace=False)
        return "held"


class Axes(tuple[tuple[str, Any], ...]):
    """What a case chose; equal where it reads the same, since a list or a mapping may be among it."""

    def __hash__(self) -> int:
        return hash(repr(self))


@functools.cache
def stock_gives(relation: Relation, architecture: str, backend: str, axes: Axes) -> str | None:
    """Why the stock model owes nothing here; None where the relation holds of it."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        steps = relation(Subject(architecture, backend, None, Path(folder)), **dict(axes))
        try:
            given = next(steps)
            wanted = next(steps)
        except Exception as error:
            return f"stock raises {type(error).__name__}"
        finally:
            steps.close()
    if wanted is NEVER:
        return None
    off = distance(given, wanted)
    return None if off <= TOLERANCE else f"stock is off by {off:.2g}"


def distance(given: Tensor, wanted: Tensor) -> float:
    """The largest difference, of the largest value; infinite where shapes differ or something is NaN."""
    if given.shape != wanted.shape:
        return float("inf")
    off = (given.double() - wanted.double()).abs().max().item()
    return float("inf") if off != off else off / max(1.0, wanted.double().abs().max().item())


def _own(error: Exception) -> str:
    """The message of an error that the library raised on purpose and that helps; a failure for any other."""
    message = " ".join(str(error).split())
    if isinstance(error, Refused):
        return message
    frames = traceback.extract_tb(error.__traceback__)
    library = Path(rm.__file__).parent
    ours = frames and library in Path(frames[-1].filename).parents
    if not ours or not isinstance(error, ValueError | TypeError | NotImplementedError | OSError):
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "nowhere"
        pytest.fail(f"crash: {type(error).__name__} at {where}: {message:.200}", pytrace=False)
    if not REMEDY.search(message):
        pytest.fail(f"no remedy: {type(error).__name__}: {message:.300}", pytrace=False)
    return message


def use(*, every: bool = True, **axes: Any) -> Callable[[Relation], Callable[..., None]]:
    """Spread a relation over the product of its axes, the modifications and the architectures.

    Where not `every`, each combination of axes meets one architecture for each modification, going round: for what
    takes long.
    """

    def spread(relation: Relation) -> Callable[..., None]:
        cases = _cases(axes, every)

        @pytest.mark.parametrize("case", cases, ids=str)
        def test(case: Case, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
            said = case.judge(relation, tmp_path)
            record_property("stranger", said)

        test.__doc__ = inspect.getdoc(relation)
        return test

    return spread


def _cases(axes: dict[str, tuple[Any, ...]], every: bool) -> list[Case]:
    cases = []
    for n, values in enumerate(itertools.product(*axes.values())):
        for k, kind in enumerate(MODS):
            chosen = variants(kind)
            for a, architecture in enumerate(ARCHITECTURES):
                if not every and (n + k + a) % len(ARCHITECTURES):
                    continue
                case = Case(
                    architecture=architecture,
                    backend=("sdpa", "eager")[(n + k + a) % 2],
                    mod=chosen[(n + a) % len(chosen)],
                    axes=tuple(zip(axes, values, strict=True)),
                )
                cases.append(case)
    return cases
