"""Reading a recipe from YAML and flags; an unknown key, or a value of another type than the key's, is an error.

A flag overrides the key of its name. A key within a mapping is written with a dot: --schedule.steps 100.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from ropemods.leakage.protocol import Protocol
from ropemods.mod_words import mod_from, mod_records
from ropemods.penalty import Penalty
from ropemods.settings.extras import MissingPackage, need
from ropemods.settings.options import (
    REQUIRED,
    build,
    checked,
    converted,
    declared,
    did_you_mean,
    fields,
    from_text,
    items,
)
from ropemods.settings.strict_yaml import read, scalar
from ropemods.training.recipe import Options, Recipe
from ropemods.training.text import Source

MAPPINGS = ("mods", "schedule", "penalty", "lora", "protocol", "probe")

REFUSED = {
    "seed": "seeds says how many runs there are; they take the seeds 0, 1, ...",
    "train_sampling_strategy": "the order of the rows is the recipe's, the same for every arm",
    "remove_unused_columns": "rows have no columns to remove",
    "dataloader_drop_last": "rows are made to fill every batch",
    "logging_nan_inf_filter": "the loss guard has to see losses that are not numbers",
    "auto_find_batch_size": "arms would train on different batches",
    "load_best_model_at_end": "arms are compared at the same step",
    "ignore_data_skip": "a resumed run would read rows twice",
    "push_to_hub": "push the folder that you choose, after reading the table",
    "do_train": "arms says what is trained",
    "do_eval": "every arm is measured",
    "do_predict": "every arm is measured",
}
"""Training arguments that a recipe may not set, and why."""


def from_command_line(words: Sequence[str]) -> Recipe:
    """The recipe of `--config FILE` with the other flags laid over it; flags alone do as well."""
    given = flags(words)
    config = given.pop("config", None)
    values = dict(read(config)) if config is not None else {}
    return from_values(_overlaid(values, given), source=str(config or "command line"))


def from_values(values: Mapping[str, Any], *, source: str) -> Recipe:
    """A recipe from its keys and values."""
    own, hf = fields(Options), training_arguments()
    for key in values:
        if key in REFUSED:
            raise ValueError(f"{source}: a recipe does not take {key}: {REFUSED[key]}")
        if key not in own and key not in MAPPINGS and key not in hf:
            near = difflib.get_close_matches(str(key), [*own, *MAPPINGS, *hf], n=3)
            meant = f" (did you mean {' or '.join(near)}?)" if near else ""
            raise ValueError(
                f"{source}: there is no key {key!r}{meant}; a recipe has its own keys ({', '.join(own)}), "
                f"{', '.join(MAPPINGS)}, and the arguments of transformers' TrainingArguments"
            )
    nested = {key: values[key] for key in MAPPINGS if values.get(key) is not None}
    _check_installed(values, source)
    try:
        return Recipe(
            options=build(Options, checked(Options, {k: v for k, v in values.items() if k in own}, source=source)),
            **modifying(nested),
            lora=_lora(nested["lora"]) if "lora" in nested else None,
            protocol=_protocol(nested["protocol"], "protocol") if "protocol" in nested else None,
            probe=_protocol(nested["probe"], "probe") if "probe" in nested else None,
            training={k: _typed(k, v) for k, v in values.items() if k in hf and k not in own},
        )
    except (ValueError, TypeError) as error:
        text = str(error)
        raise ValueError(text if text.startswith(source) else f"{source}: {text}") from None


def modifying(nested: Mapping[str, Any]) -> dict[str, Any]:
    """`mods`, `schedule` and `penalty`, as a recipe has them, and whatever else spells them as a recipe does."""
    return {
        "mods": tuple(mod_from(each) for entry in _items(nested.get("mods") or []) for each in mod_records(entry)),
        "schedule": tuple(_schedule(entry) for entry in _items(nested.get("schedule") or [])),
        "penalty": None if nested.get("penalty") is None else _penalty(nested["penalty"]),
    }


def _check_installed(values: Mapping[str, Any], source: str) -> None:
    """An error, before anything is read or trained, for a recipe that needs an extra that is not installed."""
    need("accelerate", f"{source}: training")
    if values.get("lora") is not None:
        need("peft", f"{source}: lora")
    if values.get("deepspeed") is not None:
        need("deepspeed", f"{source}: deepspeed")
    if values.get("report_to") is not None:
        from ropemods.training.reporters import reporters

        try:
            reporters(values["report_to"])
        except (ValueError, MissingPackage) as error:
            raise type(error)(f"{source}: {error}") from None
    for key in ("data", "held_out_data"):
        if isinstance(name := values.get(key), str) and not Source(name=name).is_local():
            need("datasets", f"{source}: {key} is {name!r}, which is no file here; reading it as a dataset")


def help_text() -> str:
    """Every key that is a recipe's own, with its default."""
    lines = ["A recipe's own keys, in its YAML file or as flags (--key value, --mapping.key value):", ""]
    for name, field in fields(Options).items():
        said, default = declared(field), field.default
        if default is REQUIRED:
            shown = "needed"
        elif default is None:
            shown = said.unset or "not set"
        else:
            shown = ", ".join(default) if isinstance(default, tuple) else str(default)
        lines.append(f"  {name}: {said.help} ({shown})")
    lines += ["", f"  {', '.join(MAPPINGS)}: mappings or lists; ropemods/training/recipe.py shows each"]
    return "\n".join([*lines, "  and the arguments of transformers' TrainingArguments under their own names"])


