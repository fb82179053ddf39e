"""Which keys each query sees, as one run of neighbours: keys first_i … past_i − 1.

Causal attention, sliding windows, padding on either side and packed sequences all are such runs, so the kernels know
of nothing else (but an explicit mask, which may hide more), skip the keys outside a block's runs, and need two numbers
a query where a mask needs one a key. An empty run is a query that sees nothing.

Shapes: B batch (1 where all rows of a batch are alike), T queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Spans(NamedTuple):
    first_BT: Tensor
    past_BT: Tensor
    """One past the last key that is seen. Both int32."""


def spans(
    queries: int,
    keys: int,
    *,
    causal: bool = True,
    offset: int = 0,
    window: int | None = None,
    first_key_B: Tensor | None = None,
    past_key_B: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Spans:
    """Query i stands at key i + `offset`. It sees itself and what is before it (all keys unless `causal`), of which
    the nearest `window`, and of each sequence only the keys from `first_key` to before `past_key`: the rest is padding.
    """
    if window is not None and window < 1:
        raise ValueError(f"a window must hold one key or more, not {window}")
    position = torch.arange(queries, device=device, dtype=torch.int32)[None] + offset
    past = (position + 1).clamp(0, keys) if causal else torch.full_like(position, keys)
    first = torch.zeros_like(position) if window is None else (position + 1 - window).clamp(0, keys)
    if first_key_B is not None:
        first = torch.maximum(first, first_key_B.to(torch.int32)[:, None])
    if past_key_B is not None:
        past = torch.minimum(past, past_key_B.to(torch.int32)[:, None])
    return Spans(*(x.contiguous() for x in torch.broadcast_tensors(first, past)))


def packed_spans(lengths: Sequence[int], *, window: int | None = None, device: torch.device | str = "cpu") -> Spans:
    """Sequences one behind the other in a single row, each causal and blind to the others."""
    total = sum(lengths)
    starts = torch.tensor([sum(lengths[:i]) for i in range(len(lengths))], dtype=torch.int32, device=device)
    start_T = starts.repeat_interleave(torch.tensor(lengths, device=device), output_size=total)
    causal = spans(total, total, window=window, device=device)
    return Spans(torch.maximum(causal.first_BT, start_T[None]), causal.past_BT)
