"""Every causal language model that the installed transformers ships, at a size that runs in milliseconds.

The types come from transformers' own table, and their configs from `tiny_configs`; nothing here knows a model by name.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from evals.tiny_configs import BOS, LENGTH, VOCAB, small


def causal_types() -> list[str]:
    """Every model type that transformers lists for causal language modelling."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def source(model_type: str) -> str:
    """The modeling files that define the type's class, as text: nothing is imported."""
    entry = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    name = entry if isinstance(entry, str) else entry[0]
    folder = Path(inspect.getfile(transformers)).parent / "models" / model_type_to_module_name(model_type)
    texts = [path.read_text() for path in sorted(folder.glob("modeling_*.py"))]
    return "".join(text for text in texts if f"class {name}(" in text)


def rope_types() -> list[str]:
    """Those whose modeling file initialises its frequencies by transformers' shared table."""
    return [kind for kind in causal_types() if "ROPE_INIT_FUNCTIONS" in source(kind)]


def uses_interface(model_type: str) -> bool:
    return "ALL_ATTENTION_FUNCTIONS" in source(model_type)


def own_rope_types() -> list[str]:
    """Rotary models that make their frequencies themselves."""
    rotary = re.compile(r"inv_freq|rotary", re.IGNORECASE)
    return [k for k in causal_types() if rotary.search(source(k)) and "ROPE_INIT_FUNCTIONS" not in source(k)]


def config_of(model_type: str) -> PreTrainedConfig:
    """The type's default config, made small."""
    if model_type not in CONFIG_MAPPING:
        raise LookupError(f"transformers has no config class for {model_type}")
    return small(CONFIG_MAPPING[model_type])


def build(model_type: str, backend: str | None = None) -> PreTrainedModel:
    """A model of the type in evaluation mode, with weights large enough that attention is far from uniform."""
    return from_config(config_of(model_type), backend)


def from_config(config: PreTrainedConfig, backend: str | None = None) -> PreTrainedModel:
    if getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None) is not None:
        backend = "eager"  # some versions of transformers run soft-capped models on kernels without the cap
    options = {} if backend is None else {"attn_implementation": backend}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32, **options).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1 and "norm" not in name:
                fan_in = parameter.shape[-1] if parameter.ndim == 2 else max(parameter.shape[-2:])
                parameter.copy_(noise * 1.4 / fan_in**0.5 if "embed" not in name else noise)
            else:
                parameter.add_(0.1 * noise)
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0  # as training leaves it, and some classes set it on loading
    return model


def tokens(rows: int = 2, length: int = LENGTH, *, seed: int = 0) -> torch.Tensor:
    """Random tokens behind a BOS."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    ids[:, 0] = BOS
    return ids


def package_of(model_type: str) -> Any:
    return importlib.import_module(f"transformers.models.{model_type_to_module_name(model_type)}")
