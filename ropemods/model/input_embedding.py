"""The hook behind the input embedding, through which what modifications put at the BOS reaches the model.

It stands behind whatever the model embeds tokens with: under PEFT that is an adapter around the embedding, and what the
adapter adds (or puts in the embedding's place) comes before the hook, so the promised vector stands at the BOS all the
same, and merging the adapter does not move it. An adapter may be put on and taken off after `apply`; `follow` is called
as the model is (`ropemods.model.unchanged`), and takes the hook to where the adapter now is.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling
from transformers import PreTrainedModel

from ropemods.mods.base import Table


def install(model: PreTrainedModel) -> None:
    """Hook what the model embeds tokens with now."""
    embedding = model.get_input_embeddings()
    for inner in embedding.modules():  # PEFT copies modules with their hooks, and only the outermost is to act
        _unhook(inner)
    embedding.register_forward_hook(_after, with_kwargs=True)
    model.ropemods_embedding = [embedding]  # in a list, so that it is no second name of a submodule


def uninstall(model: PreTrainedModel) -> None:
    for module in model.modules():
        _unhook(module)


def _unhook(module: nn.Module) -> None:
    for key in [key for key, hook in module._forward_hooks.items() if hook is _after]:
        module._forward_hooks.pop(key)
        module._forward_hooks_with_kwargs.pop(key, None)


def follow(model: PreTrainedModel) -> None:
    """See to it that the hook stands behind the embedding that the model has now, or refuse that embedding."""
    embedding = model.get_input_embeddings()
    if embedding is model.ropemods_embedding[0]:
        return
    if stages_of(embedding) is None:
        kinds = ", ".join(kind for kind, _ in stages_of(model.ropemods_embedding[0]).named_children())
        raise ValueError(
            f"the input embedding of this model was replaced after ropemods.apply, by a {type(embedding).__name__} on "
            f"which {kinds} does not stand, so the model would run without it; put the old one back, or "
            "ropemods.remove(model), set the new embedding, and apply again"
        )
    if is_compiling():  # hooks cannot be moved while a graph is traced
        raise ValueError(
            "an adapter was put around the input embedding, or taken off it, after ropemods.apply, and the first call "
            "since then is a compiled one; call the model once before you compile it"
        )
    install(model)


def stages_of(embedding: nn.Module) -> Any:
    """The stages of the input embedding, from inside the adapters around it; None where there are none."""
    stages = getattr(embedding, "ropemods", None)
    for name in ("base_layer", "original_module"):
        if stages is None and isinstance(inner := getattr(embedding, name, None), nn.Module):
            stages = stages_of(inner)
    return stages


def _after(embedding: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
    ids = args[0] if args else kwargs["input"]
    weight = embedding.weight
    assert isinstance(weight, Tensor)
    return stages_of(embedding)(output, ids, Table(weight.shape[0], embedding.forward))


def without_adapters(embedding: nn.Module) -> nn.Module:
    """The model's own embedding, inside the adapters that may be around it."""
    for name in ("base_layer", "original_module"):
        if isinstance(inner := getattr(embedding, name, None), nn.Module):
            return without_adapters(inner)
    return embedding
