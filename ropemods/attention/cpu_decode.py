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

from ropemods.attention import slots
from ropemods.attention.rows import Rows, scaled_column, soft_capped, wide
from ropemods.attention.terms import EntropyScale

ROWS = 8
"""Up to how many queries."""
HIDDEN, CLOSED, NOTHING = -1e30, -1e20, -1e19
"""The logit of a key that the mask hides, that of a closed BOS column, and what every row that sees a key is above."""
RUN = 1024
"""Keys that are widened at a time."""


def fits(rows: Rows) -> bool:
    q, k, v = rows[:3]
    given = [q, k, v, rows.mask, *(x for slot in rows.slots for x in slot), *(rows.row_scale or ())]
    if rows.entropy_scale is not None:
        given.append(rows.entropy_scale.coefficients_HC)
    grown = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    return q.device.type == "cpu" and q.shape[2] <= ROWS and rows.dropout == 0 and not grown


def attend(rows: Rows) -> tuple[Tensor, Tensor]:
    """Returns out_BHTD and the log of the denominator (B, H, T)."""
    rule = rows.entropy_scale
    column, beta = scaled_column(rows), None if rows.row_scale is None else rows.row_scale.beta_BHT
    spared = rule is None or rule.spares_column
    is_bos = logit = weight = counted = coefficients = strength = None
    if column is not None:
        dtype = column.logit_BHT.dtype
        is_bos, logit, weight = column.is_bos_BS, column.logit_BHT, column.log_weight_BT(dtype)[:, None]
        counted = column.closed().log_weight_BT(dtype)[:, None] if spared else weight.clone()
        if rows.mask is not None and rows.mask.dtype != torch.bool:
            # What the mask adds to the BOS column; where it hides the column, `_put` sees that for itself.
            added = _added(rows.mask).masked_fill(~is_bos[:, None, None, :], 0.0)
            weight, counted = weight + added.sum(-1).to(dtype), counted + added.sum(-1).to(dtype)
    hold_from, cornered = None, True
    if rule is not None:
        coefficients, strength, hold_from, cornered = rule.coefficients_HC, rule.strength, rule.hold_from, rule.cornered
    mask = rows.mask
    if rows.causal:
        mask = torch.ones(rows.q_BHTD.shape[2], rows.k_BGSD.shape[2], dtype=torch.bool).tril()[None, None]
    joined = slots.together(rows.slots, rows.q_BHTD, wide(rows.q_BHTD.dtype)) or (None, None)
    return _attend_few(
        *(*rows[:3], mask, is_bos, logit, weight, counted, *joined, beta, coefficients, strength),
        *(hold_from, cornered, spared, rows.scale, rows.softcap),
    )


@custom_op("ropemods::attend_few", mutates_args=())
def _attend_few(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_bos: Tensor | None, logit: Tensor | None,
    weight: Tensor | None, counted: Tensor | None, slot: Tensor | None, slot_value: Tensor | None,
    beta: Tensor | None, coefficients: Tensor | None, strength: Tensor | None, hold_from: float | None, cornered: bool,
    spared: bool, scale: float, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    groups = k.shape[1]
    s = _scores(q, k, scale)  # (B, H, T, S), worked on in place
    if softcap is not None:
        s = soft_capped(s, softcap)
    at, columns = (None, None) if is_bos is None else is_bos.nonzero(as_tuple=True)
    if beta is not None:
        s.mul_(beta.unsqueeze(-1))
    _hide(s, mask)
    base = torch.zeros_like(s[..., :1])
    if coefficients is not None:
        assert strength is not None
        # As an entropy reads it, hidden keys first; what hides a key hides it also when it is multiplied by β.
        _put(s, at, columns, logit, counted)
        highest = _highest(s)
        s.sub_(highest)
        weights = s.exp()
        total = weights.sum(-1)
        rows_s, rows_weights = s.flatten(0, 2).unsqueeze(1), weights.flatten(0, 2).unsqueeze(-1)
        entropy = total.log() - torch.bmm(rows_s, rows_weights).view_as(total) / total
        del weights, rows_weights
        entropy = torch.where(total == 0, 0.0, entropy)
        sharper = EntropyScale(coefficients, strength, hold_from, spared, cornered).beta(entropy)
        s.mul_(sharper.unsqueeze(-1))
        base = sharper.unsqueeze(-1) * highest
        if mask is not None and mask.dtype != torch.bool and bool((added := _added(mask)).any()):
            s.add_((1 - sharper.unsqueeze(-1)) * added)  # β sharpens the logits, not what the mask adds to them
        if logit is not None and not spared:
            logit = logit * sharper
    _put(s, at, columns, logit, weight, base)
    # What e is taken of is below 0 here, but where the BOS column or the sink stands above all keys.
    highest = _highest(s)
    if coefficients is None or spared or bool((highest > 0).any()):
        s.sub_(highest)
        base = base + highest
    weights = s.exp_()
    total = weights.sum(-1, keepdim=True)
    log_z = slots.log_total((base + total.log()).squeeze(-1), slot)
    out = _mixed(weights.view(weights.shape[0], groups, -1, weights.shape[-1]), v).view(*q.shape[:3], v.shape[3])
    if slot is not None:
        # Not by way of log_z: among large logits its rounding would show in the output.
        slot_weights = torch.exp(slot.to(base.dtype).unsqueeze(-1) - base)
        total = total + slot_weights.sum(0)
        if slot_value is not None:
            out = out + torch.einsum("nbhtx,nhd->bhtd", slot_weights, slot_value.to(out.dtype))
    share = torch.where(total == 0, 0.0, 1 / total)
    return (out * share).to(v.dtype), log_z


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
    base: Tensor | None = None,
) -> None:  # fmt: skip
    """The BOS columns' logits into scores that `base` was taken from; a column that the mask hides stays hidden."""
    if at is None or columns is None or logit is None or weight is None or not len(at):
        return
    value = (logit + weight).to(s.dtype)
    value = value if base is None else value - base.squeeze(-1)
    here = s[at, :, :, columns]
    s[at, :, :, columns] = torch.where(here < 1e5 * CLOSED, HIDDEN, value[at].clamp(min=CLOSED))
