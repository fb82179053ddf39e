"""What a folder says of its model: saved in any way, read in any way, edited by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import ropemods as rm
from tests.strangers.uses import NEVER, Subject, use

SAVED: dict[str, dict[str, Any]] = {
    "sharded": {"max_shard_size": "20KB"},
    "variant": {"variant": "fp16"},
}
READ: dict[str, dict[str, Any]] = {
    "plain": {},
    "double": {"dtype": torch.float64},
    "auto": {"dtype": "auto"},
    "device map": {"device_map": "cpu"},
    "info": {"output_loading_info": True},
    "eager": {"attn_implementation": "eager"},
    "local": {"local_files_only": True},
    "config": {"config": None},
    "subfolder": {"subfolder": "inner"},
}


@use(every=False, saved=tuple(SAVED), read=tuple(READ), strength=(0.0, 0.6))
@torch.no_grad()
def test_what_is_saved_is_what_is_read(subject: Subject, saved: str, read: str, strength: float) -> Iterator[Tensor]:
    model, ids = subject.model(strength), subject.ids()
    folder = subject.folder / "inner"
    model.save_pretrained(folder, **SAVED[saved])
    options = dict(READ[read])
    if saved == "variant":
        options["variant"] = "fp16"
    if read == "config":
        options["config"] = AutoConfig.from_pretrained(folder)
    loaded = subject.load(subject.folder if read == "subfolder" else folder, **options)
    loaded = loaded[0] if isinstance(loaded, tuple) else loaded
    yield loaded(ids).logits
    yield model(ids).logits


@use(every=False, strength=(0.0, 0.4, 1.0), then=("as it is", "edited to 1", "edited to 0"))
@torch.no_grad()
def test_stock_transformers_runs_the_same_model_or_none(subject: Subject, strength: float, then: str) -> Iterator[Any]:
    """It does not read the record, so what it runs is what was saved, however the record was edited since."""
    model, ids = subject.model(strength), subject.ids()
    folder = subject.saved(model)
    if subject.mod is not None and then != "as it is":
        edit(folder, ("strength", subject.mod.kind), 1.0 if then == "edited to 1" else 0.0)
    try:
        stock = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=subject.backend)
    except Exception as refusal:  # transformers' own, each architecture's in its own words
        if "ropemods" not in str(refusal):
            raise
        raise_as_ours(refusal)
    yield stock(ids).logits
    yield model(ids).logits


def raise_as_ours(refusal: Exception) -> None:
    """A stock load that fails over the rope type `ropemods` is the refusal that a checkpoint is written for."""
    from tests.strangers.uses import Refused

    raise Refused(str(refusal))


def edit(folder: Any, keys: tuple[str, ...], value: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    place = config["ropemods"]
    for key in keys[:-1]:
        place = place[key]
    if value is NEVER:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    path.write_text(json.dumps(config))


STRENGTHS: tuple[Any, ...] = (0, 1, 0.5, 2, -1, True, float("nan"), "1.0", None, [], {})


@use(every=False, value=STRENGTHS)
@torch.no_grad()
def test_a_strength_that_was_edited(subject: Subject, value: Any) -> Iterator[Any]:
    """A number from 0 to 1 is taken, and what is none is told."""
    model, ids = subject.model(), subject.ids()
    folder = subject.saved(model)
    if subject.mod is None:
        yield model(ids).logits
        yield model(ids).logits
        return
    edit(folder, ("strength", subject.mod.kind), value)
    yield rm.from_pretrained(folder, attn_implementation=subject.backend)(ids).logits
    if type(value) in (int, float) and 0 <= value <= 1:
        rm.set_strength(model, float(value))
        yield model(ids).logits
    else:
        yield NEVER


@use(
    every=False,
    what=(
        "kind misspelt",
        "kind gone",
        "option unknown",
        "option wrong",
        "no mods",
        "mods gone",
        "strength misspelt",
        "strength gone",
        "version ahead",
        "empty",
        "a list",
    ),
)
@torch.no_grad()
def test_a_record_that_was_edited_is_refused(subject: Subject, what: str) -> Iterator[Any]:
    model, ids = subject.model(), subject.ids()
    folder = subject.saved(model)
    if subject.mod is None:
        yield model(ids).logits
        yield model(ids).logits
        return
    path = folder / "config.json"
    config = json.loads(path.read_text())
    record, kind = config["ropemods"], subject.mod.kind
    if what.startswith(("kind", "option")):
        mod = record["mods"][0]
        if what == "kind gone":
            del mod["kind"]
        else:
            key, value = {
                "kind misspelt": ("kind", kind[:-1]),
                "option unknown": ("colour", 1),
                "option wrong": ("layers", [99]),
            }[what]
            mod[key] = value
    elif what == "no mods":
        record["mods"] = []
    elif what == "strength misspelt":
        record["strength"] = {kind[:-1]: 1.0}
    elif what == "version ahead":
        record["version"] = 99
    elif what.endswith("gone"):
        record.pop(what.split()[0])
    else:
        config["ropemods"] = {} if what == "empty" else [record]
    path.write_text(json.dumps(config))
    yield rm.from_pretrained(folder, attn_implementation=subject.backend)(ids).logits
    yield NEVER
