"""PEFT adapters: an adapter directory holds no base config, so the description of the modifications is put beside it.

Neither PEFT nor transformers (`model.add_adapter`) offers an extension point where it writes or reads an adapter, so
their `save_pretrained` and PEFT's `load_adapter` are wrapped; for models without modifications the wrappers do nothing.
Beside `adapter_config.json` goes `ropemods.json`, and the adapter's `peft_type` is renamed, so that PEFT on its own
refuses the adapter instead of running it on the unmodified base.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ropemods.model import adapter_card
from ropemods.model.attention_layers import Stages
from ropemods.model.config_record import parse
from ropemods.model.wrappers import base_model
from ropemods.mods import Mod
from ropemods.settings.extras import need
from ropemods.settings.files import write_text

FILE = "ropemods.json"
PREFIX = "ROPEMODS+"


class _OnImport(importlib.abc.MetaPathFinder):
    """Wraps PEFT's methods when PEFT is imported, so that neither apply nor `import ropemods` has to import it."""

    def find_spec(self, name: str, path, target=None):
        if name != "peft":
            return None
        # A spec is also asked for by who only wants to know whether there is one, so this stays until the import.
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec("peft")
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module) -> None:
                sys.meta_path.remove(self)
                load(module)
                _wrap_peft(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def watch_saving() -> None:
    """See to it that what saves and loads adapters is wrapped, PEFT's own now or when PEFT is imported; once."""
    _wrap(PreTrainedModel, "save_pretrained", _saving_native)
    if sys.modules.get("peft") is not None:
        _wrap_peft(sys.modules["peft"])
    elif not any(isinstance(finder, _OnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OnImport())


def _wrap_peft(peft: Any) -> None:
    _wrap(peft.PeftModel, "save_pretrained", _saving)
    _wrap(peft.PeftModel, "load_adapter", _loading)


def _wrap(cls: Any, name: str, around: Callable[..., Any]) -> None:
    """Put `around(stock, self, ...)` in the place of a method."""
    stock = getattr(cls, name)
    if hasattr(stock, "ropemods"):
        return

    @functools.wraps(stock)
    def method(self, *args, **kwargs):
        return around(stock, self, *args, **kwargs)

    method.ropemods = True  # type: ignore[attr-defined]
    setattr(cls, name, method)


def _modified(model: nn.Module) -> bool:
    return getattr(model, "ropemods_attached", None) is not None


def _saving(stock: Callable, model: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    inner = base_model(model)
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
    config, described = read(model_id)
    wanted, attached = parse(described, model_id), getattr(base_model(model), "ropemods_attached", None)
    found = (attached.mods, attached.strength) if attached is not None else ([], {})
    if found != (wanted.mods, wanted.strength):
        raise ValueError(
            f"the adapter in {model_id} was trained with {_words(wanted.mods, wanted.strength)}, and this model has "
            f"{_words(*found)}; load it on its own with ropemods.from_pretrained, or give the base model the same "
            "modifications and strengths first"
        )
    trainable = args[0] if args else kwargs.get("is_trainable", False)
    config.inference_mode = not trainable
    model.add_adapter(adapter_name, config)
    if trainable:
        model.set_requires_grad(adapter_name)
    return stock(model, model_id, adapter_name, *args, **kwargs)


def _words(mods: list[Mod], strength: dict[str, float]) -> str:
    return ", ".join(f"{mod} at strength {strength[mod.kind]:g}" for mod in mods) or "no modification"


def _check_saved(inner: nn.Module, adapters: list[str]) -> None:
    """What the modifications learned, chose or copied is saved with an adapter only if PEFT was told of them."""
    kept = {mod.kind for mod in inner.ropemods_attached.mods if mod.must_be_saved}
    places = [
        module
        for name, module in inner.named_modules()
        if name.rpartition(".")[2] == "ropemods"
        and "modules_to_save" not in name
        and "original_module" not in name
        and any(kept.intersection(key.split(".")) for key in module.state_dict())
    ]
    for adapter in adapters:
        unsaved = [p for p in places if isinstance(p, Stages) or adapter not in p.modules_to_save]
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
