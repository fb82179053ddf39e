"""The description of the modifications in the model's config, always true of the model at hand.

    config.ropemods = {"version": 2, "mods": […], "strength": {…}, "bos_token_id": …, "rope_parameters": the stock ones}

It is validated when it is read as the modifications are when they are made. `bos_token_id` is the token they look for,
null where they look for none. The config's own rope parameters say what a stock transformers may make of a checkpoint:

- they are the stock ones while every strength is 0 (the checkpoint is the stock model),
- they are native where a native rope type gives exactly the model's frequencies and nothing else is active,
- otherwise their type is the sentinel, which stock transformers refuses to load.

A checkpoint whose record and rope parameters say different things (a config.json edited by hand) is refused here. Stock
transformers does not read the record: what it makes of such a file follows the rope parameters alone.
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

from ropemods.model import gguf
from ropemods.model.anatomy import anatomy_of
from ropemods.model.native_rope import gives, native_parameters, per_table
from ropemods.model.rope_tables import edits_inside, sentinel, without_sentinel
from ropemods.mods import Mod, mod_from_json
from ropemods.mods.base import Edits

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
    bos_token_id: int | None = None
    """The token that the modifications look for; None where they look for none, and in checkpoints of 0.1.0."""
    version: int = VERSION
    saved: dict[str, Any] | None = None
    """The rope parameters that the checkpoint's config has for stock transformers; an adapter has none."""

    @property
    def edits(self) -> Edits:
        """The changes of rotary frequencies that are in force in every layer."""
        return edits_of(self.mods, self.strength)


def edits_of(mods: list[Mod], strength: dict[str, float]) -> list[tuple[Mod, float]]:
    """Those of the modifications that change the frequencies of every layer, with their strengths, where above 0."""
    return [
        (mod, strength[mod.kind])
        for mod in mods
        if mod.edits_frequencies and not mod.for_some_layers and strength[mod.kind] > 0
    ]


def parse(entry: Any, path: str | os.PathLike[str]) -> Record:
    """The record in the config or in the `ropemods.json` of a checkpoint, or what is wrong with it."""
    try:
        return _parsed(entry)
    except ValueError as error:
        raise ValueError(f"the ropemods record of {path} cannot be read: {error}") from None


def _parsed(entry: Any) -> Record:
    if not isinstance(entry, dict):
        raise ValueError(f"it must be a mapping, not {entry!r}")
    version = entry.get("version", READS[0])
    if version not in READS:
        raise ValueError(
            f"it is version {version!r}, and this ropemods reads versions {' and '.join(map(str, READS))}; install "
            "the version of ropemods that wrote it"
        )
    for name, kind in (("mods", list), ("strength", dict), ("rope_parameters", dict)):
        if not isinstance(entry.get(name), kind):
            raise ValueError(f"its {name} must be a {kind.__name__}, not {entry.get(name)!r}")
    mods = [mod_from_json(mod) for mod in entry["mods"]]
    if not mods:
        raise ValueError("it names no modification")
    kinds = list(dict.fromkeys(mod.kind for mod in mods))
    if set(entry["strength"]) != set(kinds):
        raise ValueError(f"it has strengths of {list(entry['strength'])} and modifications {kinds}; one for each")
    for kind, alpha in entry["strength"].items():
        check_strength(alpha, kind)
    token = entry.get("bos_token_id")
    if token is not None and (type(token) is not int or token < 0):
        raise ValueError(f"its bos_token_id must be the id of a token, a whole number from 0, or null, not {token!r}")
    strength = {kind: float(entry["strength"][kind]) for kind in kinds}
    return Record(mods, strength, entry["rope_parameters"], token, version)


def check_strength(alpha: Any, kind: str | None = None) -> None:
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
        of = "" if kind is None else f" of {kind}"
        raise ValueError(f"strength{of} must be a number from 0 (stock) to 1 (the full modification), not {alpha!r}")


def load_config(
    path: str | os.PathLike[str], *, gguf_file: str | None = None, **hub_kwargs: Any
) -> tuple[PreTrainedConfig, Record | None]:
    """The stock config of a checkpoint, and the record of its modifications if it has one. A GGUF file has none.

    The stock rope parameters are put back before the config is made: some architectures accept only their own types.
    """
    if gguf_file is not None:
        return gguf.load_config(path, gguf_file, **hub_kwargs), None
    try:
        raw, _ = PreTrainedConfig.get_config_dict(path, **hub_kwargs)
    except OSError as error:
        if os.path.isdir(path) or "connect" not in str(error):
            raise
        raise OSError(
            f"{path}: there is no such folder here, and the hub cannot be reached to look for the config.json of a "
            "model of that name"
        ) from error
    if "ropemods" not in raw:
        return AutoConfig.from_pretrained(path, **hub_kwargs), None
    record = parse(raw.pop("ropemods"), path)
    inside = raw.get("text_config")
    holder = inside if isinstance(inside, dict) and "rope_parameters" in inside else raw
    # transformers leaves out of a config.json what is the default of its class.
    record = dataclasses.replace(record, saved=holder.get("rope_parameters", record.rope_parameters))
    _check_saved(record, path)
    if "auto_map" in raw:
        config = AutoConfig.from_pretrained(path, **hub_kwargs)
    else:
        holder["rope_parameters"] = copy.deepcopy(record.rope_parameters)
        config = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    rope_config(config).rope_parameters = copy.deepcopy(record.rope_parameters)
    return config, record


