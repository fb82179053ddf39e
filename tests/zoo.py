"""Tiny models of ten architectures, chosen for what their attention does differently, made on the spot."""

from __future__ import annotations

import copy
import functools

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

BOS, VOCAB, LENGTH = 1, 61, 12

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "bos_token_id": BOS,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [2.0, 2.2, 2.6, 3.2],
    "original_max_position_embeddings": 8,
}
THETA = {"rope_type": "default", "rope_theta": 100.0}

# A small θ and windows shorter than LENGTH, so that low frequencies and windows matter at this size.
ARCHITECTURES: dict[str, dict] = {
    "llama": {"rope_parameters": THETA},
    "mistral": {"rope_parameters": THETA, "sliding_window": 4},
    "qwen2": {"rope_parameters": THETA, "head_dim": None},
    "qwen3": {"rope_parameters": THETA},
    "gemma2": {
        "rope_parameters": THETA,
        "sliding_window": 4,
        "attn_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 8,
    },
    "gemma3_text": {
        "sliding_window": 4,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 200.0, "factor": 2.0},
        },
    },
    "phi3": {"rope_parameters": LONGROPE, "head_dim": None},
    "gpt_neox": {
        "rope_parameters": THETA | {"partial_rotary_factor": 0.5},
        "head_dim": None,
        "num_key_value_heads": None,
        "use_parallel_residual": True,
    },
    "olmo2": {"rope_parameters": THETA, "head_dim": None},
    "glm4": {"rope_parameters": THETA | {"partial_rotary_factor": 0.5}},
}
EAGER_ONLY = {"gemma2"}
"""transformers itself refuses SDPA for models with a soft cap."""

ROPE_SCALINGS = {
    "linear": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 100.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": LONGROPE,
}


def build(
    architecture: str = "llama", backend: str = "sdpa", *, dtype: torch.dtype = torch.float32, **changes
) -> PreTrainedModel:
    """A model in evaluation mode, with weights large enough that attention is far from uniform."""
    model = copy.deepcopy(_built(architecture, backend, _frozen(changes)))
    return model.to(dtype)


def deep(backend: str = "sdpa", *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """As many layers as a real model has, and no wider than the others here."""
    return build("llama", backend, dtype=dtype, num_hidden_layers=28)


def _frozen(changes: dict) -> str:
    import json

    return json.dumps(changes, sort_keys=True)


@functools.cache
def _built(architecture: str, backend: str, changes: str) -> PreTrainedModel:
    import json

    options = COMMON | ARCHITECTURES[architecture] | json.loads(changes)
    options = copy.deepcopy({k: v for k, v in options.items() if v is not None})
    config = AutoConfig.for_model(architecture, attn_implementation=backend, **options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.25)
            elif "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=0.1)
    return model


def pairs() -> list[tuple[str, str]]:
    """Every architecture with every backend that transformers allows it."""
    return [(a, b) for a in ARCHITECTURES for b in ("eager", "sdpa") if not (b == "sdpa" and a in EAGER_ONLY)]


def tokens(rows: int = 2, length: int = LENGTH, *, seed: int = 0) -> torch.Tensor:
    """Random tokens behind a BOS."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    ids[:, 0] = BOS
    return ids
