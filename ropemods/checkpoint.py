"""Loading modified checkpoints, and writing stock ones.

`model.save_pretrained` is transformers' own. What makes a modified checkpoint safe is in its config: where a stock load
would not give the same model, the rope type is one that stock transformers refuses (`ropemods.model.config_record`).
"""

from __future__ import annotations

import copy
import json
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ropemods.attach import attach, finish, put_on, refresh
from ropemods.model import adapters, config_record, folded_embedding, gguf, gguf_export, native_rope, unchanged
from ropemods.model.anatomy import anatomy_of, survey
from ropemods.model.partition import gathered, home, without_memory_for_parameters
from ropemods.model.short_pass import quietly
from ropemods.model.wrappers import base_model, uncompiled
from ropemods.mods.base import Stage

if TYPE_CHECKING:
    from peft import PeftModel

# While transformers loads a model it puts a `tie_weights` that does nothing into PreTrainedModel, and takes it out
# again; of two loads at once the later one takes out the wrong one, and no model of the process is tied from then on.
_ONE_LOAD = threading.RLock()


@overload
def from_pretrained(
    path: str | os.PathLike[str], *, output_loading_info: Literal[True], **kwargs: Any
) -> tuple[PreTrainedModel, dict[str, Any]]: ...


@overload
def from_pretrained(path: str | os.PathLike[str], **kwargs: Any) -> PreTrainedModel | PeftModel: ...


def from_pretrained(
    path: str | os.PathLike[str],
    *,
    base_model_name_or_path: str | os.PathLike[str] | None = None,
    is_trainable: bool = False,
    config: PreTrainedConfig | None = None,
    output_loading_info: bool = False,
    gguf_file: str | None = None,
    **hf_kwargs: Any,
) -> nn.Module | tuple[nn.Module, dict[str, Any]]:
    """Load what `save_pretrained` wrote of a modified model: a full checkpoint, or a PEFT adapter directory.

    `hf_kwargs` go to transformers' own `from_pretrained`, and `config` and `output_loading_info` are as there. For an
    adapter, `base_model_name_or_path` overrides the base that it names, `config` is the base's, and `is_trainable`
    leaves it ready to train on.

    With `gguf_file`, `path` is where that GGUF file is (for an adapter, where its base's is). It holds a stock model,
    which comes back unpacked and without a quantisation entry in its config: ready for `apply`, training and saving.

    Several threads may call this: one load waits for the other.
    """
    with _ONE_LOAD:
        return _from_pretrained(
            path, base_model_name_or_path, is_trainable, config, output_loading_info, gguf_file, hf_kwargs
        )


def _from_pretrained(
    path: str | os.PathLike[str],
    base_model_name_or_path: str | os.PathLike[str] | None,
    is_trainable: bool,
    config: PreTrainedConfig | None,
    output_loading_info: bool,
    gguf_file: str | None,
    hf_kwargs: dict[str, Any],
) -> nn.Module | tuple[nn.Module, dict[str, Any]]:
    folder = Path(path, hf_kwargs.get("subfolder", ""))
    if adapters.is_adapter(folder):
        if output_loading_info:
            raise ValueError(
                f"{folder} is an adapter, whose base is loaded apart from it, so neither info is of the whole; load "
                "the base by itself with output_loading_info=True"
            )
        hf_kwargs.pop("subfolder", None)  # the rest is for the base
        of_base = hf_kwargs if config is None else {**hf_kwargs, "config": config}
        return _adapter(folder, base_model_name_or_path, is_trainable, gguf_file, of_base)
    if gguf_file is not None:
        return gguf.load(path, gguf_file, _hub(hf_kwargs), **_beyond_hub(hf_kwargs))
    given = config
    config, found = config_record.load_config(path, **_hub(hf_kwargs))
    if found is None:
        raise ValueError(
            f"{path} records no modification (its config has no 'ropemods'), so there is nothing that transformers' "
            "own from_pretrained would not do; load it with AutoModelForCausalLM and modify it with ropemods.apply"
        )
    if given is not None:
        config = config_record.stock_of(given, found, path)
    model, report = _load(path, config, found, hf_kwargs)
    finish(model, survey(model))  # anew, since weights and tables were loaded after the first look
    config_record.check_native(model, found, path)
    model.ropemods_attached.strength.update(found.strength)
    model.ropemods_attached.at_path.update(found.strength)
    model.ropemods_attached.load = from_pretrained
    refresh(model)
    return (model, report) if output_loading_info else model


def recorded_strength(path: str | os.PathLike[str]) -> dict[str, float] | None:
    """The strengths that a checkpoint or an adapter directory records; None where it records none."""
    if adapters.is_adapter(path):
        _, described = adapters.read(path)
        return None if described is None else config_record.parse(described, path).strength
    config = Path(path) / "config.json"
    entry = json.loads(config.read_text(encoding="utf-8")).get("ropemods") if config.is_file() else None
    return None if entry is None else config_record.parse(entry, path).strength


