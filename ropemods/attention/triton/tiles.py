"""What the kernels share: tiles in and out of memory, products in fp32, the logits of a tile and what a row may see.

A program owns ROWS queries (or KEYS keys) of one head; DIM is the head dim rounded up to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

NO_MASK, BOOLEAN, ADDITIVE = 0, 1, 2
NO_BETA, GIVEN, FROM_ENTROPY = 0, 1, 2
SCANNED = tl.constexpr(1024)
"""Rows whose spans a program of the keys looks at in one go."""
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def product(a, b):
    """Accumulated in fp32, from inputs as they are."""
    if INTERPRETED:  # Triton's interpreter multiplies the bits of bfloat16 numbers as if they were integers.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="ieee")


@triton.jit
def narrowed(x, dtype: tl.constexpr):
    """fp32 rounded to the nearest number of the inputs' precision."""
    if INTERPRETED and dtype == tl.bfloat16:  # Triton's interpreter cuts the last bits off instead.
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def tile(pointer, at, size, head_dim: tl.constexpr, stride_row, stride_dim, DIM: tl.constexpr):
    """Rows `at` of a matrix (…, DIM); 0 outside of it."""
    channel = tl.arange(0, DIM)
    inside = at[:, None] < size
    if head_dim != DIM:
        inside = inside & (channel[None, :] < head_dim)
    return tl.load(pointer + at[:, None] * stride_row + channel[None, :] * stride_dim, mask=inside, other=0.0)


@triton.jit
def rows_from(start, first, past, spans, queries, ROWS: tl.constexpr):
    """ROWS queries from `start` on: which, whether they are there, and the keys that each may see, from and to."""
    row = start + tl.arange(0, ROWS)
    inside = row < queries
    begin = tl.load(first + spans + row, mask=inside, other=0)
    end = tl.load(past + spans + row, mask=inside, other=0)
    return row, inside, begin, end


