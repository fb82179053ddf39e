"""What a checkpoint or adapter folder holds, read from its configs and the headers of its weights files.

No weights are loaded: the model is built without memory for its parameters, which gives its rotary tables.
F counts rotary frequencies; index 0 is the highest.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig

from ropemods.cli.stock_checkpoints import check_name, load_config, readable, skeleton
from ropemods.model import adapters, config_record, rope_tables
from ropemods.mods import Mod
from ropemods.mods.base import Site

STOPPED = 1e-28
"""A band below this turns by less than fp32 can tell at any position; longrope spells a stopped band so."""


def describe(name: str, *, trust_remote_code: bool) -> dict[str, Any]:
    """Everything `ropemods show` says, as plain JSON values."""
    check_name(name)
    notes: list[str] = []
    adapter, config, found = None, None, None
    if adapters.is_adapter(name):
        adapter, found = _adapter(Path(name))
        try:
            config, under = load_config(adapter["base"], trust_remote_code=trust_remote_code)
            found = found or under
        except OSError as error:
            notes.append(f"the base model is not described: {error}")
    else:
        config, found = load_config(name, trust_remote_code=trust_remote_code)
    mods, strength = ([], {}) if found is None else (found.mods, found.strength)
    kept, total = _stored(Path(name), "model*" if adapter is None else "adapter_model*", mods)
    for mod in mods:
        if mod.has_parameters and total is not None and mod.kind not in kept:
            notes.append(f"{mod.kind} has parameters, and the weights hold none: this was saved incompletely")
    loads, why = _stock_adapter_loads(mods) if adapter is not None else _stock_loads(name, mods, strength)
    return {
        "path": name,
        "adapter": None if adapter is None else adapter | {"parameters": total},
        "model": None if config is None else _model(config, total if adapter is None else None),
        "mods": [
            mod.to_json() | {"strength": strength[mod.kind], "text": str(mod), "stored": kept.get(mod.kind, 0)}
            for mod in mods
        ],
        "rope": [] if config is None else _tables(config, mods, strength, trust_remote_code),
        "loads_in_stock_transformers": loads,
        "because": why,
        "notes": notes,
    }


def _adapter(folder: Path) -> tuple[dict[str, Any], config_record.Record | None]:
    raw = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    beside = folder / adapters.FILE
    described = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else None
    if described is None and raw["peft_type"].startswith(adapters.PREFIX):
        raise FileNotFoundError(f"{folder} is an adapter of a modified model, but {adapters.FILE} is not beside it")
    targets = raw.get("target_modules") or []
    about = {
        "type": raw["peft_type"].removeprefix(adapters.PREFIX),
        "base": raw["base_model_name_or_path"],
        "rank": raw.get("r"),
        "alpha": raw.get("lora_alpha"),
        "targets": targets if isinstance(targets, str) else sorted(targets),
    }
    return about, None if described is None else config_record.parse(described, folder)


def _model(config: PreTrainedConfig, parameters: int | None) -> dict[str, Any]:
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    return {
        "type": config.model_type,
        "layers": text.num_hidden_layers,
        "heads": heads,
        "key_value_heads": getattr(text, "num_key_value_heads", None) or heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
        "context": getattr(text, "max_position_embeddings", None),
        "dtype": None if config.dtype is None else str(config.dtype).removeprefix("torch."),
        "bos_token_id": text.bos_token_id,
        "parameters": parameters,
    }


def _stored(folder: Path, files: str, mods: list[Mod]) -> tuple[dict[str, int], int | None]:
    """Parameters of each kind of modification and in all; None in all where no safetensors file is at hand."""
    kept: dict[str, int] = {}
    total, fixed = None, _fixed(mods)
    for file in sorted(folder.glob(f"{files}.safetensors")):
        with readable(str(file)), safe_open(file, "pt") as weights:
            for key in weights.keys():
                own = re.search(r"(?:^|\.)ropemods\.((\w+)\..+)$", key)
                if own and own[1] in fixed:
                    continue
                count = math.prod(weights.get_slice(key).get_shape())
                total = (total or 0) + count
                if own:
                    kept[own[2]] = kept.get(own[2], 0) + count
    return kept, total


def _fixed(mods: list[Mod]) -> set[str]:
    """What the layers' stages store beside their parameters, such as where a sink began."""
    stages = {mod.kind: mod.stage(Site(0, 1, 1, 1, 1)) for mod in mods}
    return {
        f"{kind}.{name}"
        for kind, stage in stages.items()
        if stage is not None
        for name in set(stage.state_dict()) - {name for name, _ in stage.named_parameters()}
    }


def _stock_adapter_loads(mods: list[Mod]) -> tuple[bool, str]:
    if not mods:
        return True, "it is a stock adapter on a stock model"
    return False, "an adapter of a modified model: peft alone refuses it, ropemods.from_pretrained loads it"


def _stock_loads(name: str, mods: list[Mod], strength: dict[str, float]) -> tuple[bool, str]:
    if not mods:
        return True, "it is a stock checkpoint"
    raw, _ = PreTrainedConfig.get_config_dict(name)  # as it was written, wherever in it the rope parameters are
    if f'"rope_type": "{rope_tables.SENTINEL}"' in json.dumps(raw):
        return False, "stock transformers refuses it, ropemods.from_pretrained loads it"
    if not any(strength.values()):
        return True, "every strength is 0, so it is the stock model"
    return True, "its rope parameters say all of it in transformers' own words"


def _tables(
    config: PreTrainedConfig, mods: list[Mod], strength: dict[str, float], trust_remote_code: bool
) -> list[dict[str, Any]]:
    """Each rotary table of the model: its parameters, and the wavelength of every band before and after the mods."""
    text = config.get_text_config(decoder=True)
    result = []
    for table in rope_tables.find(skeleton(config, trust_remote_code=trust_remote_code)):
        before_F = table.live().double()
        after_F = before_F
        for mod in (mod for mod in mods if mod.edits_frequencies):
            if strength[mod.kind] > 0:
                after_F = mod.frequencies(after_F, strength[mod.kind])
        parameters = text.rope_parameters if table.layer_type is None else text.rope_parameters[table.layer_type]
        before = _wavelengths(before_F)
        if parameters["rope_type"] == "proportional":
            # A stopped band of this type has a known place on the ladder of its θ.
            count = len(before)
            ladder = (2 * math.pi * parameters["rope_theta"] ** (band / count) for band in range(count))
            before = [known or below for known, below in zip(before, ladder, strict=True)]
        after = _wavelengths(after_F)
        dropped = [a is None or a != b for a, b in zip(after, before, strict=True)]
        first = min((b for b, gone in zip(before, dropped, strict=True) if gone and b), default=None)
        result.append(
            {
                "layer_type": table.layer_type,
                "parameters": {k: v for k, v in parameters.items() if not isinstance(v, list | dict)},
                "wavelengths": before,
                "wavelengths_in_force": after,
                "kept": dropped.count(False),
                "dropped": dropped.count(True),
                "stopped": after.count(None),
                "first_dropped_wavelength": first,
            }
        )
    return result


def _wavelengths(frequency_F: Tensor) -> list[float | None]:
    """In tokens; None for a band that does not turn."""
    return [None if f < STOPPED else 2 * math.pi / f for f in frequency_F.tolist()]
