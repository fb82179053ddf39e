"""Kernels that return a row's log-sum-exp, and what can be computed exactly from them in O(T) memory.

`row_entropy` needs one flash call with the keys in the values' place, because with E_i = Σ_j p_ij s_ij

    H_i = lse_i − E_i   and   E_i = scale · ⟨q_i, Attn(q, k, k)_i⟩.

Its backward is a flash backward: dH_i/ds_ij = −p_ij (s_ij − E_i), which is the logit gradient of attention with
values k, output Attn(q, k, k) and output gradient −scale · q_i; dq and dk are kept, dv is nobody's.

`attend_with_slots` joins slots to every row, and hands the kernel's own backward what `slots` says.

Both are custom operators, so that a graph holds each as one node. They are written in operators that torch can trace
without data, so each function is its own fake.

Shapes: B batch, H query heads, G key/value heads, T queries, S keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ropemods.attention import slots
from ropemods.attention.capabilities import WIDEST
from ropemods.attention.slots import Slots

aten = torch.ops.aten


def _forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The kernel's output and log-sum-exp."""
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    if _takes_flash(q, mask):
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]
    bias = aligned(mask, q, k)
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, causal, scale=scale)
    return out, lse[..., : q.shape[2]].clone()


def _backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of the kernel, for the `out` and `lse` it is handed."""
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d_out, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale
        )
    # The state of the random numbers of dropout, which is never read: there is none.
    state = torch.empty((), dtype=torch.int64)
    if _takes_flash(q, mask):
        queries, keys = q.shape[2], k.shape[2]
        return aten._scaled_dot_product_flash_attention_backward(
            d_out, q, k, v, out, lse, None, None, queries, keys, 0.0, causal, state, state, scale=scale
        )
    # The kernel wants its log-sum-exp in rows of a multiple of 32, as it returned it.
    padded = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32)).contiguous()
    bias = aligned(mask, q, k)
    return aten._scaled_dot_product_efficient_attention_backward(
        d_out, q, k, v, bias, out, padded, state, state, 0.0, (True, True, True, False), causal, scale=scale
    )[:3]


def _takes_flash(q: Tensor, mask: Tensor | None) -> bool:
    """Whether CUDA's flash kernel takes a call; the memory-efficient one takes the others, wider heads too."""
    return mask is None and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= WIDEST


def aligned(mask: Tensor | None, q_BHTD: Tensor, k_BHSD: Tensor) -> Tensor | None:
    """An additive mask as the memory-efficient kernel reads it: one of every head, its rows 16 numbers apart or a
    multiple of that. Nothing of the size of heads × T × S is made.
    """
    if mask is None:
        return None
    keys = k_BHSD.shape[2]
    mask = mask.expand(*mask.shape[:-1], keys)
    spare = -keys % 16
    if spare or mask.stride(-1) != 1:
        mask = torch.nn.functional.pad(mask, (0, spare)).contiguous()[..., :keys]
    return mask.expand(*q_BHTD.shape[:3], keys)


def _as_operator(function: Callable[..., Any]) -> Any:
    """The function as `torch.ops.ropemods.<its name>`, and as its own fake."""
    operator = custom_op(f"ropemods::{function.__name__.strip('_')}", function, mutates_args=())
    operator.register_fake(function)
    return operator


@_as_operator
def _row_entropy(
    q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """H, and what its backward wants: Attn(q, k, k) and lse."""
    mean_key, lse = _forward(q, k, k, mask, causal, scale)
    mean_logit = (q.to(lse.dtype) * mean_key.to(lse.dtype)).sum(-1) * scale
    return lse - mean_logit, mean_key, lse


@_as_operator
def _attend_with_slots(
    q: Tensor, k: Tensor, v: Tensor, logit: Tensor | None, value: Tensor | None, mask: Tensor | None, causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out and the log of the denominator, the slots in both."""
    out, lse = _forward(q, k, v, mask, causal, scale)
    if value is not None and mask is not None:  # a row that sees nothing reads its slots; some kernels call its lse 0
        lse = lse.masked_fill((mask == float("-inf")).all(-1), float("-inf"))
    return slots.joined(out, lse, None if logit is None else Slots(logit, value))


def _keep_for_entropy(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, mask, ctx.causal, ctx.scale = inputs
    _, mean_key, lse = output
    ctx.save_for_backward(q, k, mask, mean_key, lse)
    ctx.mark_non_differentiable(mean_key, lse)


def _entropy_gradients(ctx: Any, d_entropy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    q, k, mask, mean_key, lse = ctx.saved_tensors
    d_mean_key = (q * (-ctx.scale * d_entropy).unsqueeze(-1)).to(q.dtype)
    dq, dk, _ = _backward(d_mean_key, q, k, k, mask, mean_key, lse, ctx.causal, ctx.scale)
    return dq, dk, None, None, None


def _keep_for_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _attention_gradients(ctx: Any, d_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, logit, value, mask, out, log_z = ctx.saved_tensors
    dq, dk, dv = _backward(d_out, q, k, v, mask, out, log_z, ctx.causal, ctx.scale)
    of_slots: tuple[Tensor | None, ...] = None, None
    if logit is not None:
        d_wide = d_out.to(log_z.dtype)
        delta = (d_wide * out.to(log_z.dtype)).sum(-1)
        of_slots = slots.gradients(d_wide, delta, log_z, logit, value)
    return dq, dk, dv, *of_slots, None, None, None


_row_entropy.register_autograd(_entropy_gradients, setup_context=_keep_for_entropy)
_attend_with_slots.register_autograd(_attention_gradients, setup_context=_keep_for_attention)


def _like_queries(x_BGSD: Tensor, q_BHTD: Tensor) -> Tensor:
    """Key/value heads repeated for kernels that want as many as query heads (the CPU's takes them grouped)."""
    if q_BHTD.device.type == "cpu":
        return x_BGSD
    return x_BGSD.repeat_interleave(q_BHTD.shape[1] // x_BGSD.shape[1], dim=1)


def row_entropy(q_BHTD: Tensor, k_BGSD: Tensor, *, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """H of every row (B, H, T), in nats, differentiable in q and k."""
    entropy, *_ = _row_entropy(q_BHTD, _like_queries(k_BGSD, q_BHTD), mask, causal, scale)
    return entropy


def attend_with_slots(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    slots: Slots | None,
    *,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out (B, H, T, D) and the log of each row's denominator (B, H, T), slots included; the log has no gradient."""
    k_BHSD, v_BHSD = _like_queries(k_BGSD, q_BHTD), _like_queries(v_BGSD, q_BHTD)
    return _attend_with_slots(q_BHTD, k_BHSD, v_BHSD, *(slots or (None, None)), mask, causal, scale)
