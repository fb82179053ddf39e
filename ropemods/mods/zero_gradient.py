"""The gradient of positions that are exactly zero, for modifications that make them (`Mod.zeroes_states`).

`ropemods.model.zero_states` says why they are given none; a stage of the input embedding cuts what it makes, the layers
what they hand on.
"""

from __future__ import annotations

import torch
from torch import Tensor


def without_gradient(hidden: Tensor) -> Tensor:
    """The same values, and no gradient where every channel of a position is zero."""
    if not (torch.is_grad_enabled() and hidden.requires_grad):
        return hidden
    return torch.where((hidden == 0).all(-1, keepdim=True), hidden.detach(), hidden)
