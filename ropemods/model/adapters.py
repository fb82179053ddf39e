"""PEFT adapters: an adapter directory holds no base config, so the description of the modifications is put beside it.

Neither PEFT nor transformers (`model.add_adapter`) offers an extension point where it makes, writes or reads one, so
what does that is wrapped; for models without modifications the wrappers do nothing. A new adapter keeps what the
modifications have of their own, whether its config names that or not. Beside `adapter_config.json` goes
`ropemods.json`, and the adapter's `peft_type` is renamed, so that PEFT on its own refuses the adapter instead of
running it on the unmodified base.
"""

from __future__ import annotations

import importlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from ropemods.model import adapter_card
from ropemods.model.attention_layers import Stages
from ropemods.model.config_record import parse
from ropemods.model.on_import import when_imported, wrap
from ropemods.model.wrappers import base_model, uncompiled
from ropemods.mods import Mod
from ropemods.settings.extras import need
from ropemods.settings.files import write_text

FILE = "ropemods.json"
PREFIX = "ROPEMODS+"


def watch_saving() -> None:
    """See to it that what saves and loads adapters is wrapped, PEFT's own now or when PEFT is imported; once."""
    wrap(PreTrainedModel, "save_pretrained", _saving_native)
    wrap(PreTrainedModel, "add_adapter", _adding_native)
    when_imported("peft", _wrap_peft)


def _wrap_peft(peft: Any) -> None:
    wrap(peft.PeftModel, "__init__", _making)
    wrap(peft.PeftModel, "add_adapter", _adding)
    wrap(peft.PeftModel, "save_pretrained", _saving)
    wrap(peft.PeftModel, "load_adapter", _loading)
    wrap(peft.PeftModel, "from_pretrained", _reading)
    wrap(peft.PeftConfig, "from_pretrained", _reading)
    wrap(importlib.import_module("peft.utils.hotswap"), "hotswap_adapter", _swapping)


def _modified(model: nn.Module) -> bool:
    return getattr(model, "ropemods_attached", None) is not None


def _making(stock: Callable, self: Any, model: Any, peft_config: Any, *args: Any, **kwargs: Any) -> None:
    _complete(uncompiled(model), peft_config, args[0] if args else kwargs.get("adapter_name", "default"))
    stock(self, model, peft_config, *args, **kwargs)


