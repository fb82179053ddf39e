"""One kernel for a whole attention call forward: temperature, BOS column and slots in the pass that reads the values.

With a temperature that reads the entropy, a program goes over its keys twice. The first time it needs the queries and
keys alone (`row_kernels.statistics_step`), and then knows lse, H and β of its rows. The second time, with logits x,
biases c (the mask, the BOS weight) and the highest tempered logit m so far,

    w_j = e^(β x_j + c_j − m)      l = Σ w_j      o = Σ w_j v_j

and, for the backward, with a reference r, which is lse or the highest logit so far where lse is not known,

    a = Σ w_j (x_j − r)      A = Σ w_j (x_j − r) v_j      ∂O/∂β = A / l − (a / l) · o / l

which does not depend on r, and never is the difference of two large numbers. Slots join all four sums at the end with
x = 0, and so does a BOS column that the temperature spares. Three matrix products, four with ∂O/∂β.

Shapes: B batch, H query heads, G key/value heads, T queries, S keys, D head dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ropemods.attention.triton.row_kernels import statistics_end, statistics_step
from ropemods.attention.triton.tiles import (
    beta_of,
    key_stretches,
    logits,
    narrowed,
    product,
    raised,
    rows_from,
    store_tile,
    tile,
    tile_at,
    tiles_in,
    weighed,
    with_beta,
)


@triton.jit
def values_step(x, z, v_tile, state, KEEP: tl.constexpr, FIXED: tl.constexpr, SURE: tl.constexpr):
    """The sums of the module's docstring with one more tile. `state` is (m, l, o) or (m, l, o, r, a, A); r is FIXED
    where it was known from the start."""
    highest, base, rise = raised(state[0], z)
    shrink = tl.exp(-rise)
    weight = tl.exp(z - base[:, None])
    total = shrink * state[1] + tl.sum(weight, 1)
    mixed = shrink[:, None] * state[2] + product(narrowed(weight, v_tile.dtype), v_tile)
    if KEEP:
        reference = state[3]
        first, mixed_first = state[4], state[5]
        if FIXED:
            moment = weight * (x - reference[:, None])
        else:
            reference, from_here, step = raised(reference, tl.where(z > float("-inf"), x, float("-inf")))
            moment = weight * (x - from_here[:, None])
            first -= step * state[1]
            mixed_first -= step[:, None] * state[2]
        if not SURE:
            moment = tl.where(weight > 0, moment, 0.0)
        first = shrink * first + tl.sum(moment, 1)
        mixed_first = shrink[:, None] * mixed_first + product(narrowed(moment, v_tile.dtype), v_tile)
        return highest, total, mixed, reference, first, mixed_first
    else:
        return highest, total, mixed


@triton.jit
def values_start(reference, ROWS: tl.constexpr, VDIM: tl.constexpr, KEEP: tl.constexpr):
    """Nothing summed yet; `reference` is lse where it is known, else −inf."""
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, VDIM), tl.float32)
    if KEEP:
        return highest, total, mixed, reference, tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, VDIM), tl.float32)
    else:
        return highest, total, mixed


@triton.jit
def with_slots(
    state, logit, value, inside, logit_step, value_step, value_dim, VDIM: tl.constexpr, SLOTS: tl.constexpr,
    VALUED: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """The sums with the slots in them: `logit` points at the first slot's of each row, `value` at its value."""
    highest, total, mixed = state[0], state[1], state[2]
    if KEEP:
        first, mixed_first = state[4], state[5]
        reference = tl.where(state[3] == float("-inf"), 0.0, state[3])
    channel = tl.arange(0, VDIM)
    for slot in tl.static_range(SLOTS):
        z = tl.load(logit + slot * logit_step, mask=inside, other=float("-inf"))
        higher, base, rise = raised(highest, z[:, None])
        shrink = tl.where(highest == float("-inf"), 0.0, tl.exp(-rise))
        highest, weight = higher, tl.exp(z - base)
        total = shrink * total + weight
        mixed = shrink[:, None] * mixed
        if KEEP:
            moment = weight * -reference
            first = shrink * first + moment
            mixed_first = shrink[:, None] * mixed_first
        if VALUED:
            brought = tl.load(value + slot * value_step + channel, mask=channel < value_dim, other=0.0)[None, :]
            mixed += weight[:, None] * brought
            if KEEP:
                mixed_first += moment[:, None] * brought
    if KEEP:
        return highest, total, mixed, state[3], first, mixed_first
    else:
        return highest, total, mixed


@triton.jit
def values_end(state, KEEP: tl.constexpr):
    """out, the log of the denominator, and ∂O/∂β (out again where it is not kept)."""
    highest, total = state[0], state[1]
    empty = total == 0
    divisor = tl.where(empty, 1.0, total)
    out = state[2] / divisor[:, None]
    log_z = tl.where(empty, float("-inf"), highest + tl.log(divisor))
    slope = out
    if KEEP:
        slope = state[5] / divisor[:, None] - (state[4] / divisor)[:, None] * out
    return out, log_z, slope


