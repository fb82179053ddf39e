"""The BOS column scored apart on a CPU: closed in the kernel, and added back as a sink that carries a value.

Let the kernel run with the BOS column closed and return out and lse. With the column's logit b_i and value v_bos,
and slots (`slots`) if there are any,

    lse′ = log(e^lse + e^b + Σ e^z)      out′ = e^(lse − lse′) · out + e^(b − lse′) · v_bos + Σ e^(z − lse′) · ν

and the kernel's own backward is exact for the other keys when it is handed lse′ and out′, as in `flash`. The column's
share P = e^(b − lse′) has gradients of its own: db = P (⟨dO, v_bos⟩ − ⟨dO, out′⟩) and dv_bos = Σ P dO. So neither a
wider head nor a mask of T × S is needed.

The CPU kernel takes a mask of one row, (B, 1, 1, S), beside the causal pattern, at no cost that can be measured.

For calls without a mask, which have one BOS a row; packed and padded batches go by `sdpa.widened`.

Shapes: B batch, H query heads, G key/value heads, T queries, S keys, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ropemods.attention.rows import Rows, wide
from ropemods.attention.slots import Slots, gradients, log_total, with_values

aten = torch.ops.aten


def fits(rows: Rows) -> bool:
    """Whether a call is one for this file."""
    q, k, v = rows[:3]
    return (
        rows.column is not None
        and q.device.type == "cpu"
        and rows.mask is None
        and rows.causal
        and rows.dropout == 0
        and q.shape[2] == k.shape[2]
        and q.shape[2] > 1
        and v.shape[3] == q.shape[3]
    )


def attend(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    is_bos_BS: Tensor,
    logit_BHT: Tensor,
    slots: Slots | None,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out and the log of the denominator of causal rows whose BOS column has `logit_BHT`, tempered and weighed."""
    return _attend_apart(q_BHTD, k_BGSD, v_BGSD, is_bos_BS, logit_BHT, *(slots or (None, None)), scale)


def row_entropy(q_BHTD: Tensor, k_BGSD: Tensor, is_bos_BS: Tensor, logit_BHT: Tensor, *, scale: float) -> Tensor:
    """H of the same rows (B, H, T), differentiable in q, k and the column's logit."""
    entropy, *_ = _entropy_apart(q_BHTD, k_BGSD, is_bos_BS, logit_BHT, scale)
    return entropy


