"""Generation that goes past the modified forward pass: refused before it begins, where it would be another model's."""

from __future__ import annotations

from typing import Any

from transformers import GenerationMixin

from ropemods.model.on_import import when_imported, wrap
from ropemods.model.wrappers import base_model, unwrapped


def watch_engines() -> None:
    wrap(GenerationMixin, "init_continuous_batching", _in_one_row)
    when_imported("trl.generation.vllm_generation", lambda module: wrap(module.VLLMGeneration, "__init__", _by_vllm))


def _in_one_row(stock: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    """An error within continuous batching would be logged, and what was generated until then returned."""
    attached = getattr(model, "ropemods_attached", None)
    if attached is not None and attached.bos_active:
        raise ValueError(
            "continuous batching puts parts of several sequences in one row, and the modifications of this model "
            "look for the BOS of each; generate without it (model.generate, or "
            "use_transformers_continuous_batching=False in TRL), or set their strength to 0"
        )
    return stock(model, *args, **kwargs)


def _by_vllm(stock: Any, engine: Any, model: Any, *args: Any, **kwargs: Any) -> None:
    """TRL hands weights to a vLLM that has its own attention, in a model made by the name in the config."""
    attached = getattr(base_model(unwrapped(model)), "ropemods_attached", None)
    if attached is not None:
        raise ValueError(
            f"use_vllm=True would sample from the model without {', '.join(map(str, attached.mods))}, and train this "
            "one on that; pass use_vllm=False, or train the stock checkpoint that ropemods.export(model, folder) "
            "writes, where the modifications can be exported"
        )
    stock(engine, model, *args, **kwargs)
