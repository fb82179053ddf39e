"""How the kernels of an attention call are launched: grids, strides, and what they cannot take.

Shapes: B batch, H query heads, G key/value heads, T queries, S keys, D head dim, C coefficients, N slots.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ropemods.attention.triton import attend_kernels, decode_kernels, gradient_kernels, tiles
from ropemods.attention.triton.blocks import Blocks, blocks_of, padded
from ropemods.attention.triton.spans import Spans

FEW_LANES = 64
"""Queries times heads of a key/value head that one program of the decode kernels takes."""
PROGRAMS = 256
"""What the keys of a decode call are split for: two programs on each processor of a large GPU."""


class Column(NamedTuple):
    """The BOS column, as `ropemods.attention.terms.Column` has it."""

    is_bos_BS: Tensor | None
    """uint8."""
    logit_BHT: Tensor | None
    weight_BT: Tensor | None
    """Log of the column's weight."""
    counted_BT: Tensor | None
    """The same for the entropy."""


class Rule(NamedTuple):
    """A temperature that is read off the entropy, as `ropemods.attention.terms.EntropyScale` has it."""

    coefficients_HC: Tensor | None
    strength: Tensor | None
    hold_from: float


class Inputs(NamedTuple):
    """What forward and backward both read."""

    q: Tensor
    k: Tensor
    v: Tensor
    first: Tensor
    past: Tensor
    mask: Tensor | None
    is_bos: Tensor | None
    bos_logit: Tensor | None
    bos_weight: Tensor | None
    bos_counted: Tensor | None
    scale: float
    softcap: float
    """0 is none."""
    spared: bool

    def column(self) -> tuple[Tensor | None, ...]:
        return self.is_bos, self._bos_past(), self.bos_logit, self.bos_weight, self.bos_counted

    def _bos_past(self) -> Tensor | None:
        """One past the last BOS among the keys of each row of the batch: from there on no tile has to look for one."""
        if self.is_bos is None:
            return None
        count = torch.arange(1, self.is_bos.shape[1] + 1, dtype=torch.int32, device=self.is_bos.device)
        return (self.is_bos * count).amax(1)

    def blocks(self, kernel: str) -> Blocks:
        widest = max(self.q.shape[3], self.v.shape[3])
        return blocks_of(kernel, widest, self.q.dtype, self.q.device)

    def mask_and_strides(self) -> tuple[Tensor | None, tuple[int, ...]]:
        if self.mask is None:
            return None, (0, 0, 0, 0)
        mask = self.mask.view(torch.uint8) if self.mask.dtype == torch.bool else self.mask
        return mask, mask.stride()

    def spares_bos(self, kind: int) -> bool:
        return self.spared and self.is_bos is not None and kind != tiles.NO_BETA

    def span_stride(self) -> int:
        return self.first.stride(0) if self.first.shape[0] > 1 else 0

    def constants(self) -> dict[str, Any]:
        kind = tiles.NO_MASK
        if self.mask is not None:
            kind = tiles.BOOLEAN if self.mask.dtype == torch.bool else tiles.ADDITIVE
        return {
            "DIM": padded(self.q.shape[3]),
            "MASK": kind,
            "CAPPED": self.softcap > 0,
            "BOS": self.is_bos is not None,
        }


class Terms(NamedTuple):
    """What the forward alone reads: the backward is given what they came to."""

    slot_logit: Tensor | None
    """(N, B, H, T)"""
    slot_value: Tensor | None
    """(N, H, D), or none of them has one."""
    coefficients: Tensor | None
    strength: Tensor | None
    hold_from: float
    beta: Tensor | None

    def kind(self) -> int:
        if self.beta is not None:
            return tiles.GIVEN
        return tiles.NO_BETA if self.coefficients is None else tiles.FROM_ENTROPY

    def slots(self) -> dict[str, Any]:
        return {"SLOTS": 0 if self.slot_logit is None else len(self.slot_logit), "VALUED": self.slot_value is not None}


class Attended(NamedTuple):
    """What the forward operator returns; what a call has no use for is empty."""

    out: Tensor
    log_z: Tensor
    """Log of the denominator (B, H, T), the sink included."""
    lse: Tensor
    entropy: Tensor
    """Of the untempered row, over the keys that the temperature counts."""
    beta: Tensor
    slope: Tensor
    """∂O/∂β."""