@triton.jit
def attend_kernel(
    q, k, v, first, past, mask, is_bos, bos_past, bos_logit, bos_weight, bos_counted, slot_logit, slot_value,
    coefficients, strength, beta, out, log_z, lse, entropy, slope,
    q_batch, q_head, q_row, q_dim, k_batch, k_head, k_row, k_dim, v_batch, v_head, v_row, v_dim,
    span_batch, mask_batch, mask_head, mask_row, mask_key, slot_step,
    heads, repeats, queries, keys, head_dim: tl.constexpr, value_dim: tl.constexpr, scale, cap, hold_from,
    DIM: tl.constexpr, VDIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, MASK: tl.constexpr,
    CAPPED: tl.constexpr, BOS: tl.constexpr, SPARED: tl.constexpr, SLOTS: tl.constexpr, VALUED: tl.constexpr,
    BETA: tl.constexpr, POWERS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    batch, head = batch.to(tl.int64), head.to(tl.int64)
    row, inside, begin, end = rows_from(tl.program_id(0) * ROWS, first, past, batch * span_batch, queries, ROWS)
    q_tile = tile(q + batch * q_batch + head * q_head, row, queries, head_dim, q_row, q_dim, DIM)
    k_base = k + batch * k_batch + (head // repeats) * k_head
    v_base = v + batch * v_batch + (head // repeats) * v_head
    mask_base = mask + batch * mask_batch + head * mask_head
    bos_base = is_bos + batch * keys
    at = tl.program_id(1).to(tl.int64) * queries + row
    row_bos = tl.zeros((ROWS,), tl.float32)
    weight = row_bos
    if BOS:
        row_bos = tl.load(bos_logit + at, mask=inside, other=0.0)
        weight = tl.load(bos_weight + batch * queries + row, mask=inside, other=0.0)
    last_bos = 0
    if BOS:
        last_bos = tl.load(bos_past + batch)
    low, sure_low, sure_high, high = key_stretches(begin, end, inside, last_bos, KEYS, MASK)

    row_beta = tl.full((ROWS,), 1.0, tl.float32)
    reference = tl.full((ROWS,), float("-inf"), tl.float32)
    if BETA == 1:
        row_beta = tl.load(beta + at, mask=inside, other=1.0)
    if BETA == 2:
        counted = row_bos
        if BOS:
            counted = tl.load(bos_counted + batch * queries + row, mask=inside, other=0.0)
        highest = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        moment = tl.zeros((ROWS,), tl.float32)
        for SURE in tl.static_range(2):
            for n in range(0, tiles_in(low, sure_low, sure_high, high, SURE, KEYS)):
                key = tile_at(n, low, sure_low, sure_high, SURE, KEYS) + tl.arange(0, KEYS)
                k_tile = tile(k_base, key, keys, head_dim, k_row, k_dim, DIM)
                x, bias, seen, at_bos = logits(
                    q_tile, k_tile, row, key, begin, end, mask_base, mask_row, mask_key, bos_base, row_bos,
                    queries, keys, scale, cap, MASK, CAPPED, BOS, SURE, False,
                )  # fmt: skip
                s = weighed(x, bias, seen, at_bos, counted, BOS, SURE, False)
                highest, total, moment = statistics_step(s, highest, total, moment, SURE)
        row_lse, row_entropy = statistics_end(highest, total, moment)
        row_beta = beta_of(row_entropy, coefficients + head * POWERS, tl.load(strength), hold_from, POWERS)
        tl.store(lse + at, row_lse, mask=inside)
        tl.store(entropy + at, row_entropy, mask=inside)
        tl.store(beta + at, row_beta, mask=inside)
        reference = tl.where(row_lse == float("-inf"), 0.0, row_lse)

    state = values_start(reference, ROWS, VDIM, KEEP)
    for SURE in tl.static_range(2):
        for n in range(0, tiles_in(low, sure_low, sure_high, high, SURE, KEYS)):
            key = tile_at(n, low, sure_low, sure_high, SURE, KEYS) + tl.arange(0, KEYS)
            k_tile = tile(k_base, key, keys, head_dim, k_row, k_dim, DIM)
            x, bias, seen, at_bos = logits(
                q_tile, k_tile, row, key, begin, end, mask_base, mask_row, mask_key, bos_base, row_bos,
                queries, keys, scale, cap, MASK, CAPPED, BOS, SURE, False,
            )  # fmt: skip
            tempered = with_beta(x, row_beta, at_bos, BETA, SPARED, SURE, False)
            z = weighed(tempered, bias, seen, at_bos, weight, BOS, SURE, False)
            if SPARED and not SURE:
                x = tl.where(at_bos, 0.0, x)  # what β multiplies there
            v_tile = tile(v_base, key, keys, value_dim, v_row, v_dim, VDIM)
            state = values_step(x, z, v_tile, state, KEEP, BETA == 2, SURE)

    state = with_slots(
        state, slot_logit + at, slot_value + head * value_dim, inside, slot_step, heads * value_dim, value_dim,
        VDIM, SLOTS, VALUED, KEEP,
    )  # fmt: skip
    mixed, row_log_z, row_slope = values_end(state, KEEP)
    tl.store(log_z + at, row_log_z, mask=inside)
    store_tile(out, mixed, at, inside, value_dim, VDIM)
    if KEEP:
        store_tile(slope, row_slope, at, inside, value_dim, VDIM)
