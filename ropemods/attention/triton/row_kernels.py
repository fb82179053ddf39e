"""Three kernels over the logits of a row, without the values: its log-sum-exp and entropy, and their gradients.

Forward, over the keys of a row, with m the highest logit so far:

    l = Σ e^(s − m)      t = Σ (s − m) e^(s − m)      lse = m + log l      H = log l − t / l

When m rises by a, both sums shrink by e^(−a), and t loses a for each unit of l. H never is the difference of two large
numbers, as lse − E is. Backward, with log p = s − lse:

    ds = p · (d_lse − d_H · (log p + H))      dq = scale · Σ_j ds k_j      dk = scale · Σ_i ds q_i

dq is summed over keys by the program of its queries, dk over queries by the program of its keys: no atomics, so the
same input gives the same bits. Soft-capped logits c · tanh(x / c) have a slope of 1 − (s / c)².

A program owns ROWS queries (or KEYS keys) of one head; DIM is the head dim rounded up to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ropemods.attention.triton.tiles import (
    by_row,
    key_stretches,
    logits,
    product,
    raised,
    row_stretches,
    rows_from,
    store_tile,
    tile,
    tile_at,
    tiles_in,
    weighed,
)


@triton.jit
def statistics_step(s, highest, total, moment, SURE: tl.constexpr):
    """Σ e^(s − m) and Σ (s − m) e^(s − m) with the logits of one more tile."""
    highest, base, rise = raised(highest, s)
    shrink = tl.exp(-rise)
    below = s - base[:, None]
    weight = tl.exp(below)
    weighted = weight * below
    if not SURE:  # where nothing is seen, 0 · −∞
        weighted = tl.where(weight > 0, weighted, 0.0)
    moment = shrink * (moment - rise * total) + tl.sum(weighted, 1)
    total = shrink * total + tl.sum(weight, 1)
    return highest, total, moment


@triton.jit
def statistics_end(highest, total, moment):
    """lse and H; -inf and 0 for a row that saw nothing."""
    empty = total == 0
    divisor = tl.where(empty, 1.0, total)
    log_total = tl.log(divisor)
    return tl.where(empty, float("-inf"), highest + log_total), log_total - moment / divisor


@triton.jit
def _scores(
    q, k, row, key, begin, end, mask, mask_row, mask_key,
    queries, keys, scale, cap, MASK: tl.constexpr, CAPPED: tl.constexpr, SURE: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Logits, a tile, with the mask, -inf where a key is not seen; and as the cap left them."""
    x, bias, seen, at_bos = logits(
        q, k, row, key, begin, end, mask, mask_row, mask_key, mask, begin,
        queries, keys, scale, cap, MASK, CAPPED, False, SURE, TURNED,
    )  # fmt: skip
    return weighed(x, bias, seen, at_bos, begin, False, SURE, TURNED), x


@triton.jit
def _score_gradients(
    s, capped, lse, entropy, d_lse, d_entropy, scale, cap, CAPPED: tl.constexpr, SURE: tl.constexpr,
    TURNED: tl.constexpr,
):  # fmt: skip
    """The gradients of q · k."""
    log_p = s - by_row(lse, TURNED)
    if not SURE:
        seen = s != float("-inf")
        log_p = tl.where(seen, log_p, 0.0)
    above = log_p + by_row(entropy, TURNED)
    ds = tl.exp(log_p) * (by_row(d_lse, TURNED) - by_row(d_entropy, TURNED) * above) * scale
    if CAPPED:
        ds = ds * (1 - (capped / cap) * (capped / cap))
    if not SURE:
        ds = tl.where(seen, ds, 0.0)
    return ds


