"""One operator for an attention call with every term of `ropemods.attention.rows`, and one for its backward.

Forward, one kernel (`attend_kernels`), or three for few queries and many keys (`decode_kernels`); backward, two
(`gradient_kernels`), without atomics. All sums are fp32. Memory is that of the output, once more where a temperature
has a gradient, and for few queries their logits.

Shapes: B batch, H query heads, G key/value heads, T queries, S keys, D head dim, C coefficients of the temperature.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ropemods.attention import slots
from ropemods.attention.operators import operator
from ropemods.attention.slots import Slots
from ropemods.attention.triton import launch, tiles
from ropemods.attention.triton.blocks import Blocks
from ropemods.attention.triton.launch import Attended, Column, Gradients, Inputs, Rule, Terms, Upstream
from ropemods.attention.triton.spans import Spans


class Options(NamedTuple):
    """How the forward goes about it."""

    keep: bool
    """Whether a backward may follow."""
    parts: int
    """Into how many the keys are split."""
    rows: int
    """Of a tile; 0 leaves its size to `blocks`."""
    keys: int

    def tile(self, stages: int = 2) -> Blocks | None:
        return Blocks(self.rows, self.keys, stages=stages) if self.rows else None


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
    slots: Slots | None = None,
    rule: Rule | None = None,
    beta_BHT: Tensor | None = None,
    spared: bool = False,
    blocks: Blocks | None = None,
    parts: int | None = None,
) -> Attended:
    """`beta_BHT` is a temperature that is known; `rule` one that is read off the entropy. Gradients reach q, k, v, the
    logits of the column, slots, β and the coefficients. `parts` splits the keys: 1 never does, None chooses.
    Without `blocks` each kernel has its own.
    """
    launch.check(q_BHTD, k_BGSD, v_BGSD, spans)
    if mask is not None:
        mask = mask.expand(*q_BHTD.shape[:3], k_BGSD.shape[2])
    if column is None:
        column = Column(None, None, None, None)
    if rule is None:
        rule = Rule(None, None, float("inf"))
    logit, value = slots or (None, None)
    grown = [q_BHTD, k_BGSD, v_BGSD, column.logit_BHT, logit, value, beta_BHT, rule.coefficients_HC]
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in grown)
    if parts is None:
        parts = launch.parts(q_BHTD, k_BGSD)
    return attend_rows(
        Inputs(q_BHTD, k_BGSD, v_BGSD, *spans, mask, *column, scale, softcap or 0.0, spared),
        Terms(logit, value, *rule, beta_BHT),
        Options(keep, parts, *((0, 0) if blocks is None else blocks[:2])),
    )


@operator("attend_rows", Inputs, Terms, Options, returns=Attended)
def attend_rows(inputs: Inputs, terms: Terms, options: Options) -> Attended:
    made = _empty(inputs, terms, options)
    if options.parts == 1:
        launch.forward(inputs, terms, made, options.tile())
    else:
        launch.decode(inputs, terms, made, options.tile(), options.parts)
    return made


def _empty(inputs: Inputs, terms: Terms, options: Options) -> Attended:
    q, v, kind = inputs.q, inputs.v, terms.kind()

    def numbers(there: bool) -> Tensor:
        return torch.empty(q.shape[:3] if there else (0,), dtype=torch.float32, device=q.device)

    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    slope = torch.empty_like(out) if options.keep and kind != tiles.NO_BETA else out.new_empty(0)
    read = terms.coefficients is not None
    return Attended(out, numbers(True), numbers(read), numbers(read), numbers(read), slope)


@operator("attend_rows_backward", Inputs, Upstream, Options, returns=Gradients)
def attend_rows_backward(inputs: Inputs, upstream: Upstream, options: Options) -> Gradients:
    made = _empty_gradients(inputs, upstream, options)
    launch.backward(inputs, upstream, made, options.tile(stages=1))
    return made


def _empty_gradients(inputs: Inputs, upstream: Upstream, _: Options) -> Gradients:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs[:3])
    shape = (0,) if inputs.is_bos is None else upstream.delta.shape
    return Gradients(dq, dk, dv, torch.empty(shape, dtype=torch.float32, device=dq.device))


def _gradients(
    d_out: Tensor, inputs: Inputs, terms: Terms, options: Options, made: Attended
) -> dict[str, Tensor | None]:
    d_wide = d_out.float()
    delta = (d_wide * made.out.float()).sum(-1)
    found: dict[str, Tensor | None] = {}
    d_entropy, beta = None, terms.beta
    d_beta = (d_wide * made.slope.float()).sum(-1) if made.slope.numel() else None
    if beta is not None:
        found["beta"] = d_beta
    if terms.coefficients is not None:
        found["coefficients"], d_entropy = _through_rule(d_beta, made.entropy, terms)
        beta = made.beta
    if terms.slot_logit is not None:
        of_slots = slots.gradients(d_wide, delta, made.log_z, terms.slot_logit, terms.slot_value)
        found["slot_logit"], found["slot_value"] = of_slots
    upstream = Upstream(d_out, made.log_z, made.lse, made.entropy, delta, d_entropy, beta)
    found |= attend_rows_backward(inputs, upstream, options)._asdict()
    return found if inputs.is_bos is not None else found | {"bos_logit": None}


def _through_rule(d_beta: Tensor | None, entropy: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """dβ taken back through `tiles.beta_of`: to the coefficients (H, C) and the entropy (B, H, T)."""
    coefficients, hold_from = terms.coefficients, terms.hold_from
    assert d_beta is not None and coefficients is not None and terms.strength is not None
    h = entropy.clamp(max=hold_from)
    value, steepness = torch.zeros_like(h), torch.zeros_like(h)
    for power in range(coefficients.shape[1]):
        steepness = steepness * h + value
        value = value * h + coefficients[:, power, None]
    d_value = torch.where((entropy > 0.5) & (value >= 1), d_beta * terms.strength, torch.zeros_like(value))
    d_entropy = torch.where(entropy <= hold_from, d_value * steepness, torch.zeros_like(value))
    of_power, d_coefficients = torch.ones_like(h), []
    for _ in range(coefficients.shape[1]):
        d_coefficients.append((d_value * of_power).sum((0, 2)))
        of_power = of_power * h
    return torch.stack(d_coefficients[::-1], 1), d_entropy


attend_rows.fake(_empty)
attend_rows.gradients(_gradients)
attend_rows_backward.fake(_empty_gradients)
