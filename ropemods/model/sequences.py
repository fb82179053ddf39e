"""The sequences of a batch: the stretches of its rows that read nothing but themselves, from their first token on.

Rows may be padded on either side, or packed with position_ids that restart.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ropemods.model import bos


def runs_of(model: PreTrainedModel, given: dict[str, Any], *, least: int) -> list[tuple[int, int, int]]:
    """(row, first column, length) of every stretch of the batch, of `least` tokens or more, that is one sequence."""
    tokens = given.get("input_ids")
    tokens = given["inputs_embeds"] if tokens is None else tokens
    (B, T), mask, positions = tokens.shape[:2], given.get("attention_mask"), given.get("position_ids")
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        raise ValueError(
            "the model was called with a prepared attention mask, so which tokens of a row belong together is unknown "
            "to the penalty; pass the mask of padding (B, T), or position_ids that restart"
        )
    positions = positions if isinstance(positions, Tensor) and positions.ndim == 2 else None
    if mask is not None and mask.shape[1] != T:
        raise ValueError(f"the penalty needs whole sequences: {T} tokens with an attention_mask of {mask.shape[1]}")
    if positions is None and (mask is None or bool(mask.all())):
        return [(row, 0, T) for row in range(B)] if least <= T else []
    index = torch.arange(T).expand(B, T)
    seen_BT = torch.ones(B, T, dtype=torch.bool) if mask is None else mask.cpu().bool()
    if (seen_BT[:, 1:] & ~seen_BT[:, :-1]).sum(1).add(seen_BT[:, 0]).gt(1).any():
        raise ValueError("an attention_mask with holes in a row leaves no whole sequence for the penalty to read")
    positions = None if positions is None else positions.cpu().expand(B, T)
    if positions is not None and mask is None and not _caches(model, given):
        column = bos.by_positions(positions)
    elif positions is not None and bos.restarts(positions, seen_BT).any():
        raise ValueError(bos.APART)
    else:
        column = bos.by_padding(seen_BT, T)
    first_BT = seen_BT & (column == index)
    found = []
    for row, column in first_BT.nonzero().tolist():
        later = first_BT[row, column + 1 :].nonzero()
        stop = column + 1 + int(later[0]) if len(later) else T
        length = int(seen_BT[row, column:stop].sum())
        if length >= least:
            found.append((row, column, length))
    return found


def _caches(model: PreTrainedModel, given: dict[str, Any]) -> bool:
    asked = given.get("use_cache")
    asked = model.config.get_text_config().use_cache if asked is None else asked
    return bool(asked) or given.get("past_key_values") is not None
