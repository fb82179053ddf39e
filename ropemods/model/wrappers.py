"""The model inside what is put around it: torch.compile, PEFT, DDP, a DeepSpeed engine, FSDP 1."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper or what torch.compile gives, or the model itself.

    Users name the model that they mean: a trainer's wrapper is refused. What trainers hand over is `unwrapped`.
    """
    inner = uncompiled(model)
    inner = uncompiled(inner.get_base_model()) if hasattr(inner, "get_base_model") else inner
    if not isinstance(inner, PreTrainedModel):
        name, wrapped = type(model).__name__, getattr(model, "module", None)
        if isinstance(wrapped, nn.Module):
            raise TypeError(f"this is a {name} around a {type(wrapped).__name__}; pass what it wraps: model.module")
        raise TypeError(f"expected a transformers model or a PEFT model around one, got {name}")
    return inner


def uncompiled(model: nn.Module) -> nn.Module:
    """The model that torch.compile was given: the same weights, and what is set on it holds for both."""
    # Its own child: PEFT's wrapper hands an attribute on to what it wraps, and would pass for a compiled model.
    return getattr(model, "_modules", {}).get("_orig_mod", model)


def unwrapped(model: nn.Module, *, to_call: bool = False) -> nn.Module:
    """The model inside what trainers put around it; PEFT's wrapper stays, which is the model that trains.

    `to_call` takes off only what can be taken off for a forward pass: within FSDP 1 the weights are pieces.
    """
    while not isinstance(model, PreTrainedModel):
        inner = uncompiled(model)
        if inner is model:
            callable_inside = isinstance(model, DistributedDataParallel) or type(model).__name__ == "DeepSpeedEngine"
            inner = getattr(model, "module", None) if callable_inside or not to_call else None  # type: ignore[assignment]
        if not isinstance(inner, nn.Module):
            return model
        model = inner
    return model
