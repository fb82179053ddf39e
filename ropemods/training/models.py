"""The model and tokenizer of a run: loaded, checked against the modifications, modified, wrapped by PEFT.

The check comes first and needs the config only: it builds the architecture without memory for its weights and attaches
the modifications to it, so a recipe that cannot work fails before anything is downloaded or trained.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

import ropemods
from ropemods.attach import attach
from ropemods.model import adapters, gguf
from ropemods.model.anatomy import anatomy_of
from ropemods.training.recipe import Recipe


@dataclass(frozen=True)
class Base:
    """What every arm starts from."""

    config: PreTrainedConfig
    tokenizer: Any
    bos: int
    """The token that sequences begin with."""
    bos_from: str


def find(recipe: Recipe) -> Base:
    """The base's config and tokenizer, and which token is BOS; the weights stay where they are."""
    options = recipe.options
    hub = {"revision": options.revision or "main"}
    if options.gguf_file is not None:
        config = gguf.load_config(options.model_name_or_path, options.gguf_file, **hub)
    else:
        config = AutoConfig.from_pretrained(options.model_name_or_path, **hub)
    if getattr(config, "ropemods", None) is not None:
        raise ValueError(
            f"{options.model_name_or_path} is already modified; a recipe starts from the stock model, so that the arms "
            "without modifications mean something"
        )
    check_mods(recipe, config)
    tokenizer = _tokenizer(recipe, hub)
    candidates = {
        "the recipe": options.bos_token_id,
        "the tokenizer": tokenizer.bos_token_id,
        "the model's config": config.get_text_config(decoder=True).bos_token_id,
    }
    found = [(place, token) for place, token in candidates.items() if token is not None]
    if not found:
        raise ValueError(
            f"neither the tokenizer nor the config of {options.model_name_or_path} names a BOS token; give "
            "bos_token_id, the token that the model was trained with at the start of texts"
        )
    place, bos = found[0]
    own = candidates["the model's config"]
    if recipe.lora is not None and bos != own and any(m.needs_bos for m in recipe.mods):
        raise ValueError(
            f"{place} says that sequences begin with token {bos}, and the config of {options.model_name_or_path} says "
            f"{own}. An adapter is loaded onto the base with the base's own config, so its "
            "modifications would look for another BOS; save a copy of the base with bos_token_id set in its config"
        )
    return Base(config, tokenizer, bos, place)


def _tokenizer(recipe: Recipe, hub: dict[str, Any]) -> Any:
    options = recipe.options
    if options.tokenizer_name_or_path is None and options.gguf_file is not None:
        found = gguf.load_tokenizer(options.model_name_or_path, options.gguf_file, **hub)
        if found is not None:
            return found
    return AutoTokenizer.from_pretrained(options.tokenizer_name_or_path or options.model_name_or_path, **hub)


def check_mods(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Raise what `apply` would raise for this architecture, without its weights."""
    if not recipe.mods:
        return
    config = copy.deepcopy(config)
    config._attn_implementation = recipe.options.attn_implementation
    text = config.get_text_config(decoder=True)
    if text.bos_token_id is None:
        text.bos_token_id = recipe.options.bos_token_id or 0  # a missing one is found out with the tokenizer
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    attach(model, list(recipe.mods))
    for mod in (mod for mod in recipe.mods if mod.edits_frequencies):
        for table in anatomy_of(model).tables:
            mod.frequencies(torch.ones(table.live().shape[-1]), 1.0)


def load(recipe: Recipe, base: Base) -> nn.Module:
    """The stock model, whole in this process."""
    options = recipe.options
    _forget_deepspeed()
    hub = {"revision": options.revision or "main"}
    chosen = {"dtype": options.dtype, "attn_implementation": options.attn_implementation}
    if options.gguf_file is not None:
        model = gguf.load(options.model_name_or_path, options.gguf_file, hub, **chosen)
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model_name_or_path, **hub, **chosen)
    model.config.get_text_config(decoder=True).bos_token_id = base.bos
    return model


def modified(recipe: Recipe, model: nn.Module, calibration_BT: Tensor, *, strength: float) -> nn.Module:
    """The same model with the recipe's modifications on it."""
    was_training = model.training
    model.eval()
    wanted = any(mod.calibrates for mod in recipe.mods)
    ropemods.apply(model, *recipe.mods, strength=strength, calibration=calibration_BT if wanted else None)
    return model.train(was_training)


def with_lora(recipe: Recipe, model: nn.Module, *, mods: bool) -> nn.Module:
    """The model in PEFT's wrapper, or as it is where the recipe trains everything."""
    if recipe.lora is None:
        return model
    from peft import LoraConfig, get_peft_model

    settings = {"task_type": "CAUSAL_LM", **recipe.lora}
    saved = list(settings.get("modules_to_save") or [])
    if mods and any(mod.must_be_saved for mod in recipe.mods) and "ropemods" not in saved:
        saved.append("ropemods")
    return get_peft_model(model, LoraConfig(**{**settings, "modules_to_save": saved or None}))


def reload(recipe: Recipe, base: Base, folder: Path, *, mods: bool, dtype: torch.dtype) -> nn.Module:
    """What was saved of a trained model, read back as a user would."""
    _forget_deepspeed()
    options = recipe.options
    if mods:
        beneath = options.gguf_file if adapters.is_adapter(folder) else None
        return ropemods.from_pretrained(
            folder, gguf_file=beneath, dtype=dtype, attn_implementation=options.attn_implementation
        )
    if adapters.is_adapter(folder):
        from peft import PeftModel

        return PeftModel.from_pretrained(load(recipe, base).to(dtype), str(folder))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=options.attn_implementation)


def reload_lines(folder: Path, *, mods: bool, lora: bool, gguf_file: str | None = None) -> str:
    """The Python that a user needs to load it, for the model card; an adapter needs its base's `gguf_file` again."""
    given = f'"{folder}"' if gguf_file is None or not lora else f'"{folder}", gguf_file="{gguf_file}"'
    tokenizer = f'tokenizer = AutoTokenizer.from_pretrained("{folder}")'
    if mods:
        return (
            "import ropemods as rm\nfrom transformers import AutoTokenizer\n\n"
            f"model = rm.from_pretrained({given})\n{tokenizer}"
        )
    cls = "AutoPeftModelForCausalLM" if lora else "AutoModelForCausalLM"
    package = "peft" if lora else "transformers"
    return (
        f"from {package} import {cls}\nfrom transformers import AutoTokenizer\n\n"
        f"model = {cls}.from_pretrained({given})\n{tokenizer}"
    )


def trainable(model: nn.Module) -> str:
    """peft's line: how many parameters train."""
    total = sum(p.numel() for p in model.parameters())
    train = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"trainable params: {train:,} || all params: {total:,} || trainable%: {100 * train / total:.4f}"


def _forget_deepspeed() -> None:
    """Load weights whole into each process.

    Once training arguments have named ZeRO-3, transformers would spread every model over the ranks as it loads; then no
    forward pass works before training begins, and calibration and measurement are such passes.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