@triton.jit
def statistics_kernel(
    q, k, first, past, mask, lse, entropy,
    q_batch, q_head, q_row, q_dim, k_batch, k_head, k_row, k_dim, span_batch,
    mask_batch, mask_head, mask_row, mask_key,
    heads, repeats, queries, keys, head_dim: tl.constexpr, scale, cap,
    DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, MASK: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    batch, head = batch.to(tl.int64), head.to(tl.int64)
    row, inside, begin, end = rows_from(tl.program_id(0) * ROWS, first, past, batch * span_batch, queries, ROWS)
    q_tile = tile(q + batch * q_batch + head * q_head, row, queries, head_dim, q_row, q_dim, DIM)
    k_base = k + batch * k_batch + (head // repeats) * k_head
    mask_base = mask + batch * mask_batch + head * mask_head

    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    moment = tl.zeros((ROWS,), tl.float32)
    low, sure_low, sure_high, high = key_stretches(begin, end, inside, 0, KEYS, MASK)
    for SURE in tl.static_range(2):
        for n in range(0, tiles_in(low, sure_low, sure_high, high, SURE, KEYS)):
            key = tile_at(n, low, sure_low, sure_high, SURE, KEYS) + tl.arange(0, KEYS)
            k_tile = tile(k_base, key, keys, head_dim, k_row, k_dim, DIM)
            s, _ = _scores(
                q_tile, k_tile, row, key, begin, end, mask_base, mask_row, mask_key,
                queries, keys, scale, cap, MASK, CAPPED, SURE, False,
            )  # fmt: skip
            highest, total, moment = statistics_step(s, highest, total, moment, SURE)

    at = tl.program_id(1).to(tl.int64) * queries + row
    row_lse, row_entropy = statistics_end(highest, total, moment)
    tl.store(lse + at, row_lse, mask=inside)
    tl.store(entropy + at, row_entropy, mask=inside)


@triton.jit
def query_gradient_kernel(
    q, k, first, past, mask, lse, entropy, d_lse, d_entropy, dq,
    q_batch, q_head, q_row, q_dim, k_batch, k_head, k_row, k_dim, span_batch,
    mask_batch, mask_head, mask_row, mask_key,
    heads, repeats, queries, keys, head_dim: tl.constexpr, scale, cap,
    DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, MASK: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    batch, head = batch.to(tl.int64), head.to(tl.int64)
    row, inside, begin, end = rows_from(tl.program_id(0) * ROWS, first, past, batch * span_batch, queries, ROWS)
    q_tile = tile(q + batch * q_batch + head * q_head, row, queries, head_dim, q_row, q_dim, DIM)
    k_base = k + batch * k_batch + (head // repeats) * k_head
    mask_base = mask + batch * mask_batch + head * mask_head
    at = tl.program_id(1).to(tl.int64) * queries + row
    row_lse = tl.load(lse + at, mask=inside, other=0.0)
    row_entropy = tl.load(entropy + at, mask=inside, other=0.0)
    row_d_lse = tl.load(d_lse + at, mask=inside, other=0.0)
    row_d_entropy = tl.load(d_entropy + at, mask=inside, other=0.0)

    gathered = tl.zeros((ROWS, DIM), tl.float32)
    low, sure_low, sure_high, high = key_stretches(begin, end, inside, 0, KEYS, MASK)
    for SURE in tl.static_range(2):
        for n in range(0, tiles_in(low, sure_low, sure_high, high, SURE, KEYS)):
            key = tile_at(n, low, sure_low, sure_high, SURE, KEYS) + tl.arange(0, KEYS)
            k_tile = tile(k_base, key, keys, head_dim, k_row, k_dim, DIM)
            s, x = _scores(
                q_tile, k_tile, row, key, begin, end, mask_base, mask_row, mask_key,
                queries, keys, scale, cap, MASK, CAPPED, SURE, False,
            )  # fmt: skip
            ds = _score_gradients(s, x, row_lse, row_entropy, row_d_lse, row_d_entropy, scale, cap, CAPPED, SURE, False)
            gathered += product(ds.to(k_tile.dtype), k_tile)

    store_tile(dq, gathered, at, inside, head_dim, DIM)


@triton.jit
def key_gradient_kernel(
    q, k, first, past, mask, lse, entropy, d_lse, d_entropy, dk,
    q_batch, q_head, q_row, q_dim, k_batch, k_head, k_row, k_dim, span_batch,
    mask_batch, mask_head, mask_row, mask_key,
    heads, repeats, queries, keys, head_dim: tl.constexpr, scale, cap,
    DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, MASK: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    groups = heads // repeats
    batch, group = tl.program_id(1) // groups, tl.program_id(1) % groups
    batch, group = batch.to(tl.int64), group.to(tl.int64)
    start = tl.program_id(0) * KEYS
    key = start + tl.arange(0, KEYS)
    k_tile = tile(k + batch * k_batch + group * k_head, key, keys, head_dim, k_row, k_dim, DIM)

    gathered = tl.zeros((KEYS, DIM), tl.float32)
    low, sure_low, sure_high, high = row_stretches(
        first + batch * span_batch, past + batch * span_batch, start, queries, keys, False, ROWS, KEYS, MASK
    )
    for head in range(group * repeats, (group + 1) * repeats):
        mask_base = mask + batch * mask_batch + head * mask_head
        for SURE in tl.static_range(2):
            for n in range(0, tiles_in(low, sure_low, sure_high, high, SURE, ROWS)):
                begin_row = tile_at(n, low, sure_low, sure_high, SURE, ROWS)
                row, inside, begin, end = rows_from(begin_row, first, past, batch * span_batch, queries, ROWS)
                q_tile = tile(q + batch * q_batch + head * q_head, row, queries, head_dim, q_row, q_dim, DIM)
                at = (batch * heads + head) * queries + row
                s, x = _scores(
                    q_tile, k_tile, row, key, begin, end, mask_base, mask_row, mask_key,
                    queries, keys, scale, cap, MASK, CAPPED, SURE, True,
                )  # fmt: skip
                ds = _score_gradients(
                    s,
                    x,
                    tl.load(lse + at, mask=inside, other=0.0),
                    tl.load(entropy + at, mask=inside, other=0.0),
                    tl.load(d_lse + at, mask=inside, other=0.0),
                    tl.load(d_entropy + at, mask=inside, other=0.0),
                    scale,
                    cap,
                    CAPPED,
                    SURE,
                    True,
                )
                gathered += product(ds.to(q_tile.dtype), q_tile)

    at = tl.program_id(1).to(tl.int64) * keys + key
    store_tile(dk, gathered, at, key < keys, head_dim, DIM)
