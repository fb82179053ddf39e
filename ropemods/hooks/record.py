"""The description of the modifications in the model's config, always true of the model at hand.

`config.ropemods = {"version": 2, "mods": […], "strength": {…}, "rope_parameters": the stock ones}`, and the config's
own rope parameters say what a stock transformers may make of a checkpoint:

- they are the stock ones while every strength is 0 (the checkpoint is the stock model),
- they are native where a native rope type gives exactly the model's frequencies and nothing else is active,
- otherwise their type is the sentinel, which stock transformers refuses to load.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import os
from collections.abc import Callable
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from ropemods.hooks import gguf
from ropemods.hooks.native import native_parameters, per_table
from ropemods.hooks.rotary import sentinel, tables, without_sentinel
from ropemods.mods import Mod, mod_from_json

VERSION = 2
READS = (1, 2)
"""Versions of the record: 1 is that of ropemods 0.1; what its parameters lack is in `Stage.since_version`."""


def rope_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a config whose rope parameters the frequency tables are made from."""
    return config.get_text_config(decoder=True)


@dataclasses.dataclass(frozen=True)
class Record:
    """What a checkpoint says of its modifications."""

    mods: list[Mod]
    strength: dict[str, float]
    rope_parameters: dict[str, Any]
    """The stock ones."""
    version: int = VERSION


def parse(entry: dict[str, Any]) -> Record:
    """The record in a config or in `ropemods.json`."""
    if entry.get("version") not in READS:
        raise ValueError(
            f"this checkpoint's ropemods record is version {entry.get('version')}, and this ropemods reads versions "
            f"{' and '.join(map(str, READS))}; install the version of ropemods that wrote it"
        )
    mods = [mod_from_json(mod) for mod in entry["mods"]]
    return Record(mods, dict(entry["strength"]), entry["rope_parameters"], entry["version"])


def load_config(
    path: str | os.PathLike[str], *, gguf_file: str | None = None, **hub_kwargs: Any
) -> tuple[PreTrainedConfig, Record | None]:
    """The stock config of a checkpoint, and the record of its modifications if it has one. A GGUF file has none.

    The stock rope parameters are put back before the config is made: some architectures accept only their own types.
    """
    if gguf_file is not None:
        return gguf.load_config(path, gguf_file, **hub_kwargs), None
    raw, _ = PreTrainedConfig.get_config_dict(path, **hub_kwargs)
    entry = raw.pop("ropemods", None)
    if entry is None or "auto_map" in raw:
        config = AutoConfig.from_pretrained(path, **hub_kwargs)
    else:
        inside = raw.get("text_config")
        nested = isinstance(inside, dict) and "rope_parameters" in inside
        (inside if nested else raw)["rope_parameters"] = copy.deepcopy(entry["rope_parameters"])
        config = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    if entry is None:
        return config, None
    record = parse(entry)
    rope_config(config).rope_parameters = copy.deepcopy(record.rope_parameters)
    return config, record


def _admit_sentinel(cls: type[PreTrainedConfig]) -> None:
    """Let configs of this class be saved with the sentinel: their own check looks at the stock parameters instead.

    Some architectures accept only certain rope types, and transformers checks a config when it saves it.
    """
    validators = getattr(cls, "__class_validators__", [])
    for index, check in enumerate(validators):
        if check.__name__ == "validate_rope" and not hasattr(check, "ropemods"):
            validators[index] = _seeing_stock(check)


def _seeing_stock(check: Callable[[PreTrainedConfig], None]) -> Callable[[PreTrainedConfig], None]:
    @functools.wraps(check)
    def validate_rope(config: PreTrainedConfig) -> None:
        live = getattr(config, "rope_parameters", None)
        if not isinstance(live, dict):
            return check(config)
        config.rope_parameters = without_sentinel(live)
        try:
            check(config)
        finally:
            config.rope_parameters = live

    validate_rope.ropemods = True  # type: ignore[attr-defined]
    return validate_rope


def write(model: PreTrainedModel, mods: list[Mod], strength: dict[str, float], stock: dict[str, Any]) -> None:
    """Make the config say what the model is now."""
    model.config.ropemods = {
        "version": VERSION,
        "mods": [mod.to_json() for mod in mods],
        "strength": dict(strength),
        "rope_parameters": copy.deepcopy(stock),
    }
    text = rope_config(model.config)
    _admit_sentinel(type(text))
    text.rope_parameters = _rope_parameters(model, mods, strength, stock)


def show_stock(model: PreTrainedModel, stock: dict[str, Any]) -> None:
    """Let rotary modules that read the rope parameters in their forward see the stock ones, not what is to be saved."""
    for table in tables(model):
        forward = inspect.unwrap(type(table.module).forward)
        if "rope_parameters" in forward.__code__.co_names and not hasattr(table.module, "ropemods_config"):
            table.module.ropemods_config = table.module.config
            table.module.config = copy.deepcopy(table.module.config)
            if table.module.ropemods_config is rope_config(model.config):
                table.module.config.rope_parameters = copy.deepcopy(stock)


def show_own(model: PreTrainedModel) -> None:
    for table in tables(model):
        if hasattr(table.module, "ropemods_config"):
            table.module.config = table.module.ropemods_config


def erase(model: PreTrainedModel, stock: dict[str, Any]) -> None:
    if hasattr(model.config, "ropemods"):
        del model.config.ropemods
    rope_config(model.config).rope_parameters = copy.deepcopy(stock)


def is_portable(model: PreTrainedModel) -> bool:
    """Whether stock transformers loads a checkpoint of the model, as it is now, and runs the same model."""
    parameters = rope_config(model.config).rope_parameters
    nested = [value for value in parameters.values() if isinstance(value, dict) and "rope_type" in value]
    return not any("ropemods" in part for part in [*nested, parameters])


def _rope_parameters(
    model: PreTrainedModel, mods: list[Mod], strength: dict[str, float], stock: dict[str, Any]
) -> dict[str, Any]:
    active = [mod for mod in mods if strength[mod.kind] > 0]
    if not active:
        return copy.deepcopy(stock)
    edits = [mod for mod in mods if mod.edits_frequencies]
    if edits and active == edits and edits[0].layers is None:
        native = native_parameters(model, edits[0], strength[edits[0].kind], stock)
        if native is not None:
            return native
    edit = edits[0] if edits and edits[0].layers is None else None
    described = edit.to_json() if edit is not None else None
    alpha = strength[edit.kind] if edit is not None else 0.0
    return per_table(model, stock, lambda part, _: sentinel(copy.deepcopy(part), described, alpha))
