"""Where the BOS of a cache's rows stand, remembered on the cache, and kept in step with its rows.

Beam search and the like reorder, select and repeat the rows of a cache between two calls of the model. A cache offers
no extension point for what goes along with its keys, so these methods of transformers' `Cache` are wrapped, once;
for a cache on which nothing is remembered the wrappers do nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from transformers.cache_utils import Cache

from ropemods.model.bos import Memory
from ropemods.model.on_import import wrap

REMEMBERED = "_ropemods_bos"


def recall(cache: Any) -> Memory | None:
    return getattr(cache, REMEMBERED, None)


def remember(cache: Any, memory: Memory) -> None:
    """For a static cache in the tensors that were there, as its own length is, which a CUDA graph needs."""
    before = recall(cache)
    static = getattr(cache, "is_compileable", False)
    if static and before is not None and before.column_B1.shape == memory.column_B1.shape:
        for old, new in zip(before, memory, strict=True):
            old.copy_(new)
        return
    if static and not is_compiling():
        for tensor in memory:
            torch._dynamo.mark_static_address(tensor)
    setattr(cache, REMEMBERED, memory)


def _on(rows: Tensor, index: Tensor) -> Tensor:
    return index.to(rows.device) if isinstance(index, Tensor) else index


CHANGES: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "reorder_cache": lambda rows, beam_idx: rows.index_select(0, _on(rows, beam_idx)),
    "batch_select_indices": lambda rows, indices: rows[_on(rows, indices)],
    "batch_repeat_interleave": lambda rows, repeats: rows.repeat_interleave(repeats, dim=0),
}


def follow_caches() -> None:
    """See to it that what is remembered of a cache's rows follows them."""
    for name, change in CHANGES.items():
        wrap(Cache, name, functools.partial(_followed, change))


def _followed(change: Callable[[Tensor, Any], Tensor], stock: Callable, cache: Cache, argument: Any) -> None:
    stock(cache, argument)
    memory = recall(cache)
    if memory is not None:
        setattr(cache, REMEMBERED, memory.rows(lambda rows: change(rows, argument)))
