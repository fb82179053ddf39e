"""The same weights run a little differently, for as long as a context is open: interventions on position 0, and twins.

Position 0 attends only to itself, so a vector put there at the input, or in front of a block, drives a trajectory of
its own from there on. A twin is the model with its sliding windows or its rope scaling switched off.

Shapes: B batch, T tokens, E hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ropemods.model.anatomy import anatomy_of
from ropemods.model.observation import Observation
from ropemods.model.partition import gathered
from ropemods.model.wrappers import base_model


@torch.no_grad()
def embedded(model: nn.Module, ids: list[int]) -> Tensor:
    """What the input embedding itself gives for tokens (N, E)."""
    embedding = base_model(model).get_input_embeddings()
    with gathered(embedding):
        weight: Any = embedding.weight
        return embedding.forward(torch.tensor(ids, device=weight.device))


@torch.no_grad()
def mean_embedding(model: nn.Module) -> Tensor:
    """The mean over the vocabulary, (E), taken in pieces."""
    embedding = base_model(model).get_input_embeddings()
    with gathered(embedding):
        weight: Any = embedding.weight
        ids = torch.arange(weight.shape[0], device=weight.device)
        total = torch.stack([embedding.forward(part).double().sum(0) for part in ids.split(4096)]).sum(0)
        return (total / len(ids)).to(weight.dtype)


@contextlib.contextmanager
def at_input(model: nn.Module, vector_E: Tensor) -> Iterator[None]:
    """Put a vector at position 0 of every sequence, in place of the token's embedding."""

    def replace(module: nn.Module, args: tuple[Any, ...], output_BTE: Tensor) -> Tensor:
        return _with_first(output_BTE, vector_E)

    # Registered last, so it also comes after what a modification puts there.
    handle = base_model(model).get_input_embeddings().register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def at_block(observation: Observation, layer: int, state_E: Tensor) -> Iterator[None]:
    """Put a state at position 0 of what enters one block."""
    with _before_blocks(observation, lambda n, hidden: _with_first(hidden, state_E) if n == layer else hidden):
        yield


@torch.no_grad()
def first_states(observation: Observation, run: Callable[[], Any]) -> list[Tensor]:
    """What enters each block at position 0 of the first sequence while `run()` runs the model, [L] of (E)."""
    states: dict[int, Tensor] = {}

    def keep(layer: int, hidden_BTE: Tensor) -> Tensor:
        states[layer] = hidden_BTE[0, 0].clone()
        return hidden_BTE

    with _before_blocks(observation, keep):
        run()
    return [states[layer] for layer in range(len(observation.names))]


def _with_first(hidden_BTE: Tensor, state_E: Tensor) -> Tensor:
    first = state_E.to(hidden_BTE).expand_as(hidden_BTE[:, :1])
    return torch.cat((first, hidden_BTE[:, 1:]), dim=1)


@contextlib.contextmanager
def _before_blocks(observation: Observation, change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """`change(layer, hidden)` on what enters the module that holds each attention layer."""
    handles = []

    def hook(layer: int) -> Callable[..., Any]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (change(layer, args[0]), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": change(layer, kwargs["hidden_states"])}

        return before

    try:
        for layer, name in enumerate(observation.names):
            block = observation.model.get_submodule(name.rpartition(".")[0])
            handles.append(block.register_forward_pre_hook(hook(layer), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def window_of(model: PreTrainedModel) -> int | None:
    """The model's sliding window; None where it has none."""
    window = getattr(model.config.get_text_config(decoder=True), "sliding_window", None)
    in_use = getattr(model.config.get_text_config(decoder=True), "use_sliding_window", True)
    return window if in_use else None


@contextlib.contextmanager
def without_window(model: PreTrainedModel, length: int) -> Iterator[None]:
    """Every layer sees all earlier keys, for sequences of up to `length` tokens."""
    config = model.config.get_text_config(decoder=True)
    before = config.sliding_window
    config.sliding_window = length  # a window as long as the sequence hides nothing
    try:
        yield
    finally:
        config.sliding_window = before


def scaled_rope(model: PreTrainedModel) -> bool:
    """Whether any of the model's rotary tables is other than the plain θ ladder."""
    return any(table.rope_type != "default" for table in anatomy_of(model).tables)


@contextlib.contextmanager
def without_rope_scaling(model: PreTrainedModel) -> Iterator[None]:
    """Every rotary table is the plain ladder θ^(−k/F), unscaled, at any length."""
    saved: list[Callable[[], None]] = []
    if any(table.own_init is not None for table in anatomy_of(model).tables):
        raise ValueError(
            f"{type(model).__name__} reads its rope scaling from the config in each pass, so a twin without it cannot "
            "be made in place; leave the intervention 'rope_scaling' out"
        )
    try:
        for table in anatomy_of(model).tables:
            module: Any = table.module
            parameters = module.config.rope_parameters
            parameters = parameters if table.layer_type is None else parameters[table.layer_type]
            live, scaling = table.live(), f"{table.prefix}attention_scaling"
            F = live.shape[-1]
            ladder = parameters["rope_theta"] ** (-torch.arange(F, dtype=torch.float64, device=live.device) / F)
            saved.append(_restore(table, live.clone(), scaling, getattr(module, scaling), table.rope_type))
            live.copy_(ladder)
            setattr(module, scaling, 1.0)
            table.rope_type = "default"  # dynamic and longrope tables recompute themselves as sequences grow
        yield
    finally:
        for restore in saved:
            restore()


def _restore(table: Any, live: Tensor, scaling: str, value: float, rope_type: str) -> Callable[[], None]:
    def restore() -> None:
        table.live().copy_(live)
        setattr(table.module, scaling, value)
        table.rope_type = rope_type

    return restore
