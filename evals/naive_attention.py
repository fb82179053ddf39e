"""Attention calls of a modified model, recomputed row by row from what its stages say they do to one row.

What the contract in tests/ and the sweep over architectures hold fast paths against. No modification is known by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ropemods.attention import reference
from ropemods.attention.plain_row import PlainRow
from ropemods.model import attention_function
from ropemods.model.attention_layers import HIDDEN
from ropemods.model.model_inputs import SHARED
from ropemods.mods.base import Call, Layout


@dataclasses.dataclass
class RecordedCall:
    """What one layer was given and what it gave."""

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    options: dict[str, Any]
    module: nn.Module
    output: Tensor


@contextlib.contextmanager
def recorded(model: nn.Module) -> Iterator[list[RecordedCall]]:
    """Collect every attention call of the model while open."""
    calls: list[RecordedCall] = []
    backend = attention_function.backend_of(model)
    name = f"ropemods+{backend}"
    stock = attention_function.ALL_ATTENTION_FUNCTIONS[name]

    def record(module, query, key, value, attention_mask, **options):
        output, weights = stock(module, query, key, value, attention_mask, **dict(options))
        calls.append(RecordedCall(module.layer_idx, query, key, value, attention_mask, dict(options), module, output))
        return output, weights

    attention_function.AttentionInterface.register(name, record)
    try:
        yield calls
    finally:
        attention_function.AttentionInterface.register(name, stock)


@contextlib.contextmanager
def inputs_of(modules: list[nn.Module]) -> Iterator[list[tuple[nn.Module, tuple, dict[str, Any]]]]:
    """Collect what the modules are called with while open."""
    seen: list[tuple[nn.Module, tuple, dict[str, Any]]] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append((module, args, kwargs))

    handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def recompute(
    call: RecordedCall,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    backend: str,
    bos_BT: Tensor,
    rotary: tuple[Tensor, bool, int] | None,
    own: nn.Module | None = None,
) -> Tensor:
    """The layer's output (B, T, H, D) by the formulas, from fp64 query, key and value.

    `bos_BT` is the column of each query's BOS; `rotary` the frequencies, pairing and first channel of this layer; `own`
    the layer's stages with their parameters in fp64, where their gradients are wanted.
    """
    options = {name: each for name, each in call.options.items() if not name.startswith("ropemods")}
    rows = attention_function.rows_of(backend, call.module, query, key, value, attention_mask=call.mask, **options)
    index_T = torch.arange(query.shape[2]) + (key.shape[2] - query.shape[2])
    known = Call(
        bos_distance_BT=index_T - bos_BT,
        bos_is_self_BT=index_T == bos_BT,
        position_BT=index_T.expand_as(bos_BT),
        inv_freq_F=None if rotary is None else rotary[0],
        layout=None if rotary is None else Layout(*rotary[1:]),
        shared={name: each.double() for name, each in (call.options.get(SHARED) or {}).items()},
        hidden_BTC=call.options.get(HIDDEN),
    )
    own = getattr(call.module, "ropemods", None) if own is None else own
    stages = [] if own is None else [stage for _, stage in own.stages()]

    def fill(row: PlainRow) -> None:
        for stage in stages:
            stage.naive(row, known)

    return reference.attention(rows, fill, bos_BT).transpose(1, 2)
