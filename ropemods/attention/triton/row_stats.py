"""The log-sum-exp and the entropy of every row, from queries and keys alone.

One matrix product forward and three backward where attention has two and five, so an entropy read with it and a main
pass on any stock kernel cost 11 / 7 = 1.57 of stock attention, forward and backward together.

Shapes: B batch, H query heads, G key/value heads, T queries, S keys, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import custom_op

from ropemods.attention.triton import row_kernels, tiles
from ropemods.attention.triton.blocks import Blocks, blocks_of, padded
from ropemods.attention.triton.launch import check
from ropemods.attention.triton.spans import Spans


def row_stats(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    spans: Spans,
    *,
    mask: Tensor | None = None,
    scale: float,
    softcap: float | None = None,
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor]:
    """lse and H of every row (B, H, T) in fp32, H in nats, both differentiable in q and k.

    `mask` hides keys within the spans (boolean) or is added to the logits; it broadcasts to (B, H, T, S). A row that
    sees nothing has lse −inf and H 0.
    """
    check(q_BHTD, k_BGSD, k_BGSD, spans)
    batch, heads, queries, _ = q_BHTD.shape
    if mask is not None:
        mask = mask.expand(batch, heads, queries, k_BGSD.shape[2])
    rows, keys = (0, 0) if blocks is None else blocks[:2]
    return _row_stats(q_BHTD, k_BGSD, *spans, mask, scale, softcap or 0.0, rows, keys)


def _size(kernel: str, q: Tensor, rows: int, keys: int) -> Blocks:
    return Blocks(rows, keys) if rows else blocks_of(kernel, q.shape[3], q.dtype, q.device)


def _launch(
    kernel: Any,
    grid: tuple[int, int],
    tensors: tuple[Tensor, ...],
    q: Tensor,
    k: Tensor,
    first: Tensor,
    past: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    size: Blocks,
) -> None:
    kind = tiles.NO_MASK
    if mask is not None:
        kind = tiles.BOOLEAN if mask.dtype == torch.bool else tiles.ADDITIVE
    read = q if mask is None else mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    kernel[grid](
        *(q, k, first, past, read, *tensors),
        *(*q.stride(), *k.stride(), first.stride(0) if first.shape[0] > 1 else 0),
        *(read.stride() if mask is not None else (0, 0, 0, 0)),
        *(q.shape[1], q.shape[1] // k.shape[1], q.shape[2], k.shape[2], q.shape[3], scale, softcap),
        DIM=padded(q.shape[3]),
        ROWS=size.rows,
        KEYS=size.keys,
        MASK=kind,
        CAPPED=softcap > 0,
        num_warps=size.warps,
        num_stages=size.stages,
    )


@custom_op("ropemods::row_stats", mutates_args=())
def _row_stats(
    q: Tensor, k: Tensor, first: Tensor, past: Tensor, mask: Tensor | None,
    scale: float, softcap: float, rows: int, keys: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    lse, entropy = _empty_stats(q, k, first, past, mask, scale, softcap, rows, keys)
    size = _size("statistics", q, rows, keys)
    grid = triton.cdiv(q.shape[2], size.rows), q.shape[0] * q.shape[1]
    _launch(row_kernels.statistics_kernel, grid, (lse, entropy), q, k, first, past, mask, scale, softcap, size)
    return lse, entropy


@_row_stats.register_fake
def _empty_stats(
    q: Tensor, k: Tensor, first: Tensor, past: Tensor, mask: Tensor | None,
    scale: float, softcap: float, rows: int, keys: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return tuple(q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(2))


@custom_op("ropemods::row_stats_backward", mutates_args=())
def _row_stats_backward(
    d_lse: Tensor, d_entropy: Tensor, q: Tensor, k: Tensor, first: Tensor, past: Tensor, mask: Tensor | None,
    lse: Tensor, entropy: Tensor, scale: float, softcap: float, rows: int, keys: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dq, dk = torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty(k.shape, dtype=k.dtype, device=k.device)
    given = lse, entropy, d_lse.contiguous(), d_entropy.contiguous()
    rest = q, k, first, past, mask, scale, softcap
    size = _size("statistics_query_gradient", q, rows, keys)
    grid = triton.cdiv(q.shape[2], size.rows), q.shape[0] * q.shape[1]
    _launch(row_kernels.query_gradient_kernel, grid, (*given, dq), *rest, size)
    size = _size("statistics_key_gradient", q, rows, keys)
    grid = triton.cdiv(k.shape[2], size.keys), k.shape[0] * k.shape[1]
    _launch(row_kernels.key_gradient_kernel, grid, (*given, dk), *rest, size)
    return dq, dk


@_row_stats_backward.register_fake
def _empty_gradients(d_lse: Tensor, d_entropy: Tensor, q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty(k.shape, dtype=k.dtype, device=k.device)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, first, past, mask, *ctx.options = inputs
    ctx.save_for_backward(q, k, first, past, mask, *output)


def _gradients(ctx: Any, d_lse: Tensor, d_entropy: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk = _row_stats_backward(d_lse, d_entropy, *ctx.saved_tensors, *ctx.options)
    return dq, dk, *[None] * 7


_row_stats.register_autograd(_gradients, setup_context=_keep)
