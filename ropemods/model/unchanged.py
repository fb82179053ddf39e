"""Whether a model still is as `apply` left it, asked each time it is called.

transformers and PEFT let a model be changed at any time: another attention implementation, another input embedding, an
adapter around it. What would take a modification off without a word is an error at the next forward pass, and what can
be followed exactly is followed. The question compares a few identities and names. Under torch.compile it is traced with
the model, and what it reads becomes a guard of the compiled graph, so it is asked again when the answer has changed.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from ropemods.model import attention_function, input_embedding
from ropemods.model.anatomy import anatomy_of


def watch(model: PreTrainedModel, layers: Sequence[nn.Module]) -> list:
    """Ask from now on, about `layers` that must call ropemods' attention; returns what ends it."""
    model.ropemods_forwards = {type(layer): type(layer).forward for layer in anatomy_of(model).layers}
    model.ropemods_configs = list({id(layer.config): layer.config for layer in layers}.values())
    for entrance in anatomy_of(model).entrances:
        entrance.ropemods_watched = [model]
    return [entrance.register_forward_pre_hook(_before) for entrance in anatomy_of(model).entrances]


def _before(entrance: nn.Module, args: tuple) -> None:
    check(entrance.ropemods_watched[0])  # type: ignore[index]


def check(model: PreTrainedModel) -> None:
    """An error where something was changed under the modifications of a model."""
    wanted = attention_function.PREFIX + model.ropemods_attached.backend
    for config in model.ropemods_configs:
        found = config._attn_implementation
        if not (isinstance(found, str) and found.startswith(attention_function.PREFIX) and found == wanted):
            raise ValueError(
                f"the attention implementation of this model was set to {str(found)!r} after ropemods.apply, which put "
                f"its modifications of attention scores on {wanted!r}; any other runs without them, or without the "
                f"checks that apply made. Set it back with model.set_attn_implementation({wanted!r}); to go on with "
                "another one, save_pretrained and load with ropemods.from_pretrained(path, attn_implementation=...)"
            )
    for layer, forward in model.ropemods_forwards.items():
        if layer.forward is not forward:
            raise ValueError(
                f"the forward pass of {layer.__name__} was replaced after ropemods.apply, and goes around the "
                "modifications; frameworks that put their own attention in its place, as unsloth does, cannot be used "
                "with them"
            )
    if hasattr(model, "ropemods_embedding"):
        input_embedding.follow(model)