def _mask(is_bos: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(is_bos, dtype=dtype).masked_fill_(is_bos, float("-inf"))[:, None, None, :]


def _forward(q: Tensor, k: Tensor, v: Tensor, is_bos: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out and lse of every row with the BOS column closed; 0 and -inf for a row with nothing else to see."""
    kernel = aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = kernel(q, k, v, 0.0, True, attn_mask=_mask(is_bos, q.dtype), scale=scale)
    # Of a row that sees nothing the kernel says that lse is 0.
    lonely = is_bos.cumsum(1) == torch.arange(1, is_bos.shape[1] + 1)
    return out, lse.masked_fill(lonely[:, None], float("-inf"))


def _backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, is_bos: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = aten._scaled_dot_product_flash_attention_for_cpu_backward
    return kernel(d_out, q, k, v, out, lse, 0.0, True, attn_mask=_mask(is_bos, q.dtype), scale=scale)


def _heads(x_BGD: Tensor, heads: int) -> Tensor:
    """One vector a query head, as a column (B, H, D, 1)."""
    return x_BGD.repeat_interleave(heads // x_BGD.shape[1], 1).unsqueeze(-1)


def _values_of_bos(v: Tensor, is_bos: Tensor) -> tuple[Tensor, Tensor]:
    """The BOS's value (B, G, D) and whether a query sees it (B, 1, T)."""
    if bool((is_bos.sum(1) > 1).any()):
        raise ValueError("a causal call without a mask has more than one BOS in a row; packed sequences need a mask")
    index = is_bos.to(torch.uint8).argmax(1)[:, None, None, None]
    value = v.gather(2, index.expand(-1, v.shape[1], 1, v.shape[3])).squeeze(2)
    return value, is_bos.cummax(1).values[:, None]


@custom_op("ropemods::attend_apart", mutates_args=())
def _attend_apart(
    q: Tensor, k: Tensor, v: Tensor, is_bos: Tensor, logit: Tensor, slot: Tensor | None, slot_value: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = _forward(q, k, v, is_bos, scale)
    value, sees = _values_of_bos(v, is_bos)
    logit = torch.where(sees, logit.to(lse.dtype), float("-inf"))
    log_z = log_total(torch.logaddexp(lse, logit), slot)
    share = torch.exp(logit - log_z).unsqueeze(-1)
    kept = torch.exp(lse - log_z).unsqueeze(-1)
    # A row that sees nothing at all, without slots, stays 0.
    empty = (log_z == float("-inf")).unsqueeze(-1)
    share, kept = share.masked_fill(empty, 0), kept.masked_fill(empty, 0)
    out = out.to(lse.dtype).mul_(kept) if out.dtype == lse.dtype else out.to(lse.dtype) * kept
    out.addcmul_(share, _heads(value, q.shape[1]).transpose(2, 3).to(lse.dtype))
    return with_values(out, log_z, slot, slot_value).to(q.dtype), log_z


@_attend_apart.register_fake
def _like_attention(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[:3], dtype=wide(q.dtype))


@custom_op("ropemods::attend_apart_backward", mutates_args=())
def _attend_apart_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, is_bos: Tensor, logit: Tensor, out: Tensor, log_z: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = _backward(d_out, q, k, v, is_bos, out, log_z, scale)
    value, sees = _values_of_bos(v, is_bos)
    batch, heads = q.shape[:2]
    groups = v.shape[1]
    wide = d_out.to(log_z.dtype)
    share = torch.exp(torch.where(sees & (log_z > float("-inf")), logit.to(log_z.dtype) - log_z, float("-inf")))
    delta = (wide * out).sum(-1)
    from_value = (wide @ _heads(value, heads).to(wide.dtype)).squeeze(-1)
    d_logit = share * (from_value - delta)
    d_value = (share.unsqueeze(2) @ wide).view(batch, groups, heads // groups, -1).sum(2)
    dv = torch.where(is_bos[:, None, :, None], d_value[:, :, None].to(dv.dtype), dv)
    return dq, dk, dv, d_logit.to(logit.dtype)


@_attend_apart_backward.register_fake
def _like_inputs(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, is_bos: Tensor, logit: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, d_logit = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v, logit))
    return dq, dk, dv, d_logit


def _keep_for_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _attention_gradients(ctx: Any, d_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, slot, slot_value, out, log_z = ctx.saved_tensors  # unpacked once, as gradient checkpointing asks
    dq, dk, dv, d_logit = _attend_apart_backward(d_out, *inputs, out, log_z, ctx.scale)
    wide = d_out.to(log_z.dtype)
    of_slots = (None, None) if slot is None else gradients(wide, (wide * out).sum(-1), log_z, slot, slot_value)
    return dq, dk, dv, None, d_logit, *of_slots, None


_attend_apart.register_autograd(_attention_gradients, setup_context=_keep_for_attention)


@custom_op("ropemods::entropy_apart", mutates_args=())
def _entropy_apart(q: Tensor, k: Tensor, is_bos: Tensor, logit: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """H, and what its backward wants: lse′ and the mean key, the column's share in it a multiple of q."""
    mean_key, lse = _forward(q, k, k, is_bos, scale)
    logit = torch.where(is_bos.cummax(1).values[:, None], logit.to(lse.dtype), float("-inf"))
    log_z = torch.logaddexp(lse, logit)
    empty = log_z == float("-inf")
    share, kept = (torch.exp(x - log_z).masked_fill(empty, 0) for x in (logit, lse))
    wide = q.to(lse.dtype)
    # What the kernel's backward wants of the column is a value whose product with the query is the logit.
    reach = torch.where(share > 0, share * logit, 0) / (scale * wide.square().sum(-1)).clamp(min=1e-30)
    mean_key = (mean_key * kept.unsqueeze(-1)).addcmul_(wide, reach.unsqueeze(-1))
    entropy = torch.where(empty, 0, log_z - scale * (wide * mean_key).sum(-1))
    return entropy, log_z, mean_key.to(q.dtype)


@_entropy_apart.register_fake
def _like_entropy(q: Tensor, k: Tensor, is_bos: Tensor, logit: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    entropy, log_z = (torch.empty(q.shape[:3], dtype=wide(q.dtype)) for _ in range(2))
    return entropy, log_z, torch.empty(q.shape, dtype=q.dtype)


@custom_op("ropemods::entropy_apart_backward", mutates_args=())
def _entropy_apart_backward(
    d_entropy: Tensor, entropy: Tensor, q: Tensor, k: Tensor, is_bos: Tensor, logit: Tensor, log_z: Tensor,
    mean_key: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    d_mean = (q * (-scale * d_entropy).unsqueeze(-1)).to(q.dtype)
    dq, dk, _ = _backward(d_mean, q, k, k, is_bos, mean_key, log_z, scale)
    log_share = torch.where(
        is_bos.cummax(1).values[:, None] & (log_z > float("-inf")), logit.to(log_z.dtype) - log_z, float("-inf")
    )
    some = log_share > float("-inf")
    d_logit = -d_entropy * torch.exp(log_share) * torch.where(some, log_share + entropy, 0)
    return dq, dk, d_logit.to(logit.dtype)


@_entropy_apart_backward.register_fake
def _like_queries_and_keys(
    d_entropy: Tensor, entropy: Tensor, q: Tensor, k: Tensor, is_bos: Tensor, logit: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, d_logit = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, logit))
    return dq, dk, d_logit


def _keep_for_entropy(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale = inputs
    entropy, log_z, mean_key = output
    ctx.save_for_backward(entropy, *tensors, log_z, mean_key)
    ctx.mark_non_differentiable(log_z, mean_key)


def _entropy_gradients(ctx: Any, d_entropy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, d_logit = _entropy_apart_backward(d_entropy, *ctx.saved_tensors, ctx.scale)
    return dq, dk, None, d_logit, None


_entropy_apart.register_autograd(_entropy_gradients, setup_context=_keep_for_entropy)
