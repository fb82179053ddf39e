"""What a description of a modification may hold: each option has the type and range that it names, or is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import typing

import pytest

import ropemods as rm
from ropemods.mods import MODS, mod_from_json
from tests import zoo


def floats() -> list[tuple[type[rm.Mod], str]]:
    """Every option that takes a number, of every modification."""
    found = []
    for mod in MODS:
        for name, hint in typing.get_type_hints(mod).items():
            if name in {field.name for field in dataclasses.fields(mod)} and float in (hint, *typing.get_args(hint)):
                found.append((mod, name))
    return found


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400], ids=str)
@pytest.mark.parametrize(("mod", "name"), floats(), ids=lambda v: getattr(v, "kind", v))
def test_no_number_of_a_modification_is_nan_or_infinite(mod, name, value) -> None:
    with pytest.raises(ValueError, match=f"{mod.kind}: {name} must be"):
        mod(**{name: value})


def test_there_are_numbers_to_hold_to_it() -> None:
    assert {name for _, name in floats()} >= {"keep", "init", "raised"}


def test_a_list_of_numbers_holds_no_nan_either() -> None:
    with pytest.raises(ValueError, match=r"coefficients must be a list of numbers, and finite, not \[1.0, nan\]"):
        rm.AdaptiveTemperature(coefficients=[1.0, math.nan])


@pytest.mark.parametrize("mod", MODS, ids=lambda mod: mod.kind)
@pytest.mark.parametrize("layers", ["01", {0, 1}, {0: 1}, [0.0], [True], ["0"], 3, [None]], ids=str)
def test_layers_that_are_no_list_of_indices_are_refused(mod, layers) -> None:
    with pytest.raises(ValueError, match="layers must be a list of layer indices"):
        mod(layers=layers)


@pytest.mark.parametrize(
    "layers", [[0, -1], (0, -1), range(0, -2, -1), iter([0, -1])], ids=["list", "tuple", "range", "generator"]
)
def test_layers_may_be_any_list_and_are_kept_as_they_were_given(layers) -> None:
    """A generator is read once: what it gives is what is applied, recorded and shown."""
    mod = rm.LearnedSink(init=0.3, layers=layers)
    assert mod.layers == (0, -1) and mod == rm.LearnedSink(init=0.3, layers=(0, -1))
    model, ids = zoo.build(), zoo.tokens()
    before = model(ids).logits
    assert (rm.apply(model, mod)(ids).logits - before).abs().max() > 1e-3


def test_layers_that_a_generator_does_not_give_are_an_error() -> None:
    with pytest.raises(ValueError, match="layers is empty"):
        rm.LearnedSink(layers=(i for i in ()))


@pytest.mark.parametrize(
    "mod",
    [
        rm.TruncatedRoPE(0, layers=range(1)),
        rm.AdaptiveTemperature(coefficients=[1, 2], trainable="head", layers=[-1]),
        rm.LearnedSink(init=1),
    ],
    ids=str,
)
def test_a_description_survives_json(mod) -> None:
    assert mod_from_json(json.loads(json.dumps(mod.to_json()))) == mod


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "unknown modification None; known are truncated_rope, "),
        ({"kind": "trunkated_rope"}, "unknown modification 'trunkated_rope'; known are truncated_rope, "),
        ({"kind": "truncated_rope", "keeps": 0.5}, "truncated_rope has no option keeps; it has layers, keep, which"),
        ({"kind": "truncated_rope", "keep": "0.5"}, "keep must be at least 0"),
        ({"kind": "learned_sink", "init": None}, "init must be a number or 'calibrated' or 'distilled', not None"),
        ({"kind": "learned_sink", "layers": "all"}, "layers must be a list of layer indices, not 'all'"),
        ({"kind": ["learned_sink"]}, "unknown modification"),
        ("learned_sink", "a modification is recorded as"),
        (None, "a modification is recorded as"),
    ],
    ids=str,
)
def test_what_json_describes_is_checked_as_what_python_describes(record, message) -> None:
    with pytest.raises(ValueError, match=message):
        mod_from_json(record)
