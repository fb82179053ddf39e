"""The terms of `rows` on torch's FlexAttention, for GPUs where our kernels do not fit.

The BOS column, biases and the soft cap are a score function, what a row may see is a block mask, β is on the queries,
and slots are joined by the log-sum-exp that FlexAttention returns. An entropy scale costs a second call, which
reads the mean key of each row: E = scale · ⟨q, Attn(q, k, k)⟩ and H = lse − E, as in `flash`.

FlexAttention is compiled on first use. For CPUs torch compiles it without the log-sum-exp and has no backward, so that
`paths` offers it on GPUs only; uncompiled, its forward is tested everywhere.

Shapes: B batch, H query heads, G key/value heads, T queries, S keys, D head dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

from ropemods.attention import slots
from ropemods.attention.column_entropy import with_column
from ropemods.attention.rows import Rows, own_column, scaled, soft_capped, with_beta

BLOCK = 128


def entropy(rows: Rows, *, compiled: bool = True) -> Tensor:
    """H of every row as its entropy scale reads it."""
    rows = scaled(rows)
    q, k, column = rows.q_BHTD, rows.k_BGSD, rows.column
    without = rows if column is None else rows._replace(column=column.closed())
    mean_key, lse = _call(without._replace(v_BGSD=k), close_all=True, compiled=compiled)
    empty = lse == float("-inf")
    mean_logit = rows.scale * (q.to(lse.dtype) * mean_key.to(lse.dtype)).sum(-1)
    return with_column(rows, lse, torch.where(empty, 0.0, lse - mean_logit))


def attend(rows: Rows, *, compiled: bool = True) -> tuple[Tensor, Tensor]:
    """Returns out_BHTD and the log of the denominator (B, H, T)."""
    if rows.entropy_scale is not None:
        rows = with_beta(rows, entropy(rows, compiled=compiled))
    rows = scaled(rows)
    out, lse = _call(rows, close_all=False, compiled=compiled)
    return slots.joined(out, lse, slots.together(rows.slots, rows.q_BHTD, lse.dtype))


def _call(rows: Rows, *, close_all: bool, compiled: bool) -> tuple[Tensor, Tensor]:
    """out and lse; `close_all` hides the BOS column from every row, the BOS's own too."""
    q, k = rows.q_BHTD, rows.k_BGSD
    function = _compiled() if compiled else torch_flex.flex_attention
    out, aux = function(
        q,
        k,
        rows.v_BGSD,
        score_mod=_score(rows, close_all),
        block_mask=_block_mask(rows),
        scale=rows.scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=torch_flex.AuxRequest(lse=True),
    )
    return out, aux.lse


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(torch_flex.flex_attention)


def _score(rows: Rows, close_all: bool) -> Callable[..., Tensor] | None:
    cap, column, mask = rows.softcap, rows.column, rows.mask
    adds = mask if mask is not None and mask.dtype != torch.bool else None
    if cap is None and column is None and adds is None and rows.offset_bias is None and rows.key_bias is None:
        return None
    if adds is not None:
        adds = adds.expand(rows.q_BHTD.shape[0], rows.q_BHTD.shape[1], *adds.shape[-2:])
    if column is not None:
        logit = torch.full_like(column.logit_BHT, float("-inf")) if close_all else column.weighed()
        is_bos = column.is_bos_BS.expand(rows.q_BHTD.shape[0], -1)
    if rows.offset_bias is not None:
        own_BT = own_column(rows).expand(rows.q_BHTD.shape[0], -1)
        factor_HO, added_HO = (x.expand(rows.q_BHTD.shape[1], -1) for x in rows.offset_bias)
    if rows.key_bias is not None:
        bias_BHS = rows.key_bias.bias_BHS.expand(*rows.q_BHTD.shape[:2], -1)

    def score(value: Tensor, b: Tensor, h: Tensor, q: Tensor, s: Tensor) -> Tensor:
        value = soft_capped(value, cap)
        if column is not None:
            value = torch.where(is_bos[b, s], logit[b, h, q].to(value.dtype), value)
        if rows.offset_bias is not None:
            offset = torch.clamp(own_BT[b, q] - s, min=0)
            value = value * factor_HO[h, offset] + added_HO[h, offset]
        if rows.key_bias is not None:
            value = value + bias_BHS[b, h, s]
        return value if adds is None else value + adds[b, h, q, s]

    return score


def _block_mask(rows: Rows) -> Any:
    """What a row may see, in blocks; for causal rows without a mask written down directly, (T / 128)² numbers."""
    (batch, _, queries, _), keys, device = rows.q_BHTD.shape, rows.k_BGSD.shape[2], rows.q_BHTD.device
    if rows.mask is not None and rows.mask.dtype == torch.bool:
        mask = rows.mask.expand(batch, rows.mask.shape[1], queries, keys)
        heads = mask.shape[1]

        def sees(b: Tensor, h: Tensor, q: Tensor, s: Tensor) -> Tensor:
            return mask[b, h if heads > 1 else 0, q, s]

        return torch_flex.create_block_mask(
            sees, batch, heads if heads > 1 else None, queries, keys, device=str(device), BLOCK_SIZE=BLOCK
        )
    if not rows.causal:
        return None
    count = -(-queries // BLOCK)
    number = torch.arange(count, device=device, dtype=torch.int32)
    whole = number.expand(1, 1, count, count)
    return torch_flex.BlockMask.from_kv_blocks(
        torch.ones(1, 1, count, dtype=torch.int32, device=device),
        number.view(1, 1, count, 1).expand(1, 1, count, count).contiguous(),
        number.view(1, 1, count),
        whole.contiguous(),
        BLOCK_SIZE=BLOCK,
        mask_mod=_causal,
        seq_lengths=(queries, keys),
    )


def _causal(b: Tensor, h: Tensor, q: Tensor, s: Tensor) -> Tensor:
    return q >= s