@cache
def training_arguments() -> dict[str, Any]:
    """The arguments of TrainingArguments with their types."""
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    return {field.name: hints[field.name] for field in dataclasses.fields(TrainingArguments) if field.init}


def flags(words: Sequence[str]) -> dict[str, Any]:
    """`--key value`, `--key=value`, `--mapping.key value`, and `--key` alone for true."""
    hints = {**training_arguments(), **typing.get_type_hints(Options), "config": str}
    found: dict[str, Any] = {}
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"expected a flag such as --config recipe.yaml, found {word!r}")
        key, has_value, text = word[2:].partition("=")
        key = key.replace("-", "_")
        texts = [text] if has_value else []
        while not has_value and queue and not queue[0].startswith("--"):
            texts.append(queue.pop(0))
        if key == "config" and len(texts) != 1:
            raise ValueError(f"--config takes one file, found {texts}")
        if key == "local_rank":  # the deepspeed launcher appends it; the environment says the same
            continue
        found[key] = _flag_value(texts, hints.get(key))
    return found


def _flag_value(texts: list[str], hint: Any) -> Any:
    if not texts:
        return True
    if hint is not None and len(texts) == 1 and str in (typing.get_args(hint) or (hint,)) and hint is not Any:
        value = from_text(texts, hint)
        # Where a mapping may stand as well as text, what looks like one is one.
        return scalar(value) if isinstance(value, str) and value[:1] in "{[" else value
    if hint is None and re.fullmatch(r"[\w.-]+(,[\w.-]+)+", texts[0]):  # --protocol.early 8,16
        texts = [part for text in texts for part in text.split(",")]
    return [scalar(text) for text in texts] if len(texts) > 1 else scalar(texts[0])


def _overlaid(values: dict[Any, Any], given: Mapping[str, Any]) -> dict[Any, Any]:
    for key, value in given.items():
        outer, dot, inner = key.partition(".")
        if not dot:
            values[key] = value
            continue
        held = values.get(outer) or {}
        if not isinstance(held, dict):
            raise ValueError(f"--{key}: {outer} is a list here; give it whole, --{outer} '[{{...}}]'")
        values[outer] = {**held, inner: value}
    tuples = [name for name, hint in typing.get_type_hints(Options).items() if typing.get_origin(hint) is tuple]
    for name in tuples:  # --arms base, --arms base,control
        listed: list[Any] = values[name] if isinstance(values.get(name), list) else [values.get(name)]
        if all(isinstance(each, str) for each in listed):
            values[name] = items(listed)
    return values


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _mapping(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name}: expected {{key: value, ...}}, found {value!r}")
    return value


def _protocol(value: Any, name: str) -> Protocol:
    return Protocol.from_dict(_mapping(value, name))


def _schedule(value: Any) -> dict[str, Any]:
    from ropemods.schedule import StrengthSchedule

    entry = _mapping(value, "schedule")
    known = [name for name in inspect.signature(StrengthSchedule).parameters]
    for name in entry:
        if name not in known:
            raise ValueError(f"schedule: there is no {name!r}{did_you_mean(name, known)}")
    StrengthSchedule(**entry)
    return entry


def _penalty(value: Any) -> Penalty:
    entry = _mapping(value, "penalty")
    known = [field.name for field in dataclasses.fields(Penalty)]
    for name in entry:
        if name not in known:
            raise ValueError(f"penalty: there is no {name!r}{did_you_mean(name, known)}")
    if "weight" not in entry:
        raise ValueError("penalty: weight is needed, as in {weight: 3.0}")
    return Penalty(**entry)


def _lora(value: Any) -> dict[str, Any]:
    from peft import LoraConfig

    known = {field.name for field in dataclasses.fields(LoraConfig)}
    unknown = sorted(set(_mapping(value, "lora")) - known)
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        raise ValueError(
            f"lora: LoraConfig has no {', '.join(unknown)}" + (f" (did you mean {near[0]}?)" if near else "")
        )
    return dict(value)


def _typed(name: str, value: Any) -> Any:
    """A training argument in the type that TrainingArguments declares; mappings and lists are left to it."""
    hint = training_arguments()[name]
    if isinstance(value, dict | list):
        origins = {typing.get_origin(each) or each for each in (typing.get_args(hint) or (hint,))}
        if type(value) in origins:
            return value
    return converted(value, hint, name)