def _hub(hf_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of transformers' keyword arguments that say where and how to find a file."""
    known = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "trust_remote_code")
    return {name: hf_kwargs[name] for name in known if name in hf_kwargs}


def _beyond_hub(hf_kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in hf_kwargs.items() if name not in _hub(hf_kwargs)}


def _load(
    path: str | os.PathLike[str],
    config: PreTrainedConfig,
    found: config_record.Record,
    hf_kwargs: dict[str, Any],
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Build the stock architecture with the stages already in it, so that one load fills every parameter."""
    cls = _class_of(config, hf_kwargs)
    places = hf_kwargs.get("device_map")
    if isinstance(places, dict) and "" not in places and any(mod.shared_stage() is not None for mod in found.mods):
        # A map that names every part of the stock model does not know of what all its layers share.
        first = next((place for place in places.values() if place not in ("cpu", "disk")), "cpu")
        hf_kwargs = hf_kwargs | {"device_map": {"ropemods": first} | places}

    def __init__(self, *args, **kwargs):
        cls.__init__(self, *args, **kwargs)
        attach(self, found.mods, recorded=found)

    # A class of its own for this one load: transformers makes the model from the class it is asked for.
    loading: Any = type(cls.__name__, (cls,), {"__init__": __init__, "__module__": cls.__module__})
    model, report = loading.from_pretrained(path, config=config, output_loading_info=True, **hf_kwargs)
    model.__class__ = cls
    missing = sorted(set(report["missing_keys"]) - set(_filled(model, found.version)))
    mismatched = sorted(report["mismatched_keys"])
    if missing or mismatched:
        raise ValueError(
            f"{path} does not hold every parameter of the modified model: missing {missing[:4]} ({len(missing)} in "
            f"all), of another shape {mismatched[:4]}; it was saved incompletely; save it again from memory"
        )
    return model, report


def _filled(model: nn.Module, version: int) -> list[str]:
    """Give stages what checkpoints of that version do not have; returns the names.

    What PEFT keeps beside an adapter's own copy is not the adapter's.
    """
    own = [(name, stage) for name, stage in _stages(model) if "original_module" not in name]
    return [f"{name}.{buffer}" for name, stage in own for buffer in stage.fill_missing(version)]


def _stages(model: nn.Module) -> list[tuple[str, Stage]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Stage)]


def _class_of(config: PreTrainedConfig, hf_kwargs: dict[str, Any]) -> Any:
    """The class that was saved: the one the checkpoint names, else what transformers makes of the config."""
    named = (config.architectures or [None])[0]
    if named is not None and not hasattr(config, "auto_map"):  # code beside the checkpoint may reuse a name
        own = getattr(transformers, named, None)
        if own is not None:
            return own
    trust = {"trust_remote_code": hf_kwargs["trust_remote_code"]} if "trust_remote_code" in hf_kwargs else {}
    with torch.device("meta"):
        return type(AutoModelForCausalLM.from_config(copy.deepcopy(config), **trust))


def _adapter(
    path: str | os.PathLike[str],
    base: str | os.PathLike[str] | None,
    is_trainable: bool,
    gguf_file: str | None,
    hf_kwargs: dict[str, Any],
) -> nn.Module:
    adapter_config, described = adapters.read(path)
    from peft import PeftModel

    if described is None:
        raise ValueError(
            f"{path} is a PEFT adapter without modifications (no {adapters.FILE} beside it); load it with peft"
        )
    base = base or adapter_config.base_model_name_or_path
    if base is None:
        raise ValueError(f"{path} does not name its base model; pass base_model_name_or_path=")
    model = _base(base, adapters.base_class(adapter_config), gguf_file, hf_kwargs)
    wanted = config_record.parse(described, path)
    attached = getattr(model, "ropemods_attached", None)
    if attached is None:
        put_on(model, wanted.mods, recorded=wanted)
    elif attached.mods != wanted.mods:
        raise ValueError(
            f"the adapter in {path} was trained with {list(map(str, wanted.mods))}, and its base {base} is modified "
            f"with {list(map(str, attached.mods))}; pass the base it was trained on as base_model_name_or_path="
        )
    for _, stage in _stages(model):  # PEFT refuses an adapter without everything that a state dict has
        stage.keep_as_of(wanted.version)
    wrapped = PeftModel.from_pretrained(model, str(path), config=adapter_config, is_trainable=is_trainable)
    _filled(wrapped, wanted.version)
    for _, stage in _stages(wrapped):
        stage.keep_as_of(config_record.VERSION)
    adapters.start_as(wrapped, "default")
    model.ropemods_attached.strength.update(wanted.strength)
    refresh(model)
    return wrapped


def _base(path: str | os.PathLike[str], cls: Any, gguf_file: str | None, hf_kwargs: dict[str, Any]) -> PreTrainedModel:
    if gguf_file is not None:
        return gguf.load(path, gguf_file, _hub(hf_kwargs), **_beyond_hub(hf_kwargs))
    _, found = config_record.load_config(path, **_hub(hf_kwargs))
    if found is not None:
        return from_pretrained(path, **hf_kwargs)  # type: ignore[return-value]
    return cls.from_pretrained(path, **hf_kwargs)


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    rope: Literal["native", "longrope"] = "native",
    gguf: str | os.PathLike[str] | None = None,
) -> None:
    """Write a stock checkpoint of this model, or say which modification stands in the way.

    Changed frequencies are written in transformers' own words for them where it has some, and otherwise, or with
    `rope="longrope"`, as a list of factors, which more engines read.

    With `gguf`, a GGUF file of the model before it was modified or tuned, `path` is a GGUF file for llama.cpp instead,
    with that one's metadata, tokenizer and types.
    """
    if uncompiled(model) is not base_model(model):
        raise ValueError("this is a PEFT model; merge the adapter first: model = model.merge_and_unload()")
    inner = base_model(model)
    attached = getattr(inner, "ropemods_attached", None)
    if attached is None:
        raise ValueError("this model has no modifications, so save_pretrained already writes a stock checkpoint")
    unchanged.check(inner)
    if any(parameter.is_meta for parameter in inner.parameters()):
        raise ValueError("parts of this model are offloaded; load it whole (without device_map) to export it")
    if gguf is not None and rope != "native":
        raise ValueError(f"rope={rope!r} is how a checkpoint says it, and a GGUF has a way of its own; leave one out")
    active = [mod for mod in attached.mods if attached.strength[mod.kind] > 0]
    target = "a stock checkpoint" if gguf is None else "a GGUF"
    config = copy.deepcopy(inner.config)
    del config.ropemods
    text = config.get_text_config(decoder=True)
    in_config = False
    for mod in active:
        whole = attached.strength[mod.kind] == 1 and gguf is None
        if whole and (entries := mod.stock_entries(text, len(anatomy_of(inner).layers))):
            in_config = True
            for name, value in entries.items():
                setattr(text, name, value)
        elif (reason := mod.export_obstacle()) is not None:
            raise ValueError(f"{mod} cannot be written into {target}: {reason}")
    text.rope_parameters = stock_rope = copy.deepcopy(attached.rope_parameters)
    factors = None
    if edits := config_record.edits_of(active, attached.strength):
        expressed: Any
        if gguf is None:
            expressed = native_rope.expressed(inner, edits, stock_rope, spelled_out=rope == "longrope")
        else:
            expressed = gguf_export.frequency_factors(inner, edits, stock_rope)
        if isinstance(expressed, str):
            names = " and ".join(str(mod) for mod, _ in edits)
            raise ValueError(f"{names} cannot be written into {target}: {expressed}")
        if gguf is None:
            text.rope_parameters = expressed
        else:
            factors = expressed
    with gathered(inner):
        state = {k: v for k, v in inner.state_dict().items() if ".ropemods." not in f".{k}"}
        config = folded_embedding.fold_embedding(inner, state, config)
        if gguf is None:
            shell = _stock(inner, config, state)
            if in_config:
                _check_alike(inner, shell, config)
            shell.save_pretrained(path)
        else:
            gguf_export.write(Path(path), Path(gguf), state, config, factors)


def _stock(model: PreTrainedModel, config: PreTrainedConfig, state: dict[str, Tensor]) -> PreTrainedModel:
    """The stock model of `config` that holds the tensors of `state` themselves, to be saved by its own means."""
    config._attn_implementation_internal = None
    with without_memory_for_parameters():
        shell = type(model)(config)
    report = shell.load_state_dict(state, strict=False, assign=True)
    if report.unexpected_keys:
        raise RuntimeError(f"a stock {type(model).__name__} has no {report.unexpected_keys[:4]}")
    shell.tie_weights()
    lacking = [name for name, p in shell.named_parameters() if p.is_meta]
    if lacking:
        raise RuntimeError(f"the model in memory has no {lacking[:4]}, which its stock architecture wants")
    shell.generation_config = model.generation_config
    return shell


def _check_alike(model: PreTrainedModel, shell: PreTrainedModel, config: PreTrainedConfig) -> None:
    """That the stock model is the modified one, where a sequence begins and far out."""
    shell.to(home(model)).eval()
    text = config.get_text_config(decoder=True)
    ids = torch.arange(8, device=home(model))[None] % text.vocab_size
    if text.bos_token_id is not None:
        ids[:, 0] = text.bos_token_id
    for first in (0, 4 * (text.max_position_embeddings or 1 << 18)):
        positions = torch.arange(first, first + 8, device=ids.device)[None]
        with quietly(model):
            ours, theirs = (
                each(ids, position_ids=positions, use_cache=False).logits.float() for each in (model, shell)
            )
        change = ((ours - theirs).norm() / ours.norm()).item()
        if change > 1e-3:
            raise ValueError(
                f"a stock {type(shell).__name__} with these entries in its config does more than this model at "
                f"positions from {first} on (its logits differ by {change:.1%}), so it is not exported"
            )
