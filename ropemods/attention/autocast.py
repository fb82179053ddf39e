"""Autocast, as `scaled_dot_product_attention` has it: queries, keys and values are cast once, to one dtype.

Under autocast a layer's queries and keys come out of RoPE in fp32 and its values out of a projection in half precision.
torch casts all three for the operators on its list, and kernels called by name and operators of our own are not on it.
So an attention call is cast here and then runs without autocast, as in a model whose weights are of that dtype: what
`rows` says is accumulated wide is then wide, which autocast's matrix products are not.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def _dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast is on for; None where it is off, or where torch has none for such a device."""
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype; as they are where it is off, and those in fp64 always, as torch leaves them."""
    dtype = _dtype(tensors[0].device)
    return tensors if dtype is None else tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def suspended(device: torch.device) -> contextlib.AbstractContextManager:
    """While open, autocast is off for that kind of device."""
    return contextlib.nullcontext() if _dtype(device) is None else torch.autocast(device.type, enabled=False)