@triton.jit
def key_stretches(begin, end, inside, bos_past, KEYS: tl.constexpr, MASK: tl.constexpr):
    """The tiles of keys that these queries see are those of [low, high). What all of them see, with no mask and no BOS
    in it, is sure: there nothing has to be hidden, nor looked up. Whole tiles of it are [sure_low, sure_high).
    """
    high = tl.max(end)
    low = tl.minimum(tl.min(tl.where(end > begin, begin, 2147483647)) // KEYS * KEYS, high)
    sure_low, sure_high = high, high
    if MASK == 0:
        sure_low = tl.maximum(tl.max(tl.where(inside, begin, 0)), bos_past)
        sure_high = tl.min(tl.where(inside, end, 2147483647))
    sure_low, sure_high = _whole_tiles(low, sure_low, sure_high, high, KEYS)
    return low, sure_low, sure_high, high


@triton.jit
def row_stretches(
    first, past, start, queries, keys, any_bos, ROWS: tl.constexpr, KEYS: tl.constexpr, MASK: tl.constexpr
):
    """The same for one tile of keys: the queries that see some of it, and whole tiles of those that see all of it."""
    low, high = queries, 0
    sure_low, sure_high, sure = queries, 0, 0
    past_all = tl.minimum(start + KEYS, keys)
    for chunk in range(0, queries, SCANNED):
        row = chunk + tl.arange(0, SCANNED)
        begin = tl.load(first + row, mask=row < queries, other=0)
        end = tl.load(past + row, mask=row < queries, other=0)
        some = (end > start) & (begin < past_all) & (end > begin)
        low = tl.minimum(low, tl.min(tl.where(some, row, queries)))
        high = tl.maximum(high, tl.max(tl.where(some, row + 1, 0)))
        if MASK == 0:
            every = some & (begin <= start) & (end >= past_all)
            sure_low = tl.minimum(sure_low, tl.min(tl.where(every, row, queries)))
            sure_high = tl.maximum(sure_high, tl.max(tl.where(every, row + 1, 0)))
            sure += tl.sum(every.to(tl.int32))
    low = tl.minimum(low, high)
    # Rows with others between them are no run, and each is looked at.
    if (sure_high - sure_low != sure) | any_bos:
        sure_low, sure_high = high, high
    sure_low, sure_high = _whole_tiles(low, sure_low, sure_high, high, ROWS)
    return low, sure_low, sure_high, high


@triton.jit
def _whole_tiles(low, sure_low, sure_high, high, TILE: tl.constexpr):
    """The sure stretch narrowed to whole tiles, counted from `low`; an empty one stands behind the last tile."""
    sure_low = low + tl.cdiv(tl.maximum(sure_low - low, 0), TILE) * TILE
    sure_high = low + tl.maximum(sure_high - low, 0) // TILE * TILE
    none = sure_high <= sure_low
    behind = low + tl.cdiv(high - low, TILE) * TILE
    return tl.where(none, behind, sure_low), tl.where(none, behind, sure_high)


@triton.jit
def tiles_in(low, sure_low, sure_high, high, SURE: tl.constexpr, TILE: tl.constexpr):
    """How many tiles are sure, or are left beside those."""
    if SURE:
        return (sure_high - sure_low) // TILE
    else:
        return (sure_low - low) // TILE + tl.cdiv(tl.maximum(high - sure_high, 0), TILE)


@triton.jit
def tile_at(n, low, sure_low, sure_high, SURE: tl.constexpr, TILE: tl.constexpr):
    """Where the n-th of them starts."""
    if SURE:
        return sure_low + n * TILE
    else:
        start = low + n * TILE
        return tl.where(start >= sure_low, start + (sure_high - sure_low), start)


@triton.jit
def store_tile(pointer, value, at, inside, head_dim: tl.constexpr, DIM: tl.constexpr):
    """The counterpart of `tile` for a contiguous matrix; `at` counts its rows from the pointer on."""
    channel = tl.arange(0, DIM)
    where = pointer + at[:, None] * head_dim + channel[None, :]
    tl.store(where, narrowed(value, pointer.dtype.element_ty), mask=inside[:, None] & (channel[None, :] < head_dim))


@triton.jit
def by_row(x, TURNED: tl.constexpr):
    """A number a query, to be spread over a tile; TURNED tiles are (KEYS, ROWS), for products over the queries."""
    if TURNED:
        return x[None, :]
    else:
        return x[:, None]


@triton.jit
def by_key(x, TURNED: tl.constexpr):
    if TURNED:
        return x[:, None]
    else:
        return x[None, :]


@triton.jit
def logits(
    q, k, row, key, begin, end, mask, mask_row, mask_key, is_bos, bos_logit,
    queries, keys, scale, cap, MASK: tl.constexpr, CAPPED: tl.constexpr, BOS: tl.constexpr, SURE: tl.constexpr,
    TURNED: tl.constexpr,
):  # fmt: skip
    """A tile each: the logits x, in the BOS column the logit given for it; what the mask adds; which are seen; and,
    one number a key, which are a BOS. In a SURE tile all are seen and none is a BOS."""
    if TURNED:
        x = product(k, tl.trans(q)) * scale
    else:
        x = product(q, tl.trans(k)) * scale
    if CAPPED:
        x = cap * (2 * tl.sigmoid(2 * x / cap) - 1)
    bias, seen, at_bos = admitted(
        row, key, begin, end, mask, mask_row, mask_key, is_bos, queries, keys, MASK, BOS, TURNED
    )  # fmt: skip
    if BOS and not SURE:
        x = tl.where(at_bos, by_row(bos_logit, TURNED), x)
    return x, bias, seen, at_bos


@triton.jit
def admitted(
    row, key, begin, end, mask, mask_row, mask_key, is_bos, queries, keys, MASK: tl.constexpr, BOS: tl.constexpr,
    TURNED: tl.constexpr,
):  # fmt: skip
    """What `logits` returns beside the logits."""
    column = by_key(key, TURNED)
    seen = (column >= by_row(begin, TURNED)) & (column < by_row(end, TURNED))
    bias = tl.zeros(seen.shape, tl.float32)
    if MASK != 0:
        inside = (by_row(row, TURNED) < queries) & (column < keys)
        where = mask + by_row(row, TURNED) * mask_row + column * mask_key
        if MASK == 1:
            seen = seen & (tl.load(where, mask=inside, other=0) != 0)
        else:
            bias = tl.load(where, mask=inside, other=0.0).to(tl.float32)
    if BOS:
        at_bos = by_key(tl.load(is_bos + key, mask=key < keys, other=0) != 0, TURNED)
    else:
        at_bos = column < 0
    return bias, seen, at_bos


@triton.jit
def weighed(x, bias, seen, at_bos, weight, BOS: tl.constexpr, SURE: tl.constexpr, TURNED: tl.constexpr):
    """The logits with the mask and the weight of the BOS column; -inf where a key is not seen."""
    if not SURE:
        if BOS:
            bias = bias + tl.where(at_bos, by_row(weight, TURNED), 0.0)
        x = tl.where(seen, x + bias, float("-inf"))
    return x


@triton.jit
def with_beta(x, beta, at_bos, BETA: tl.constexpr, SPARED: tl.constexpr, SURE: tl.constexpr, TURNED: tl.constexpr):
    """Tempered logits; the BOS column is not, where it is spared."""
    if BETA != 0:
        if SPARED and not SURE:
            x = tl.where(at_bos, x, x * by_row(beta, TURNED))
        else:
            x = x * by_row(beta, TURNED)
    return x


@triton.jit
def raised(highest, s):
    """The highest number of each row so far, the one to take from logits (0 where none was seen), and by how much it
    stands above what was taken before."""
    higher = tl.maximum(highest, tl.max(s, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    return higher, base, tl.where(highest == float("-inf"), 0.0, base - highest)


@triton.jit
def beta_of(entropy, coefficients, strength, hold_from, POWERS: tl.constexpr):
    """`Temperature.beta` of `ropemods.attention.rows`."""
    h = tl.minimum(entropy, hold_from)
    value = tl.zeros_like(entropy)
    for power in tl.static_range(POWERS):
        value = value * h + tl.load(coefficients + power)
    sharpened = tl.where(entropy > 0.5, tl.maximum(value, 1.0), 1.0)
    return 1 + strength * (sharpened - 1)
