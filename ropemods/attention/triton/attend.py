"""One operator for an attention call with every term of `ropemods.attention.rows`, and one for its backward.

Forward, one kernel (`attend_kernels`), or three for few queries and many keys (`decode_kernels`); backward, two
(`gradient_kernels`), without atomics. All sums are fp32. Memory is that of the output, once more where a temperature
has a gradient, and for few queries their logits.

Shapes: B batch, H query heads, G key/value heads, T queries, S keys, D head dim, C coefficients of the temperature.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from ropemods.attention.triton import launch, tiles
from ropemods.attention.triton.blocks import Blocks
from ropemods.attention.triton.launch import Column, Inputs, Rule
from ropemods.attention.triton.spans import Spans


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


def attend(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    spans: Spans,
    *,
    scale: float,
    softcap: float | None = None,
    mask: Tensor | None = None,
    column: Column | None = None,
    sink_H: Tensor | None = None,
    rule: Rule | None = None,
    beta_BHT: Tensor | None = None,
    spared: bool = False,
    blocks: Blocks | None = None,
    parts: int | None = None,
) -> Attended:
    """`beta_BHT` is a temperature that is known; `rule` one that is read off the entropy. Gradients reach q, k, v, the
    logits of the column, the sink, β and the coefficients. `parts` splits the keys: 1 never does, None chooses.
    Without `blocks` each kernel has its own.
    """
    launch.check(q_BHTD, k_BGSD, v_BGSD, spans)
    if mask is not None:
        mask = mask.expand(*q_BHTD.shape[:3], k_BGSD.shape[2])
    if column is None:
        column = Column(None, None, None, None)
    if rule is None:
        rule = Rule(None, None, float("inf"))
    grown = [q_BHTD, k_BGSD, v_BGSD, column.logit_BHT, sink_H, beta_BHT, rule.coefficients_HC]
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in grown)
    if parts is None:
        parts = launch.parts(q_BHTD, k_BGSD)
    rows, tile_keys = (0, 0) if blocks is None else blocks[:2]
    given = q_BHTD, k_BGSD, v_BGSD, *spans, mask, *column, sink_H, *rule, beta_BHT
    return Attended(*_attend_rows(*given, scale, softcap or 0.0, spared, keep, parts, rows, tile_keys))


@custom_op("ropemods::attend_rows", mutates_args=())
def _attend_rows(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, past: Tensor, mask: Tensor | None,
    is_bos: Tensor | None, bos_logit: Tensor | None, bos_weight: Tensor | None, bos_counted: Tensor | None,
    sink: Tensor | None, coefficients: Tensor | None, strength: Tensor | None, hold_from: float, beta: Tensor | None,
    scale: float, softcap: float, spared: bool, keep: bool, parts: int, rows: int, keys: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = Inputs(q, k, v, first, past, mask, is_bos, bos_logit, bos_weight, bos_counted, scale, softcap, spared)
    rest = sink, coefficients, strength, hold_from, beta
    made = _empty(q, v, coefficients is not None, beta is not None, keep)
    run = launch.forward if parts == 1 else launch.decode
    run(inputs, *rest, made, Blocks(rows, keys) if rows else None, parts)
    return made


@_attend_rows.register_fake
def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    coefficients, beta, keep = rest[8], rest[11], rest[15]
    return _empty(q, v, coefficients is not None, beta is not None, keep)


def _empty(q: Tensor, v: Tensor, read: bool, given: bool, keep: bool) -> tuple[Tensor, ...]:
    def numbers(there: bool) -> Tensor:
        return torch.empty(q.shape[:3] if there else (0,), dtype=torch.float32, device=q.device)

    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    slope = torch.empty_like(out) if keep and (read or given) else out.new_empty(0)
    return out, numbers(True), numbers(read), numbers(read), numbers(read), slope


@custom_op("ropemods::attend_rows_backward", mutates_args=())
def _attend_rows_backward(
    d_out: Tensor, delta: Tensor, d_entropy: Tensor | None, q: Tensor, k: Tensor, v: Tensor, first: Tensor,
    past: Tensor, mask: Tensor | None, is_bos: Tensor | None, bos_logit: Tensor | None, bos_weight: Tensor | None,
    bos_counted: Tensor | None, beta: Tensor | None, log_z: Tensor, lse: Tensor, entropy: Tensor,
    scale: float, softcap: float, spared: bool, rows: int, keys: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = Inputs(q, k, v, first, past, mask, is_bos, bos_logit, bos_weight, bos_counted, scale, softcap, spared)
    kind = tiles.NO_BETA if beta is None else tiles.GIVEN if d_entropy is None else tiles.FROM_ENTROPY
    made = _empty_gradients(d_out, delta, d_entropy, q, k, v, first, past, mask, is_bos)
    blocks = Blocks(rows, keys, stages=1) if rows else None
    launch.backward(inputs, kind, beta, (d_out, log_z, lse, entropy, delta, d_entropy), made, blocks)
    return made


@_attend_rows_backward.register_fake
def _empty_gradients(
    d_out: Tensor, delta: Tensor, d_entropy: Tensor | None, q: Tensor, k: Tensor, v: Tensor, first: Tensor,
    past: Tensor, mask: Tensor | None, is_bos: Tensor | None, *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return dq, dk, dv, torch.empty((0,) if is_bos is None else delta.shape, dtype=torch.float32, device=q.device)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, first, past, mask, is_bos, logit, weight, counted, sink, coefficients, strength, hold_from, beta, *_ = (
        inputs
    )
    ctx.scale, ctx.softcap, ctx.spared, _, _, ctx.rows, ctx.keys = inputs[15:]
    ctx.hold_from = hold_from
    ctx.mark_non_differentiable(*output[1:])
    column = is_bos, logit, weight, counted
    ctx.save_for_backward(q, k, v, first, past, mask, *column, sink, coefficients, strength, beta, *output)


def _gradients(ctx: Any, d_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, sink, coefficients, strength, beta, out, log_z, lse, entropy, made_beta, slope = ctx.saved_tensors
    d_wide = d_out.float()
    delta = (d_wide * out.float()).sum(-1)
    d_beta = d_entropy = d_coefficients = d_sink = None
    if beta is not None or coefficients is not None:
        d_beta = (d_wide * slope.float()).sum(-1)
    if coefficients is not None:
        d_coefficients, d_entropy = _through_rule(d_beta, entropy, coefficients, strength, ctx.hold_from)
    if sink is not None:
        # The sink's share of a row is e^(sink − log z), and its value is 0.
        d_sink = -(torch.exp(sink[:, None] - log_z) * delta).sum((0, 2))
    options = ctx.scale, ctx.softcap, ctx.spared, ctx.rows, ctx.keys
    known = beta if coefficients is None else made_beta
    dq, dk, dv, d_logit = _attend_rows_backward(
        d_out, delta, d_entropy, *inputs, known, log_z, lse, entropy, *options
    )  # fmt: skip
    if inputs[6] is None:
        d_logit = None
    d_given = None if beta is None else d_beta
    nones = [None] * 3
    return dq, dk, dv, *nones, None, d_logit, None, None, d_sink, d_coefficients, None, None, d_given, *[None] * 7


def _through_rule(
    d_beta: Tensor, entropy: Tensor, coefficients: Tensor, strength: Tensor, hold_from: float
) -> tuple[Tensor, Tensor]:
    """dβ taken back through `tiles.beta_of`: to the coefficients (H, C) and the entropy (B, H, T)."""
    h = entropy.clamp(max=hold_from)
    value, steepness = torch.zeros_like(h), torch.zeros_like(h)
    for power in range(coefficients.shape[1]):
        steepness = steepness * h + value
        value = value * h + coefficients[:, power, None]
    d_value = torch.where((entropy > 0.5) & (value >= 1), d_beta * strength, torch.zeros_like(value))
    d_entropy = torch.where(entropy <= hold_from, d_value * steepness, torch.zeros_like(value))
    of_power, d_coefficients = torch.ones_like(h), []
    for _ in range(coefficients.shape[1]):
        d_coefficients.append((d_value * of_power).sum((0, 2)))
        of_power = of_power * h
    return torch.stack(d_coefficients[::-1], 1), d_entropy


_attend_rows.register_autograd(_gradients, setup_context=_keep)