def _adding(stock: Callable, model: Any, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> Any:
    if model.peft_config:  # else `_making` has seen to it
        _complete(uncompiled(model.get_base_model()), peft_config, adapter_name)
    return stock(model, adapter_name, peft_config, *args, **kwargs)


def _adding_native(stock: Callable, model: Any, adapter_config: Any, adapter_name: str | None = None) -> Any:
    _complete(model, adapter_config, adapter_name or "default")
    return stock(model, adapter_config, adapter_name)


def _complete(model: nn.Module, config: Any, adapter: str) -> None:
    """Have a new adapter keep what the modifications learn, chose or copied, and say so."""
    if not _modified(model) or config.inference_mode or not _places(model):
        return
    if not hasattr(config, "modules_to_save"):
        raise ValueError(
            f"the modifications have values of their own, and a {type(config).__name__} has no modules_to_save to keep "
            "them with, so they would neither train nor be saved; use a kind that has it, such as LoraConfig"
        )
    saved = list(config.modules_to_save or ())
    if "ropemods" not in saved:
        config.modules_to_save = [*saved, "ropemods"]
        warnings.warn(
            f"'ropemods' was added to modules_to_save of the adapter {adapter!r}, so that it trains and saves what the "
            "modifications have of their own",
            stacklevel=4,
        )


def _saving(stock: Callable, model: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    inner = uncompiled(model.get_base_model())
    if not _modified(inner):
        return stock(model, save_directory, *args, **kwargs)
    chosen = kwargs.get("selected_adapters") or list(model.peft_config)
    _check_saved(inner, chosen)
    result = stock(model, save_directory, *args, **kwargs)
    if kwargs.get("is_main_process", True):
        for adapter in chosen:
            _describe(Path(save_directory) / ("" if adapter == "default" else adapter), inner)
    return result


def _saving_native(stock: Callable, model: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    """Of a transformers model that has been given an adapter of its own, which is then all that it saves."""
    if not (_modified(model) and getattr(model, "_hf_peft_config_loaded", False)):
        return stock(model, save_directory, *args, **kwargs)
    _check_saved(model, model.active_adapters())
    result = stock(model, save_directory, *args, **kwargs)
    if args[0] if args else kwargs.get("is_main_process", True):
        _describe(Path(save_directory), model)
    return result


def _loading(stock: Callable, model: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
    """One more adapter beside those that a model has: its base must be modified as the adapter was trained with."""
    if adapter_name in model.peft_config or not (Path(model_id) / FILE).is_file():
        return stock(model, model_id, adapter_name, *args, **kwargs)
    config = _of_the_same(model, model_id)
    trainable = args[0] if args else kwargs.get("is_trainable", False)
    config.inference_mode = not trainable
    model.add_adapter(adapter_name, config)
    if trainable:
        model.set_requires_grad(adapter_name)
    return stock(model, model_id, adapter_name, *args, **kwargs)


def _swapping(
    stock: Callable, model: Any, model_name_or_path: Any, adapter_name: str, torch_device: Any = None, **kwargs: Any
) -> None:
    """Put the values of a saved adapter in the place of one that the model runs, those of the modifications too."""
    inner = base_model(model)
    if not (Path(model_name_or_path) / FILE).is_file() and not (_modified(inner) and _places(inner)):
        return stock(model, model_name_or_path, adapter_name, torch_device, **kwargs)
    from peft import set_peft_model_state_dict
    from peft.utils import hotswap

    config = _of_the_same(model, model_name_or_path)
    hotswap.check_hotswap_configs_compatible(model.active_peft_config, config)
    weights = hotswap.load_peft_weights(model_name_or_path, device=torch_device or hotswap.infer_device(), **kwargs)
    values = {name: weights.pop(name) for name in list(weights) if ".ropemods." in name}
    lora = hotswap.PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]
    named = hotswap._insert_adapter_name_into_state_dict(weights, adapter_name=adapter_name, parameter_prefix=lora)
    hotswap.hotswap_adapter_from_state_dict(model, named, adapter_name, config, lora)
    set_peft_model_state_dict(uncompiled(model), values, adapter_name)


def _of_the_same(model: nn.Module, folder: Any) -> Any:
    """The config of an adapter that was trained with the modifications that this model has."""
    config, described = read(folder)
    record = None if described is None else parse(described, folder)
    wanted = ([], {}) if record is None else (record.mods, record.strength)
    attached = getattr(base_model(model), "ropemods_attached", None)
    found = (attached.mods, attached.strength) if attached is not None else ([], {})
    if found != wanted:
        raise ValueError(
            f"the adapter in {folder} was trained with {_words(*wanted)}, and this model has {_words(*found)}; load it "
            "on its own with ropemods.from_pretrained, or give the base model the same modifications and strengths"
        )
    return config


def _reading(stock: Callable, cls: Any, *args: Any, **kwargs: Any) -> Any:
    """Of an adapter or its config by PEFT alone, which does not know what its base must be modified with."""
    try:
        return stock(cls, *args, **kwargs)
    except KeyError as error:
        given = [each for each in (*args, *kwargs.values()) if isinstance(each, str | os.PathLike)]
        if ".ropemods." in str(error.args[0]):  # `_complete` had it asked for
            raise ValueError(
                f"the adapter in {given[0]} was trained on a model without modifications, and cannot be trained on "
                "with what these have of their own; load it on the unmodified model, merge_and_unload it, then apply"
            ) from None
        if not str(error.args[0]).startswith(PREFIX):
            raise
        found = next((each for each in given if (Path(each) / FILE).is_file()), None)
        wanted = None if found is None else parse(json.loads((Path(found) / FILE).read_text()), found)
        what = "modifications" if wanted is None else _words(wanted.mods, wanted.strength)
        raise ValueError(
            f"the adapter in {found or given[0]} was trained with {what}, and peft would run it on a base without; "
            "load it with ropemods.from_pretrained, which modifies its base"
        ) from None


def _words(mods: list[Mod], strength: dict[str, float]) -> str:
    return ", ".join(f"{mod} at strength {strength[mod.kind]:g}" for mod in mods) or "no modification"


def _places(inner: nn.Module) -> list[nn.Module]:
    """Where there is something of the modifications that they learned, chose or copied."""
    kept = {mod.kind for mod in inner.ropemods_attached.mods if mod.must_be_saved}  # type: ignore[union-attr]
    return [
        module
        for name, module in inner.named_modules()
        if name.rpartition(".")[2] == "ropemods"
        and "modules_to_save" not in name
        and "original_module" not in name
        and any(kept.intersection(key.split(".")) for key in module.state_dict())
    ]


def _check_saved(inner: nn.Module, adapters: list[str]) -> None:
    """What the modifications learned, chose or copied is saved with an adapter only if PEFT was told of them."""
    places = _places(inner)
    for adapter in adapters:
        unsaved = [p for p in places if isinstance(p, Stages) or adapter not in getattr(p, "modules_to_save")]  # noqa: B009
        if unsaved:
            raise ValueError(
                f"the modifications have values of their own (in {len(unsaved)} places) that the adapter {adapter!r} "
                "neither trained nor saves; make it with LoraConfig(..., modules_to_save=['ropemods'])"
            )


def _describe(folder: Path, inner: Any) -> None:
    write_text(folder / FILE, json.dumps(inner.config.ropemods, indent=2) + "\n")
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    if not config["peft_type"].startswith(PREFIX):
        config["peft_type"] = PREFIX + config["peft_type"]
        write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
    attached = inner.ropemods_attached
    adapter_card.write(folder, attached.mods, attached.strength, config.get("base_model_name_or_path") or "")


def is_adapter(path: str | os.PathLike) -> bool:
    return (Path(path) / "adapter_config.json").is_file()


def read(path: str | os.PathLike):
    """The PEFT config of an adapter directory and the description beside it (None for a stock adapter)."""
    need("peft", f"{path} is a PEFT adapter; reading it")
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    folder = Path(path)
    raw = json.loads((folder / "adapter_config.json").read_text())
    kind = raw["peft_type"]
    described = (folder / FILE).is_file()
    if kind.startswith(PREFIX) and not described:
        raise FileNotFoundError(
            f"{folder} is an adapter of a modified model, but {FILE}, which says how it was modified, is not beside "
            "it; copy it from where the adapter was saved"
        )
    if not described:
        return PeftConfig.from_pretrained(str(folder)), None
    options = {k: v for k, v in raw.items() if k != "peft_type"}
    config = PEFT_TYPE_TO_CONFIG_MAPPING[kind.removeprefix(PREFIX)].from_peft_type(
        peft_type=kind.removeprefix(PREFIX), **options
    )
    return config, json.loads((folder / FILE).read_text())


def base_class(config: Any) -> Any:
    """The class that loads what an adapter was trained on: the one it names, that of its task, or a causal LM's."""
    tasks = {"SEQ_CLS": "AutoModelForSequenceClassification", "TOKEN_CLS": "AutoModelForTokenClassification"}
    named = (config.auto_mapping or {}).get("base_model_class") or tasks.get(config.task_type)
    return getattr(transformers, named or "", transformers.AutoModelForCausalLM)


@torch.no_grad()
def start_as(model: nn.Module, adapter: str) -> None:
    """Give the base what an adapter's modifications start from, which a new adapter copies and a reference model is.

    An adapter does not train what it holds in buffers: it is what was chosen or copied before, from the base.
    """
    for place in _places(base_model(model)):
        if not isinstance(place, Stages):
            of_base = dict(place.original_module.named_buffers())  # type: ignore[operator, union-attr]
            for name, value in place.modules_to_save[adapter].named_buffers():  # type: ignore[index, union-attr]
                if not value.is_meta:  # offloaded
                    of_base[name].copy_(value)
