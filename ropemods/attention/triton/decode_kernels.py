"""The same call for few queries and many keys: the keys are split among programs, and their sums merged.

All query heads of a key/value head, and all their queries, are the rows of one program, so K and V are read once.
β needs the entropy of the whole row before any value can be weighed; so that no key is read twice for it,
`split_scores_kernel` writes the logits of the few rows down (rows × S numbers) with the sums of its part. Every program
of `split_values_kernel` then merges those sums for itself, knows β, and goes through its part of the values;
`merge_kernel` adds up what they found. Without an entropy to read, the first kernel is left out.

What the sums are: `attend_kernels`. Shapes: B batch, H query heads, G key/value heads, T queries, S keys, P parts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ropemods.attention.triton.attend_kernels import values_end, values_start, values_step, with_slots
from ropemods.attention.triton.row_kernels import statistics_end, statistics_step
from ropemods.attention.triton.tiles import admitted, beta_of, logits, narrowed, tile, weighed, with_beta


@triton.jit
def _lanes(heads, repeats, queries, ROWS: tl.constexpr):
    """The batch row and key/value head of this program; head and query of each lane, and whether it has one."""
    groups = heads // repeats
    batch, group = tl.program_id(1) // groups, tl.program_id(1) % groups
    batch, group = batch.to(tl.int64), group.to(tl.int64)
    lane = tl.arange(0, ROWS)
    return batch, group, group * repeats + lane // queries, lane % queries, lane < repeats * queries


@triton.jit
def _queries(q, head, row, inside, head_dim, q_head, q_row, q_dim, DIM: tl.constexpr):
    """A tile of queries of several heads."""
    channel = tl.arange(0, DIM)
    where = q + head[:, None] * q_head + row[:, None] * q_row + channel[None, :] * q_dim
    return tl.load(where, mask=inside[:, None] & (channel[None, :] < head_dim), other=0.0)


@triton.jit
def split_scores_kernel(
    q, k, first, past, mask, is_bos, bos_logit, bos_counted, scores, part_highest, part_total, part_moment,
    q_batch, q_head, q_row, q_dim, k_batch, k_head, k_row, k_dim,
    span_batch, mask_batch, mask_head, mask_row, mask_key,
    heads, repeats, queries, keys, head_dim: tl.constexpr, part, scale, cap,
    DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, MASK: tl.constexpr, CAPPED: tl.constexpr,
    BOS: tl.constexpr,
):  # fmt: skip
    batch, group, head, row, inside = _lanes(heads, repeats, queries, ROWS)
    begin = tl.load(first + batch * span_batch + row, mask=inside, other=0)
    end = tl.load(past + batch * span_batch + row, mask=inside, other=0)
    at = (batch * heads + head) * queries + row
    q_tile = _queries(q + batch * q_batch, head, row, inside, head_dim, q_head, q_row, q_dim, DIM)
    row_bos = tl.zeros((ROWS,), tl.float32)
    counted = row_bos
    if BOS:
        row_bos = tl.load(bos_logit + at, mask=inside, other=0.0)
        counted = tl.load(bos_counted + batch * queries + row, mask=inside, other=0.0)
    # One pointer a lane: each lane has a head of its own. Lanes past the last row read the first one's.
    mask_base = mask + batch * mask_batch + (tl.where(inside, head, 0) * mask_head)[:, None]

    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    moment = tl.zeros((ROWS,), tl.float32)
    # Parts are whole tiles; tiles before the first key that is seen, and behind the last, are passed over.
    low = tl.maximum(tl.program_id(0) * part, tl.min(tl.where(end > begin, begin, keys)) // KEYS * KEYS)
    for start in range(low, tl.minimum((tl.program_id(0) + 1) * part, tl.max(end)), KEYS):
        key = start + tl.arange(0, KEYS)
        k_tile = tile(k + batch * k_batch + group * k_head, key, keys, head_dim, k_row, k_dim, DIM)
        x, bias, seen, at_bos = logits(
            q_tile, k_tile, row, key, begin, end, mask_base, mask_row, mask_key, is_bos + batch * keys, row_bos,
            queries, keys, scale, cap, MASK, CAPPED, BOS, False, False,
        )  # fmt: skip
        where = scores + at[:, None] * keys + key[None, :]
        tl.store(where, x, mask=inside[:, None] & (key[None, :] < keys))
        s = weighed(x, bias, seen, at_bos, counted, BOS, False, False)
        highest, total, moment = statistics_step(s, highest, total, moment, False)
    parts_at = at * tl.num_programs(0) + tl.program_id(0)
    tl.store(part_highest + parts_at, highest, mask=inside)
    tl.store(part_total + parts_at, total, mask=inside)
    tl.store(part_moment + parts_at, moment, mask=inside)


@triton.jit
def split_values_kernel(
    q, k, v, first, past, mask, is_bos, bos_logit, bos_weight, coefficients, strength, beta,
    scores, part_highest, part_total, part_moment, lse, entropy,
    sum_highest, sum_total, sum_mixed, sum_reference, sum_first, sum_mixed_first,
    q_batch, q_head, q_row, q_dim, k_batch, k_head, k_row, k_dim, v_batch, v_head, v_row, v_dim,
    span_batch, mask_batch, mask_head, mask_row, mask_key,
    heads, repeats, queries, keys, head_dim: tl.constexpr, value_dim: tl.constexpr, part, scale, cap, hold_from,
    DIM: tl.constexpr, VDIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, MASK: tl.constexpr,
    CAPPED: tl.constexpr, BOS: tl.constexpr, SPARED: tl.constexpr, BETA: tl.constexpr, POWERS: tl.constexpr,
    KEEP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    batch, group, head, row, inside = _lanes(heads, repeats, queries, ROWS)
    begin = tl.load(first + batch * span_batch + row, mask=inside, other=0)
    end = tl.load(past + batch * span_batch + row, mask=inside, other=0)
    at = (batch * heads + head) * queries + row
    row_bos = tl.zeros((ROWS,), tl.float32)
    weight = row_bos
    if BOS:
        row_bos = tl.load(bos_logit + at, mask=inside, other=0.0)
        weight = tl.load(bos_weight + batch * queries + row, mask=inside, other=0.0)
    mask_base = mask + batch * mask_batch + (tl.where(inside, head, 0) * mask_head)[:, None]

    row_beta = tl.full((ROWS,), 1.0, tl.float32)
    reference = tl.full((ROWS,), float("-inf"), tl.float32)
    if BETA == 1:
        row_beta = tl.load(beta + at, mask=inside, other=1.0)
    if BETA == 2:
        one = tl.arange(0, PARTS)
        there = inside[:, None] & (one[None, :] < tl.num_programs(0))
        parts_at = at[:, None] * tl.num_programs(0) + one[None, :]
        highests = tl.load(part_highest + parts_at, mask=there, other=float("-inf"))
        totals = tl.load(part_total + parts_at, mask=there, other=0.0)
        moments = tl.load(part_moment + parts_at, mask=there, other=0.0)
        highest = tl.max(highests, 1)
        below = tl.where(highests == float("-inf"), 0.0, highests - highest[:, None])
        share = tl.where(highests == float("-inf"), 0.0, tl.exp(below))
        row_lse, row_entropy = statistics_end(
            highest, tl.sum(share * totals, 1), tl.sum(share * (moments + below * totals), 1)
        )
        row_head = tl.where(inside, head, 0)
        row_beta = beta_of(row_entropy, coefficients + row_head * POWERS, tl.load(strength), hold_from, POWERS)
        reference = tl.where(row_lse == float("-inf"), 0.0, row_lse)
        if tl.program_id(0) == 0:
            tl.store(lse + at, row_lse, mask=inside)
            tl.store(entropy + at, row_entropy, mask=inside)
            tl.store(beta + at, row_beta, mask=inside)
    else:
        q_tile = _queries(q + batch * q_batch, head, row, inside, head_dim, q_head, q_row, q_dim, DIM)

    state = values_start(reference, ROWS, VDIM, KEEP)
    # Parts are whole tiles; tiles before the first key that is seen, and behind the last, are passed over.
    low = tl.maximum(tl.program_id(0) * part, tl.min(tl.where(end > begin, begin, keys)) // KEYS * KEYS)
    for start in range(low, tl.minimum((tl.program_id(0) + 1) * part, tl.max(end)), KEYS):
        key = start + tl.arange(0, KEYS)
        if BETA == 2:
            where = scores + at[:, None] * keys + key[None, :]
            x = tl.load(where, mask=inside[:, None] & (key[None, :] < keys), other=0.0)
            bias, seen, at_bos = admitted(
                row,
                key,
                begin,
                end,
                mask_base,
                mask_row,
                mask_key,
                is_bos + batch * keys,
                queries,
                keys,
                MASK,
                BOS,
                False,
            )
        else:
            k_tile = tile(k + batch * k_batch + group * k_head, key, keys, head_dim, k_row, k_dim, DIM)
            x, bias, seen, at_bos = logits(
                q_tile, k_tile, row, key, begin, end, mask_base, mask_row, mask_key, is_bos + batch * keys, row_bos,
                queries, keys, scale, cap, MASK, CAPPED, BOS, False, False,
            )  # fmt: skip
        z = weighed(
            with_beta(x, row_beta, at_bos, BETA, SPARED, False, False), bias, seen, at_bos, weight, BOS, False, False
        )
        if SPARED:
            x = tl.where(at_bos, 0.0, x)
        v_tile = tile(v + batch * v_batch + group * v_head, key, keys, value_dim, v_row, v_dim, VDIM)
        state = values_step(x, z, v_tile, state, KEEP, BETA == 2, False)

    parts_at = at * tl.num_programs(0) + tl.program_id(0)
    channel = tl.arange(0, VDIM)
    tile_at = parts_at[:, None] * value_dim + channel[None, :]
    tile_inside = inside[:, None] & (channel[None, :] < value_dim)
    tl.store(sum_highest + parts_at, state[0], mask=inside)
    tl.store(sum_total + parts_at, state[1], mask=inside)
    tl.store(sum_mixed + tile_at, state[2], mask=tile_inside)
    if KEEP:
        tl.store(sum_reference + parts_at, state[3], mask=inside)
        tl.store(sum_first + parts_at, state[4], mask=inside)
        tl.store(sum_mixed_first + tile_at, state[5], mask=tile_inside)


@triton.jit
def merge_kernel(
    sum_highest, sum_total, sum_mixed, sum_reference, sum_first, sum_mixed_first, slot_logit, slot_value,
    out, log_z, slope, slot_step, heads, queries, value_dim, parts,
    VDIM: tl.constexpr, SLOTS: tl.constexpr, VALUED: tl.constexpr, KEEP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One row a program."""
    at = tl.program_id(0).to(tl.int64)
    one = tl.arange(0, PARTS)[None, :]
    there = one < parts
    channel = tl.arange(0, VDIM)
    tile_at = (at * parts + tl.trans(one)) * value_dim + channel[None, :]
    tile_there = tl.trans(there) & (channel[None, :] < value_dim)
    highests = tl.load(sum_highest + at * parts + one, mask=there, other=float("-inf"))
    totals = tl.load(sum_total + at * parts + one, mask=there, other=0.0)
    mixed = tl.load(sum_mixed + tile_at, mask=tile_there, other=0.0)
    highest = tl.max(highests, 1)
    # A part in which no key was seen counts for nothing; one with a NaN counts.
    none = (highests == float("-inf")) & (totals == 0)
    share = tl.where(none, 0.0, tl.exp(tl.where(none, 0.0, highests - highest[:, None])))
    total = tl.sum(share * totals, 1)
    whole = tl.sum(tl.trans(share) * mixed, 0)[None, :]
    where = at * value_dim + channel[None, :]
    if KEEP:
        references = tl.load(sum_reference + at * parts + one, mask=there, other=float("-inf"))
        firsts = tl.load(sum_first + at * parts + one, mask=there, other=0.0)
        mixed_first = tl.load(sum_mixed_first + tile_at, mask=tile_there, other=0.0)
        reference = tl.max(references, 1)
        step = tl.where(references == float("-inf"), 0.0, references - reference[:, None])
        first = tl.sum(share * (firsts + step * totals), 1)
        whole_first = tl.sum(tl.trans(share) * (mixed_first + tl.trans(step) * mixed), 0)[None, :]
        state = highest, total, whole, reference, first, whole_first
    else:
        state = highest, total, whole  # type: ignore[assignment]
    row = at + tl.arange(0, 1)
    state = with_slots(
        state, slot_logit + row, slot_value + (at // queries) % heads * value_dim, row >= 0, slot_step,
        heads * value_dim, value_dim, VDIM, SLOTS, VALUED, KEEP,
    )  # fmt: skip
    result, row_log_z, row_slope = values_end(state, KEEP)
    if KEEP:
        tl.store(slope + where, narrowed(row_slope, slope.dtype.element_ty), mask=channel[None, :] < value_dim)
    tl.store(log_z + row, row_log_z)
    tl.store(out + where, narrowed(result, out.dtype.element_ty), mask=channel[None, :] < value_dim)
