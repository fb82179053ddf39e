"""Reading checkpoints for the commands: configs, stock models, tokenizers; with errors that name what was asked for."""

from __future__ import annotations

import contextlib
import copy
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

import ropemods
from ropemods.attach import attach
from ropemods.model import adapters, config_record, gguf
from ropemods.model.partition import without_memory_for_parameters
from ropemods.mods import Mod

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def quieten() -> None:
    """Progress bars are for terminals, and how DeepSpeed finds an accelerator is not news to these commands."""
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    logging.getLogger("DeepSpeed").addFilter(lambda entry: entry.levelno >= logging.ERROR)


def check_name(name: str, gguf_file: str | None = None) -> None:
    """An error for what is meant as a path and is no checkpoint; transformers would ask the hub for it."""
    path = Path(name).expanduser()
    if path.is_file():
        also = f" and --gguf_file {path.name}" if path.suffix == ".gguf" else ""
        raise ValueError(f"{name} is a file; give the folder of the checkpoint{also}")
    if path.is_dir():
        known = any((path / file).is_file() for file in ("config.json", "adapter_config.json"))
        if not known and gguf_file is None:
            raise ValueError(
                gguf.hint(path) or f"{name} is not a checkpoint: it holds neither config.json nor adapter_config.json"
            )
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"{name}: there is no such folder")


def load_config(
    name: str, gguf_file: str | None = None, *, trust_remote_code: bool
) -> tuple[PreTrainedConfig, config_record.Record | None]:
    """The stock config, and the record of the modifications if there is one."""
    try:
        return config_record.load_config(name, gguf_file=gguf_file, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        if Path(name, "config.json").is_file() and ("valid JSON" in str(error) or "Unrecognized model" in str(error)):
            raise ValueError(
                f"{name}: its config.json is damaged or no model's ({error}); fetch or save it again"
            ) from error
        raise


def stock_model(
    name: str,
    mods: list[Mod],
    *,
    gguf_file: str | None,
    dtype: str,
    attn_implementation: str | None,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """A model to put `mods` on: stock, complete, with every parameter from the checkpoint."""
    check_name(name, gguf_file)
    if adapters.is_adapter(name):
        raise ValueError(f"{name} is an adapter; merge it into its base and save that, then modify the result")
    config, found = load_config(name, gguf_file, trust_remote_code=trust_remote_code)
    if found is not None:
        kinds = ", ".join(mod.kind for mod in found.mods)
        raise ValueError(f"{name} is already modified ({kinds}); start from the stock model, with all you want")
    chosen = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    _check_fit(config, mods, trust_remote_code, chosen)
    if gguf_file is not None:
        return gguf.load(name, gguf_file, {"trust_remote_code": trust_remote_code}, dtype=dtype, **chosen).eval()
    with readable(name):
        model, report = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True, **chosen
        )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(f"{name} lacks {len(missing)} parameters of {type(model).__name__}, such as {missing[0]}")
    return model.eval()


def _check_fit(config: PreTrainedConfig, mods: list[Mod], trust_remote_code: bool, chosen: dict[str, str]) -> None:
    """An error, before any weights are fetched and read, for modifications that cannot stand on this model."""
    attach(skeleton(config, trust_remote_code=trust_remote_code, **chosen), mods)


def skeleton(config: PreTrainedConfig, *, trust_remote_code: bool, **chosen: str) -> PreTrainedModel:
    """The model without memory for its parameters, but with its rotary tables."""
    with without_memory_for_parameters():
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code, **chosen)


def modified_model(name: str, *, dtype: str, trust_remote_code: bool) -> nn.Module:
    """A modified model, from a checkpoint or an adapter folder."""
    check_name(name)
    with readable(name):
        return ropemods.from_pretrained(name, dtype=dtype, trust_remote_code=trust_remote_code)


@contextlib.contextmanager
def readable(name: str) -> Iterator[None]:
    """Say of which checkpoint a weights file is damaged."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{name}: a weights file is damaged ({error}); fetch or save it again") from error


def tokenizer_of(name: str, gguf_file: str | None = None, *, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a model, or in its GGUF file; None where there is none."""
    if gguf_file is not None:
        found = gguf.load_tokenizer(name, gguf_file, trust_remote_code=trust_remote_code)
        if found is not None:
            return found
    found = [cached_file(name, file, _raise_exceptions_for_missing_entries=False) for file in TOKENIZER_FILES]
    if not any(found):
        return None
    return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
