"""Few query rows on a CPU without gradients, as in decoding: keys and values are read once, the scores stay between.

The scores of a few rows are small beside the keys they came from, and going through them is cheap when it happens in
place. Query heads that share a key/value head are multiplied with it together; keys and values in half precision are
widened a run at a time. Hidden keys have a logit so low that e to it is 0, and yet finite: 0 · (−∞) has no value.

Shapes: B batch, H query heads, G key/value heads, T queries, S keys, D head dim, N lanes: heads of a group × queries.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from ropemods.attention.rows import Rows, Temperature, soft_capped, wide

ROWS = 8
"""Up to how many queries."""
HIDDEN, CLOSED, NOTHING = -1e30, -1e20, -1e19
"""The logit of a key that the mask hides, that of a closed BOS column, and what every row that sees a key is above."""
RUN = 1024
"""Keys that are widened at a time."""


def fits(rows: Rows) -> bool:
    q, k, v = rows[:3]
    grown = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, rows.mask, rows.sink_H, rows.beta_BHT)
    )
    if torch.is_grad_enabled() and rows.temperature is not None:
        grown = grown or rows.temperature.coefficients_HC.requires_grad
    return q.device.type == "cpu" and q.shape[2] <= ROWS and rows.dropout == 0 and not grown


def attend(rows: Rows) -> tuple[Tensor, Tensor]:
    """Returns out_BHTD and the log of the denominator (B, H, T)."""
    bos, rule = rows.bos, rows.temperature
    is_bos = logit = weight = counted = coefficients = strength = None
    spared = rows.beta_spares_bos if rule is None else rule.spare_bos
    if bos is not None:
        dtype = bos.logit_BHT.dtype
        is_bos, logit, weight = bos.is_bos_BS, bos.logit_BHT, bos.log_weight_BT(dtype)[:, None]
        counted = bos.closed().log_weight_BT(dtype)[:, None] if spared else weight.clone()
        if rows.mask is not None and rows.mask.dtype != torch.bool:
            # What the mask adds to the BOS column; where it hides the column, `_put` sees that for itself.
            added = _added(rows.mask).masked_fill(~is_bos[:, None, None, :], 0.0)
            weight, counted = weight + added.sum(-1).to(dtype), counted + added.sum(-1).to(dtype)
    hold_from = None
    if rule is not None:
        coefficients, strength, hold_from = rule.coefficients_HC, rule.strength, rule.hold_from
    mask = rows.mask
    if rows.causal:
        mask = torch.ones(rows.q_BHTD.shape[2], rows.k_BGSD.shape[2], dtype=torch.bool).tril()[None, None]
    return _attend_few(
        *(*rows[:3], mask, is_bos, logit, weight, counted, rows.sink_H, rows.beta_BHT, coefficients, strength),
        *(hold_from, spared, rows.scale, rows.softcap),
    )


@custom_op("ropemods::attend_few", mutates_args=())
def _attend_few(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_bos: Tensor | None, logit: Tensor | None,
    weight: Tensor | None, counted: Tensor | None, sink: Tensor | None, beta: Tensor | None,
    coefficients: Tensor | None, strength: Tensor | None, hold_from: float | None, spared: bool, scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    groups = k.shape[1]
    s = _scores(q, k, scale)  # (B, H, T, S), worked on in place
    if softcap is not None:
        s = soft_capped(s, softcap)
    at, columns = (None, None) if is_bos is None else is_bos.nonzero(as_tuple=True)
    if coefficients is not None:
        assert strength is not None
        # As an entropy reads it, hidden keys first; what hides a key hides it also when it is multiplied by β.
        _hide(s, mask)
        _put(s, at, columns, logit, counted)
        highest = _highest(s)
        s.sub_(highest)
        weights = s.exp()
        total = weights.sum(-1)
        rows_s, rows_weights = s.flatten(0, 2).unsqueeze(1), weights.flatten(0, 2).unsqueeze(-1)
        entropy = total.log() - torch.bmm(rows_s, rows_weights).view_as(total) / total
        del weights, rows_weights
        entropy = torch.where(total == 0, 0.0, entropy)
        beta = Temperature(coefficients, strength, hold_from, spared).beta(entropy).unsqueeze(-1)
        s.mul_(beta)
        base = beta * highest
        if mask is not None and mask.dtype != torch.bool and bool((added := _added(mask)).any()):
            s.add_((1 - beta) * added)  # β sharpens the logits, not what the mask adds to them
    else:
        if beta is not None:
            beta = beta.unsqueeze(-1)
            s.mul_(beta)
        _hide(s, mask)
        base = torch.zeros_like(s[..., :1])
    _put(s, at, columns, logit if beta is None or spared or logit is None else logit * beta.squeeze(-1), weight, base)
    # What e is taken of is below 0 here, but where the BOS column or the sink stands above all keys.
    highest = _highest(s)
    if coefficients is None or spared or bool((highest > 0).any()):
        s.sub_(highest)
        base = base + highest
    weights = s.exp_()
    total = weights.sum(-1, keepdim=True)
    log_z = (base + total.log()).squeeze(-1)
    if sink is not None:
        sink = sink.to(log_z.dtype)[:, None]
        log_z = torch.logaddexp(log_z, sink)
        # Not by way of log_z: among large logits its rounding would show in the output.
        total = total + torch.exp(sink.unsqueeze(-1) - base)
    share = torch.where(total == 0, 0.0, 1 / total)
    out = _mixed(weights.view(weights.shape[0], groups, -1, weights.shape[-1]), v)
    return (out.view(*q.shape[:3], v.shape[3]) * share).to(v.dtype), log_z


@_attend_few.register_fake
def _like_queries(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty((*q.shape[:3], v.shape[3]), dtype=v.dtype), torch.empty(q.shape[:3], dtype=wide(q.dtype))


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    dtype, groups = wide(q.dtype), k.shape[1]
    q_BGND = (q.to(dtype) * scale).unflatten(1, (groups, -1)).flatten(2, 3)
    # Keys times queries, and then turned: torch's product the other way round is half as fast for a few lanes.
    q_BGDN = q_BGND.transpose(2, 3)
    runs = [k] if k.dtype == dtype else k.split(RUN, 2)
    parts = [torch.matmul(run.to(dtype), q_BGDN) for run in runs]
    s_BGSN = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
    s = s_BGSN.transpose(2, 3).contiguous()
    return s.view(*q.shape[:3], k.shape[2])


def _mixed(weights_BGNS: Tensor, v: Tensor) -> Tensor:
    if v.dtype == weights_BGNS.dtype:
        return torch.matmul(weights_BGNS, v)
    runs = zip(weights_BGNS.split(RUN, -1), v.split(RUN, 2), strict=True)
    return torch.stack([torch.matmul(weights, run.to(weights.dtype)) for weights, run in runs]).sum(0)


def _highest(s: Tensor) -> Tensor:
    """Of each row; 0 for one that sees nothing."""
    highest = s.amax(-1, keepdim=True)
    return torch.where(highest <= NOTHING, 0.0, highest)


def _hide(s: Tensor, mask: Tensor | None) -> None:
    if mask is None:
        return
    if mask.dtype == torch.bool:
        s.masked_fill_(~mask, HIDDEN)
    else:
        s.add_(mask).clamp_(min=HIDDEN)


def _added(mask: Tensor) -> Tensor:
    """What an additive mask adds to keys that it does not hide."""
    return torch.where(mask > NOTHING, mask, 0.0)


def _put(
    s: Tensor, at: Tensor | None, columns: Tensor | None, logit: Tensor | None, weight: Tensor | None,
    base: Tensor | float = 0.0,
) -> None:  # fmt: skip
    """The BOS columns' logits into scores that `base` was taken from; a column that the mask hides stays hidden."""
    if at is None or columns is None or logit is None or weight is None or not len(at):
        return
    value = (logit + weight).to(s.dtype)
    value = value if isinstance(base, float) else value - base.squeeze(-1)
    here = s[at, :, :, columns]
    s[at, :, :, columns] = torch.where(here < 1e5 * CLOSED, HIDDEN, value[at].clamp(min=CLOSED))
