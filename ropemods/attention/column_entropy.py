"""The BOS column joined to statistics that were taken without it.

Let the other keys have log-sum-exp lse and entropy H, and the column logit b (weight included). It takes the share
p = σ(b − lse), and a choice made in two steps, column or not and then which key, has the entropy

    H' = p · (−log p) + (1 − p) · (−log(1 − p) + H)

Shapes: B batch, H query heads, T queries, S keys.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ropemods.attention.rows import Rows


def without_column(rows: Rows) -> Tensor | None:
    """The mask of `rows`, and the BOS column hidden."""
    if rows.column is None:
        return rows.mask
    is_bos = rows.column.is_bos_BS[:, None, None, :]
    if rows.mask is None:
        return ~is_bos
    if rows.mask.dtype == torch.bool:
        return rows.mask & ~is_bos
    return rows.mask.masked_fill(is_bos, float("-inf"))


def with_column(rows: Rows, lse: Tensor, others: Tensor) -> Tensor:
    """H of every row as its entropy scale reads it, from the statistics of the keys other than the BOS."""
    assert rows.entropy_scale is not None
    if rows.column is None:
        return others
    column = rows.column.closed() if rows.entropy_scale.spares_column else rows.column
    return _joined(lse, others, column.weighed().to(lse.dtype) + _reach(rows))


def _reach(rows: Rows) -> Tensor:
    """What the mask adds to the BOS logit of each row (B, 1 or H, T): 0, or -inf where the row does not see its BOS."""
    assert rows.column is not None
    is_bos = rows.column.is_bos_BS[:, None, None, :]
    if rows.mask is not None and rows.mask.dtype != torch.bool:
        return rows.mask.masked_fill(~is_bos, float("-inf")).amax(-1)
    if rows.mask is not None:
        sees = (rows.mask & is_bos).any(-1)
    elif rows.causal:
        sees = rows.column.is_bos_BS.cummax(-1).values[:, None, : rows.q_BHTD.shape[2]]
    else:
        sees = is_bos.any(-1)
    return torch.where(sees, 0.0, float("-inf"))


def _joined(lse: Tensor, entropy: Tensor, logit: Tensor) -> Tensor:
    closed, alone = logit == float("-inf"), lse == float("-inf")
    # Rows that have only one of the two are chosen below; here they only have to stay finite, gradients too.
    ahead = torch.where(closed, 0.0, logit) - torch.where(alone, 0.0, lse)
    joined = torch.sigmoid(ahead) * softplus(-ahead) + torch.sigmoid(-ahead) * (softplus(ahead) + entropy)
    return torch.where(closed | alone, entropy, joined)