class Upstream(NamedTuple):
    """What the backward reads beside the inputs."""

    d_out: Tensor
    log_z: Tensor
    lse: Tensor
    entropy: Tensor
    delta: Tensor
    """⟨dO, O⟩ (B, H, T)."""
    d_entropy: Tensor | None
    beta: Tensor | None

    def kind(self) -> int:
        if self.beta is None:
            return tiles.NO_BETA
        return tiles.GIVEN if self.d_entropy is None else tiles.FROM_ENTROPY


class Gradients(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    bos_logit: Tensor


def parts(q: Tensor, k: Tensor) -> int:
    """Into how many the keys are split: one where the queries are work enough by themselves."""
    batch, heads, queries, _ = q.shape
    groups, keys = k.shape[1:3]
    if heads // groups * queries > FEW_LANES or queries > 16:
        return 1
    return max(1, min(PROGRAMS // (batch * groups), keys // 128, 32))


def check(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> None:
    """That shapes belong together. Callers without values give the keys for them."""
    batch, heads, queries, head_dim = q.shape
    if k.shape[0] != batch or k.shape[3] != head_dim or heads % k.shape[1] or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"queries of shape {tuple(q.shape)} cannot read keys of shape {tuple(k.shape)} and values of shape "
            f"{tuple(v.shape)}"
        )
    for span in spans:
        if span.dtype != torch.int32 or span.shape not in ((batch, queries), (1, queries)):
            raise ValueError(
                f"spans must be int32 of shape ({batch}, {queries}) or (1, {queries}), not {span.dtype} of "
                f"{tuple(span.shape)}"
            )


def forward(inputs: Inputs, terms: Terms, made: Attended, asked: Blocks | None) -> None:
    q, k, v = inputs[:3]
    *rows_slots, coefficients, strength, hold_from, beta = terms
    out, log_z, lse, entropy, made_beta, slope = made
    mask, mask_strides = inputs.mask_and_strides()
    batch, heads, queries, head_dim = q.shape
    kept = "attend_kept" if slope.numel() else "attend_entropy"
    size = asked or inputs.blocks("attend" if coefficients is None else kept)
    tensors = (
        *(q, k, v, inputs.first, inputs.past, mask, *inputs.column(), *rows_slots, coefficients, strength),
        made_beta if beta is None else beta,
        *(out, log_z, lse, entropy, slope),
    )
    attend_kernels.attend_kernel[triton.cdiv(queries, size.rows), batch * heads](
        *(q if x is None else x for x in tensors),
        *(*q.stride(), *k.stride(), *v.stride(), inputs.span_stride(), *mask_strides, log_z.numel()),
        *(heads, heads // k.shape[1], queries, k.shape[2], head_dim, v.shape[3]),
        *(inputs.scale, inputs.softcap, hold_from),
        **inputs.constants(),
        **_constants(inputs, terms, slope),
        **terms.slots(),
        VDIM=padded(v.shape[3]),
        ROWS=size.rows,
        KEYS=size.keys,
        num_warps=size.warps,
        num_stages=size.stages,
    )


def _constants(inputs: Inputs, terms: Terms, slope: Tensor) -> dict[str, Any]:
    kind = terms.kind()
    powers = 0 if terms.coefficients is None else terms.coefficients.shape[1]
    return {"SPARED": inputs.spares_bos(kind), "BETA": kind, "POWERS": powers, "KEEP": slope.numel() > 0}


def decode(inputs: Inputs, terms: Terms, made: Attended, asked: Blocks | None, parts: int) -> None:
    q, k, v = inputs[:3]
    *rows_slots, coefficients, strength, hold_from, beta = terms
    out, log_z, lse, entropy, made_beta, slope = made
    mask, mask_strides = inputs.mask_and_strides()
    batch, heads, queries, head_dim = q.shape
    groups, keys, value_dim = k.shape[1], k.shape[2], v.shape[3]
    size = asked or inputs.blocks("decode")
    part = triton.cdiv(triton.cdiv(keys, parts), size.keys) * size.keys
    parts = triton.cdiv(keys, part)
    constants = _constants(inputs, terms, slope)

    def numbers(*shape: int) -> Tensor:
        return torch.empty(batch, heads, queries, *shape, dtype=torch.float32, device=q.device)

    grid = parts, batch * groups
    common = (inputs.span_stride(), *mask_strides)
    sizes = heads, heads // groups, queries, keys, head_dim
    lanes = max(16, triton.next_power_of_2(heads // groups * queries))
    options = {"num_warps": size.warps, "num_stages": size.stages}
    tile_sizes = {"ROWS": lanes, "KEYS": size.keys} | options | inputs.constants()
    scores, statistics = q, [q, q, q]
    if constants["BETA"] == tiles.FROM_ENTROPY:
        scores, statistics = numbers(keys), [numbers(parts) for _ in range(3)]
        tensors = q, k, inputs.first, inputs.past, mask, inputs.is_bos, inputs.bos_logit, inputs.bos_counted
        decode_kernels.split_scores_kernel[grid](
            *(q if x is None else x for x in (*tensors, scores, *statistics)),
            *(*q.stride(), *k.stride(), *common, *sizes, part, inputs.scale, inputs.softcap),
            **tile_sizes,
        )
    keep = constants["KEEP"]
    sums = [numbers(parts), numbers(parts), numbers(parts, value_dim)]
    sums += [numbers(parts), numbers(parts), numbers(parts, value_dim)] if keep else sums
    tensors = (
        *(q, k, v, inputs.first, inputs.past, mask, inputs.is_bos, inputs.bos_logit, inputs.bos_weight),
        *(coefficients, strength, made_beta if beta is None else beta, scores, *statistics, lse, entropy, *sums),
    )
    decode_kernels.split_values_kernel[grid](
        *(q if x is None else x for x in tensors),
        *(*q.stride(), *k.stride(), *v.stride(), *common, *sizes, value_dim, part),
        *(inputs.scale, inputs.softcap, hold_from),
        **tile_sizes,
        **constants,
        VDIM=padded(value_dim),
        PARTS=triton.next_power_of_2(parts),
    )
    decode_kernels.merge_kernel[(batch * heads * queries,)](
        *(*sums, *(q if x is None else x for x in rows_slots), out, log_z, slope if keep else q),
        *(log_z.numel(), heads, queries, value_dim, parts),
        **terms.slots(),
        VDIM=padded(value_dim),
        KEEP=keep,
        PARTS=triton.next_power_of_2(parts),
    )


def backward(inputs: Inputs, upstream: Upstream, made: Gradients, asked: Blocks | None) -> None:
    """Fills `made`."""
    q, k, v = inputs[:3]
    dq, dk, dv, d_logit = made
    *given, beta = upstream
    kind = upstream.kind()
    mask, mask_strides = inputs.mask_and_strides()
    batch, heads, queries, head_dim = q.shape
    groups, keys, value_dim = k.shape[1], k.shape[2], v.shape[3]
    rest = [None if x is None else x.contiguous() for x in given]
    tensors = q, k, v, inputs.first, inputs.past, mask, *inputs.column(), beta, *rest
    sizes = (
        *(*q.stride(), *k.stride(), *v.stride(), inputs.span_stride(), *mask_strides),
        *(heads, heads // groups, queries, keys, head_dim, value_dim, inputs.scale, inputs.softcap),
    )
    constants = inputs.constants() | {
        "SPARED": inputs.spares_bos(kind),
        "BETA": kind,
        "VDIM": padded(value_dim),
    }
    read = [q if x is None else x for x in tensors]

    def compiled(size: Blocks) -> dict[str, Any]:
        return constants | {"ROWS": size.rows, "KEYS": size.keys} | {"num_warps": size.warps, "num_stages": size.stages}

    size = asked or inputs.blocks("query_gradients")
    grid = triton.cdiv(queries, size.rows), batch * heads
    gradient_kernels.query_gradients_kernel[grid](*read, dq, d_logit, *sizes, **compiled(size))
    size = asked or inputs.blocks("key_gradients")
    grid = triton.cdiv(keys, size.keys), batch * groups
    gradient_kernels.key_gradients_kernel[grid](*read, dk, dv, *sizes, **compiled(size))
