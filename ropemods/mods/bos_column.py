"""The BOS column as modifications score it: apart from the other keys, at its natural logit until one says another."""

from __future__ import annotations

import torch
from torch import Tensor

from ropemods.attention.rows import Rows, dot_with_bos, soft_capped
from ropemods.attention.terms import Column
from ropemods.mods.base import Call


def with_bos_column(rows: Rows, call: Call) -> Rows:
    """`rows` with the BOS column scored apart, at its natural logit where no earlier stage has scored it."""
    if rows.column is not None:
        return rows
    if call.bos_column_BN is None or call.bos_is_self_BT is None:
        raise RuntimeError(
            "an attention layer was not told where its BOS tokens are: the model does not hand keyword arguments "
            "down to its attention layers, or the layer was called on its own; call the whole model"
        )
    column_BN, keys = call.bos_column_BN, rows.k_BGSD.shape[2]
    batch = rows.q_BHTD.shape[0]
    # A BOS that has left the cache (a negative column) is marked one past the end, which is then cut off.
    marks = torch.zeros(batch, keys + 1, dtype=torch.bool, device=column_BN.device)
    marks = marks.scatter(1, torch.where(column_BN < 0, keys, column_BN).expand(batch, -1), True)
    column = Column(
        is_bos_BS=marks[:, :keys],
        is_self_BT=call.bos_is_self_BT,
        logit_BHT=soft_capped(dot_with_bos(rows.q_BHTD, bos_key(rows, call), rows.scale), rows.softcap),
        log_weight=torch.zeros((), device=rows.q_BHTD.device),
    )
    return rows.plus(column)


def bos_key(rows: Rows, call: Call) -> Tensor:
    """The key of each query's BOS (B, G, N, D)."""
    batch, groups, _, dim = rows.k_BGSD.shape
    assert call.bos_column_BN is not None
    index = call.bos_column_BN.clamp(min=0)[:, None, :, None].expand(batch, groups, -1, dim)
    return rows.k_BGSD.gather(2, index)