def _check_saved(record: Record, path: str | os.PathLike[str]) -> None:
    """That the record and the rope parameters beside it, which stock transformers goes by, say the same.

    Whether native parameters give the very frequencies is seen once there are tables (`check_native`).
    """
    saved, strength = record.saved, record.strength
    active = [mod for mod in record.mods if strength[mod.kind] > 0]
    marks = [] if saved is None else sentinels(saved)
    if not active and saved != record.rope_parameters:
        said = "every strength is 0, so its rope parameters must be the stock ones, and they are not"
    elif active and saved == record.rope_parameters:
        said = (
            f"{active[0].kind} has strength {strength[active[0].kind]}, and its rope parameters are the stock ones, so "
            "stock transformers would run the unmodified model"
        )
    elif active and not marks and (len(record.edits) < len(active)):
        said = (
            "stock transformers would load it, and its rope parameters cannot say what "
            f"{', '.join(mod.kind for mod in active)} do"
        )
    elif any(edits_inside(mark) != record.edits for mark in marks):
        said = "its rope parameters describe other frequencies than its modifications and their strengths do"
    else:
        return
    raise ValueError(f"{path} contradicts itself: by its ropemods record {said}{EDITED}")


EDITED = (
    ". Its config.json was edited after it was saved; take that back, and change a strength with "
    "ropemods.from_pretrained, ropemods.set_strength and save_pretrained"
)


def sentinels(parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """What the sentinels in rope parameters say, one for each table that has one."""
    nested = [value for value in parameters.values() if isinstance(value, dict) and "rope_type" in value]
    return [part["ropemods"] for part in [parameters, *nested] if "ropemods" in part]


def check_native(model: PreTrainedModel, record: Record, path: str | os.PathLike[str]) -> None:
    """That rope parameters which stock transformers can load give it the frequencies that the record describes."""
    if record.saved is None or sentinels(record.saved) or not record.edits:
        return
    if not gives(model, record.saved, record.edits):
        raise ValueError(
            f"{path} contradicts itself: its rope parameters give other frequencies than "
            f"{', '.join(f'{mod} at strength {alpha:g}' for mod, alpha in record.edits)}{EDITED}"
        )


def stock_of(given: PreTrainedConfig, found: Record, path: str | os.PathLike[str]) -> PreTrainedConfig:
    """The stock config of one that a caller gives in place of the checkpoint's; it must record the same modifications.

    Its rope parameters are left out: those of a modified config say what stock transformers may make of it.
    """
    if not isinstance(given, PreTrainedConfig):
        raise TypeError(
            f"config= takes a config, found {type(given).__name__}; load it with AutoConfig.from_pretrained"
        )
    entry = getattr(given, "ropemods", None)
    own = None if entry is None else parse(entry, "the config that was given")
    if own is None or (own.mods, own.strength) != (found.mods, found.strength):
        raise ValueError(
            f"the config that was given records {entry['mods'] if entry else 'no modifications'}, and {path} was saved "
            f"with {[mod.to_json() for mod in found.mods]} at strength {found.strength}; start from the checkpoint's "
            "own config, "
            f"AutoConfig.from_pretrained({str(path)!r}), and change other values in it"
        )
    config = copy.deepcopy(given)
    del config.ropemods
    rope_config(config).rope_parameters = copy.deepcopy(found.rope_parameters)
    return config


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


def write(
    model: PreTrainedModel, mods: list[Mod], strength: dict[str, float], stock: dict[str, Any], bos_token_id: int | None
) -> None:
    """Make the config say what the model is now."""
    model.config.ropemods = {
        "version": VERSION,
        "mods": [mod.to_json() for mod in mods],
        "strength": dict(strength),
        "bos_token_id": bos_token_id,
        "rope_parameters": copy.deepcopy(stock),
    }
    text = rope_config(model.config)
    _admit_sentinel(type(text))
    text.rope_parameters = _rope_parameters(model, mods, strength, stock)


def show_stock(model: PreTrainedModel, stock: dict[str, Any]) -> None:
    """Let rotary modules that read the rope parameters in their forward see the stock ones, not what is to be saved."""
    for table in anatomy_of(model).tables:
        forward = inspect.unwrap(type(table.module).forward)
        if "rope_parameters" in forward.__code__.co_names and not hasattr(table.module, "ropemods_config"):
            table.module.ropemods_config = table.module.config
            table.module.config = copy.deepcopy(table.module.config)
            if table.module.ropemods_config is rope_config(model.config):
                table.module.config.rope_parameters = copy.deepcopy(stock)


def show_own(model: PreTrainedModel) -> None:
    for table in anatomy_of(model).tables:
        if hasattr(table.module, "ropemods_config"):
            table.module.config = table.module.ropemods_config


def erase(model: PreTrainedModel, stock: dict[str, Any]) -> None:
    if hasattr(model.config, "ropemods"):
        del model.config.ropemods
    rope_config(model.config).rope_parameters = copy.deepcopy(stock)


def is_portable(model: PreTrainedModel) -> bool:
    """Whether stock transformers loads a checkpoint of the model, as it is now, and runs the same model."""
    return not sentinels(rope_config(model.config).rope_parameters)


def _rope_parameters(
    model: PreTrainedModel, mods: list[Mod], strength: dict[str, float], stock: dict[str, Any]
) -> dict[str, Any]:
    active = [mod for mod in mods if strength[mod.kind] > 0]
    if not active:
        return copy.deepcopy(stock)
    edits = edits_of(mods, strength)
    if len(edits) == len(active):
        native = native_parameters(model, edits, stock)
        if native is not None:
            return native
    return per_table(model, stock, lambda part, _: sentinel(copy.deepcopy(part), edits))
