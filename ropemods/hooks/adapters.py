"""PEFT adapters: an adapter directory holds no base config, so the description of the modifications is put beside it.

PEFT offers no extension point where it writes an adapter, so its `save_pretrained` is wrapped; for models without
modifications the wrapper does nothing. Beside `adapter_config.json` it writes `ropemods.json`, and it renames the
adapter's `peft_type`, so that PEFT on its own refuses the adapter instead of running it on the unmodified base.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

from torch import nn

from ropemods.atomic import write_text
from ropemods.extras import need
from ropemods.hooks.sites import Stages, base_model

FILE = "ropemods.json"
PREFIX = "ROPEMODS+"


class _OnImport(importlib.abc.MetaPathFinder):
    """Wraps PEFT's saving when PEFT is imported, so that neither apply nor `import ropemods` has to import it."""

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
                _wrap_saving(module.PeftModel)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def watch_saving() -> None:
    """See to it that PEFT's `save_pretrained` is wrapped, now or when PEFT is imported; once."""
    if sys.modules.get("peft") is not None:
        _wrap_saving(sys.modules["peft"].PeftModel)
    elif not any(isinstance(finder, _OnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OnImport())


def _wrap_saving(peft_model: Any) -> None:
    if hasattr(peft_model.save_pretrained, "ropemods"):
        return
    stock = peft_model.save_pretrained

    @functools.wraps(stock)
    def save_pretrained(self, save_directory, *args, **kwargs):
        inner = base_model(self)
        modified = getattr(inner, "ropemods_attached", None) is not None
        if modified:
            _check_saved(inner)
        result = stock(self, save_directory, *args, **kwargs)
        if modified and kwargs.get("is_main_process", True):
            chosen = kwargs.get("selected_adapters") or list(self.peft_config)
            for adapter in chosen:
                folder = Path(save_directory) / ("" if adapter == "default" else adapter)
                _describe(folder, inner.config.ropemods)
        return result

    save_pretrained.ropemods = True  # type: ignore[attr-defined]
    peft_model.save_pretrained = save_pretrained


def _check_saved(inner: nn.Module) -> None:
    """Parameters of the modifications are saved only if PEFT was told of them."""
    unsaved = [
        name
        for name, module in inner.named_modules()
        if isinstance(module, Stages)
        and "modules_to_save" not in name
        and "original_module" not in name
        and any(True for _ in module.parameters())
    ]
    if unsaved:
        raise ValueError(
            f"the modifications have parameters ({unsaved[0]} and {len(unsaved) - 1} more places) that this adapter "
            "neither trained nor saves; make it with LoraConfig(..., modules_to_save=['ropemods'])"
        )


def _describe(folder: Path, record: dict[str, Any]) -> None:
    write_text(folder / FILE, json.dumps(record, indent=2) + "\n")
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    if not config["peft_type"].startswith(PREFIX):
        config["peft_type"] = PREFIX + config["peft_type"]
        write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


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
