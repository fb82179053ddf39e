"""The terms of `rows` on fused kernels, in O(T) memory: whichever `paths` says; here by torch's stock kernels.

- An **entropy scale** is one entropy call (by `flash`, or our own in Triton) and then a row scale.
- A **row scale** is a factor on the queries.
- **Slots** are joined to the kernel's output by its log-sum-exp (`slots`).
- The **BOS column** is scored apart by widening the head: the BOS key's channels are zeroed and eight more channels
  carry its logit instead, [q, logit parts] · [k, 1 at the BOS]. Three of the eight hold the logit as the sum of three
  numbers of the input's precision, which is exact to 2⁻²⁴; a closed column gets a logit far below every other. No
  mask is built, so a causal call stays causal, wherever the BOS stands. A causal call without a mask on a CPU has a
  cheaper way (`cpu_column`).

A call of few query rows, as in decoding, is not worth a kernel on a CPU: its time goes into reading keys and values,
which `cpu_decode` (`eager` where there are gradients) reads once each, with the scores of the few rows kept in between.

Shapes: B batch, H query heads, G key/value heads, T queries, S keys, D head dim, N = D + 8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ropemods.attention import capabilities, cpu_column, cpu_decode, eager, flash, flex, slots
from ropemods.attention.measured_paths import for_rows
from ropemods.attention.rows import Rows, additive_mask, scaled, wide, with_beta
from ropemods.attention.terms import Column

PARTS, CHANNELS = 3, 8
"""Logit parts, and the channels they travel in: kernels want head dims in multiples of 8."""


def tempered(rows: Rows) -> Rows:
    """`rows` with β in the place of the rule that asks for it."""
    if rows.entropy_scale is None:
        return rows
    return with_beta(rows, _entropy_read(rows))


def _entropy_read(rows: Rows) -> Tensor:
    """H of every row as its entropy scale reads it."""
    path = _chosen(rows)
    if path in ("triton", "triton-rows"):
        from ropemods.attention.triton.entropy import entropy

        return entropy(rows)
    if path == "flex":
        return flex.entropy(rows)
    if _few(rows):
        return eager.entropy(_wide(rows))
    rows = scaled(rows)
    q, k = rows.q_BHTD, rows.k_BGSD
    assert rows.entropy_scale is not None
    if rows.column is not None:
        column = rows.column.closed() if rows.entropy_scale.spares_column else rows.column
        if cpu_column.fits(rows):
            return cpu_column.row_entropy(q, k, column.is_bos_BS, column.weighed(), scale=rows.scale)
        q, k = widened(rows, column)
    mask = additive_mask(rows, q.dtype)
    return flash.row_entropy(q, k, mask=mask, causal=rows.causal, scale=rows.scale)


def attend(rows: Rows, *, want_lse: bool = False) -> tuple[Tensor, Tensor | None]:
    """Returns out_BHTD and, if asked, the log of the denominator (B, H, T).

    On the stock kernels, and without slots, the main pass is `scaled_dot_product_attention` itself, on whichever
    kernel it picks.
    """
    path = _chosen(rows)
    if path == "triton":
        from ropemods.attention.triton.path import attend as attend_fused

        return attend_fused(rows)
    if path == "flex":
        return flex.attend(rows)
    if path == "flash" and cpu_decode.fits(rows):
        return cpu_decode.attend(rows, want_lse=want_lse)
    if path == "flash" and _few(rows):
        out, _, lse = eager.attend(_wide(rows))
        return out, lse
    mask = additive_mask(rows, rows.q_BHTD.dtype)
    rows = scaled(tempered(rows._replace(mask=mask)))
    q, k, v = rows.q_BHTD, rows.k_BGSD, rows.v_BGSD
    joined = slots.together(rows.slots, q, wide(q.dtype))
    if rows.column is not None:
        if cpu_column.fits(rows):
            column = rows.column
            return cpu_column.attend(q, k, v, column.is_bos_BS, column.weighed(), joined, scale=rows.scale)
        q, k = widened(rows, rows.column)

    value_dim = v.shape[-1]
    if joined is None and not want_lse:
        groups = q.shape[1] // k.shape[1]
        if groups > 1 and mask is not None:
            # As transformers' own SDPA path does: with a mask, grouped heads would leave the fused kernels.
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        out = torch.nn.functional.scaled_dot_product_attention(
            q,
            k,
            _padded(v, q),
            attn_mask=mask,
            dropout_p=rows.dropout,
            is_causal=rows.causal,
            scale=rows.scale,
            enable_gqa=k.shape[1] != q.shape[1],
        )
        return out[..., :value_dim], None
    if joined is not None and joined.value_NHD is not None:
        joined = joined._replace(value_NHD=_padded(joined.value_NHD, q))
    out, lse = flash.attend_with_slots(q, k, _padded(v, q), joined, mask=mask, causal=rows.causal, scale=rows.scale)
    return out[..., :value_dim], lse


def _chosen(rows: Rows) -> str:
    """The path of this machine, which takes these rows."""
    path = for_rows(rows)
    capabilities.check(path, rows)
    return path


def widened(rows: Rows, column: Column) -> tuple[Tensor, Tensor]:
    """q (B, H, T, N) and k (B, G, S, N) whose products are the logits of `rows`, with `column` in it."""
    q, k = rows.q_BHTD, rows.k_BGSD
    is_bos = column.is_bos_BS[:, None, :, None]
    parts_BHTC, unit = _logit_parts(column, rows.scale, q.dtype)
    indicator = torch.zeros(*k.shape[:3], CHANNELS, dtype=k.dtype, device=k.device)
    indicator[..., :PARTS] = (is_bos * unit).to(k.dtype)
    return torch.cat((q, parts_BHTC), -1), torch.cat((torch.where(is_bos, 0, k), indicator), -1)


def _logit_parts(column: Column, scale: float, dtype: torch.dtype) -> tuple[Tensor, float]:
    """The BOS logit of each query in three channels of `dtype`, and the key's value in those channels."""
    # fp16 ends at 65504: a larger key channel leaves room for closed columns below logits of -1e4.
    unit = 1024.0 if dtype == torch.float16 else 1.0
    closed = -6e4 * unit * scale if dtype == torch.float16 else -1e30
    logit = column.weighed()
    is_closed = logit == float("-inf")
    rest = torch.where(is_closed, torch.full_like(logit, closed), logit) / (scale * unit)
    parts = []
    for _ in range(PARTS):
        part = rest.to(dtype)
        # A closed column is closed: what rounding leaves of it is of no interest.
        rest = torch.where(is_closed, torch.zeros_like(rest), rest - part.to(rest.dtype))
        parts.append(part)
    empty = torch.zeros_like(parts[0])
    return torch.stack(parts + [empty] * (CHANNELS - PARTS), dim=-1), unit


def _few(rows: Rows) -> bool:
    return rows.q_BHTD.device.type == "cpu" and rows.q_BHTD.shape[2] <= cpu_decode.ROWS and rows.dropout == 0


def _wide(rows: Rows) -> Rows:
    """`rows` whose logits are accumulated wide, as the kernels' are."""
    dtype = wide(rows.q_BHTD.dtype)
    return rows._replace(q_BHTD=rows.q_BHTD.to(dtype), k_BGSD=rows.k_BGSD.to(dtype))


def _padded(v: Tensor, q: Tensor) -> Tensor:
    """Values as wide as the queries: fused kernels take one head dim."""
    return torch.nn.functional.pad(v, (0, q.shape[-1] - v.shape[-1])) if v.shape[-1] != q.shape[-1] else v
