"""The backward of `attend_kernels`: dq and the gradient of the BOS logits by one kernel, dk and dv by another.

With P_j = e^(β x_j + c_j − log z) and p_j = e^(x_j + c_j − lse), the weights with and without the temperature,

    dx_j = β P_j (⟨dO, v_j⟩ − ⟨dO, O⟩) − dH p_j (log p_j + H)

where dH = dβ · β′(H) and dβ = ⟨dO, ∂O/∂β⟩ need no pass of their own. Rows of queries are summed by the program of the
queries, columns by the program of the keys, each in one order: no atomics, so the same input gives the same bits. The
price of that is seven matrix products where one kernel with atomics has five.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ropemods.attention.triton.tiles import (
    by_row,
    key_stretches,
    logits,
    narrowed,
    product,
    row_stretches,
    rows_from,
    store_tile,
    tile,
    tile_at,
    tiles_in,
    weighed,
    with_beta,
)


@triton.jit
def _weights_and_gradients(
    x, bias, seen, at_bos, from_values, weight, counted, row_beta, row_log_z, delta, row_lse, row_entropy, d_entropy,
    BOS: tl.constexpr, SPARED: tl.constexpr, BETA: tl.constexpr, SURE: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """P and dx of a tile; `from_values` is ⟨dO_i, v_j⟩."""
    tempered = with_beta(x, row_beta, at_bos, BETA, SPARED, SURE, TURNED)
    z = weighed(tempered, bias, seen, at_bos, weight, BOS, SURE, TURNED)
    if SURE:
        p = tl.exp(z - by_row(row_log_z, TURNED))
    else:
        # Of a row that sees nothing the log of the denominator is -inf, as each z is; the weights are 0.
        p = tl.where(seen, tl.exp(z - by_row(tl.where(row_log_z == float("-inf"), 0.0, row_log_z), TURNED)), 0.0)
    dx = with_beta(p * (from_values - by_row(delta, TURNED)), row_beta, at_bos, BETA, SPARED, SURE, TURNED)
    if BETA == 2:
        log_p = weighed(x, bias, seen, at_bos, counted, BOS, SURE, TURNED) - by_row(row_lse, TURNED)
        if not SURE:
            some = log_p > float("-inf")
            log_p = tl.where(some, log_p, 0.0)
        d_logit = tl.exp(log_p) * by_row(d_entropy, TURNED) * (log_p + by_row(row_entropy, TURNED))
        if not SURE:
            d_logit = tl.where(some, d_logit, 0.0)
        dx -= d_logit
    if not SURE:
        dx = tl.where(seen, dx, 0.0)
    return p, dx


@triton.jit
def _row(pointer, at, inside, GIVEN: tl.constexpr):
    """A number a row, where there is one."""
    if GIVEN:
        return tl.load(pointer + at, mask=inside, other=0.0)
    else:
        return tl.zeros(at.shape, tl.float32)


@triton.jit
def query_gradients_kernel(
    q, k, v, first, past, mask, is_bos, bos_past, bos_logit, bos_weight, bos_counted, beta,
    d_out, log_z, lse, entropy, delta, d_entropy, dq, d_bos,
    q_batch, q_head, q_row, q_dim, k_batch, k_head, k_row, k_dim, v_batch, v_head, v_row, v_dim,
    span_batch, mask_batch, mask_head, mask_row, mask_key,
    heads, repeats, queries, keys, head_dim: tl.constexpr, value_dim: tl.constexpr, scale, cap,
    DIM: tl.constexpr, VDIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, MASK: tl.constexpr,
    CAPPED: tl.constexpr, BOS: tl.constexpr, SPARED: tl.constexpr, BETA: tl.constexpr,
):  # fmt: skip
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    batch, head = batch.to(tl.int64), head.to(tl.int64)
    row, inside, begin, end = rows_from(tl.program_id(0) * ROWS, first, past, batch * span_batch, queries, ROWS)
    at = tl.program_id(1).to(tl.int64) * queries + row
    here = batch * queries + row
    q_tile = tile(q + batch * q_batch + head * q_head, row, queries, head_dim, q_row, q_dim, DIM)
    d_base = d_out + tl.program_id(1).to(tl.int64) * queries * value_dim
    d_tile = tile(d_base, row, queries, value_dim, value_dim, 1, VDIM)
    k_base = k + batch * k_batch + (head // repeats) * k_head
    v_base = v + batch * v_batch + (head // repeats) * v_head
    mask_base = mask + batch * mask_batch + head * mask_head
    row_bos = _row(bos_logit, at, inside, BOS)
    weight, counted = _row(bos_weight, here, inside, BOS), _row(bos_counted, here, inside, BOS)
    row_beta, row_log_z = _row(beta, at, inside, BETA != 0), _row(log_z, at, inside, True)
    row_delta = _row(delta, at, inside, True)
    row_lse, row_entropy = _row(lse, at, inside, BETA == 2), _row(entropy, at, inside, BETA == 2)
    row_d_entropy = _row(d_entropy, at, inside, BETA == 2)

    gathered = tl.zeros((ROWS, DIM), tl.float32)
    gathered_bos = tl.zeros((ROWS,), tl.float32)
    last_bos = 0
    if BOS:
        last_bos = tl.load(bos_past + batch)
    low, sure_low, sure_high, high = key_stretches(begin, end, inside, last_bos, KEYS, MASK)
    for SURE in tl.static_range(2):
        for n in range(0, tiles_in(low, sure_low, sure_high, high, SURE, KEYS)):
            key = tile_at(n, low, sure_low, sure_high, SURE, KEYS) + tl.arange(0, KEYS)
            k_tile = tile(k_base, key, keys, head_dim, k_row, k_dim, DIM)
            v_tile = tile(v_base, key, keys, value_dim, v_row, v_dim, VDIM)
            x, bias, seen, at_bos = logits(
                q_tile, k_tile, row, key, begin, end, mask_base, mask_row, mask_key, is_bos + batch * keys, row_bos,
                queries, keys, scale, cap, MASK, CAPPED, BOS, SURE, False,
            )  # fmt: skip
            _, dx = _weights_and_gradients(
                x, bias, seen, at_bos, product(d_tile, tl.trans(v_tile)), weight, counted, row_beta, row_log_z,
                row_delta, row_lse, row_entropy, row_d_entropy, BOS, SPARED, BETA, SURE, False,
            )  # fmt: skip
            if BOS and not SURE:
                gathered_bos += tl.sum(tl.where(at_bos, dx, 0.0), 1)
                dx = tl.where(at_bos, 0.0, dx)
            if CAPPED:
                dx = dx * (1 - (x / cap) * (x / cap))
            gathered += product(narrowed(dx * scale, k_tile.dtype), k_tile)

    store_tile(dq, gathered, at, inside, head_dim, DIM)
    if BOS:
        tl.store(d_bos + at, gathered_bos, mask=inside)


@triton.jit
def key_gradients_kernel(
    q, k, v, first, past, mask, is_bos, bos_past, bos_logit, bos_weight, bos_counted, beta,
    d_out, log_z, lse, entropy, delta, d_entropy, dk, dv,
    q_batch, q_head, q_row, q_dim, k_batch, k_head, k_row, k_dim, v_batch, v_head, v_row, v_dim,
    span_batch, mask_batch, mask_head, mask_row, mask_key,
    heads, repeats, queries, keys, head_dim: tl.constexpr, value_dim: tl.constexpr, scale, cap,
    DIM: tl.constexpr, VDIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, MASK: tl.constexpr,
    CAPPED: tl.constexpr, BOS: tl.constexpr, SPARED: tl.constexpr, BETA: tl.constexpr,
):  # fmt: skip
    groups = heads // repeats
    batch, group = tl.program_id(1) // groups, tl.program_id(1) % groups
    batch, group = batch.to(tl.int64), group.to(tl.int64)
    start = tl.program_id(0) * KEYS
    key = start + tl.arange(0, KEYS)
    k_tile = tile(k + batch * k_batch + group * k_head, key, keys, head_dim, k_row, k_dim, DIM)
    v_tile = tile(v + batch * v_batch + group * v_head, key, keys, value_dim, v_row, v_dim, VDIM)

    key_sum = tl.zeros((KEYS, DIM), tl.float32)
    value_sum = tl.zeros((KEYS, VDIM), tl.float32)
    any_bos = False
    if BOS:
        any_bos = tl.max(tl.load(is_bos + batch * keys + key, mask=key < keys, other=0).to(tl.int32)) > 0
    low, sure_low, sure_high, high = row_stretches(
        first + batch * span_batch, past + batch * span_batch, start, queries, keys, any_bos, ROWS, KEYS, MASK
    )
    for head in range(group * repeats, (group + 1) * repeats):
        mask_base = mask + batch * mask_batch + head * mask_head
        d_base = d_out + (batch * heads + head) * queries * value_dim
        for SURE in tl.static_range(2):
            for n in range(0, tiles_in(low, sure_low, sure_high, high, SURE, ROWS)):
                begin_row = tile_at(n, low, sure_low, sure_high, SURE, ROWS)
                row, inside, begin, end = rows_from(begin_row, first, past, batch * span_batch, queries, ROWS)
                here = batch * queries + row
                at = (batch * heads + head) * queries + row
                q_tile = tile(q + batch * q_batch + head * q_head, row, queries, head_dim, q_row, q_dim, DIM)
                d_tile = tile(d_base, row, queries, value_dim, value_dim, 1, VDIM)
                x, bias, seen, at_bos = logits(
                    q_tile, k_tile, row, key, begin, end, mask_base, mask_row, mask_key, is_bos + batch * keys,
                    _row(bos_logit, at, inside, BOS), queries, keys, scale, cap, MASK, CAPPED, BOS, SURE, True,
                )  # fmt: skip
                p, dx = _weights_and_gradients(
                    x, bias, seen, at_bos, product(v_tile, tl.trans(d_tile)), _row(bos_weight, here, inside, BOS),
                    _row(bos_counted, here, inside, BOS), _row(beta, at, inside, BETA != 0),
                    _row(log_z, at, inside, True), _row(delta, at, inside, True), _row(lse, at, inside, BETA == 2),
                    _row(entropy, at, inside, BETA == 2), _row(d_entropy, at, inside, BETA == 2),
                    BOS, SPARED, BETA, SURE, True,
                )  # fmt: skip
                if BOS and not SURE:
                    dx = tl.where(at_bos, 0.0, dx)
                if CAPPED:
                    dx = dx * (1 - (x / cap) * (x / cap))
                value_sum += product(narrowed(p, d_tile.dtype), d_tile)
                key_sum += product(narrowed(dx * scale, q_tile.dtype), q_tile)

    at = tl.program_id(1).to(tl.int64) * keys + key
    store_tile(dk, key_sum, at, key < keys, head_dim, DIM)
    store_tile(dv, value_sum, at, key < keys, value_dim, VDIM)
