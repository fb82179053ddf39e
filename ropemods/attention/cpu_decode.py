"""Few query rows on a CPU without gradients, as in decoding: keys and values are read once, the scores stay between.

The scores of a few rows are small beside the keys they came from, and going through them is cheap when it happens in
place. Query heads that share a key/value head are multiplied with it together; keys and values in half precision are
widened a run at a time. Hidden keys have a logit so low that e to it is 0, and yet finite: 0 · (−∞) has no value.

Shapes: B batch, H query heads, G key/value heads, T queries, S keys, D head dim, N lanes: heads of a group × queries.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.compiler import is_compiling
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


def attend(rows: Rows, *, want_lse: bool = False) -> tuple[Tensor, Tensor | None]:
    """Returns out_BHTD and, if asked, the log of the denominator (B, H, T)."""
    rule = rows.entropy_scale
    column, beta = scaled_column(rows), None if rows.row_scale is None else rows.row_scale.beta_BHT
    spared = rule is None or rule.spares_column
    is_bos = logit = weight = counted = coefficients = strength = None
    if column is not None:
        dtype = column.logit_BHT.dtype
        is_bos, logit, weight = column.is_bos_BS, column.logit_BHT, column.log_weight_BT(dtype)[:, None]
        if rule is not None:
            counted = column.closed().log_weight_BT(dtype)[:, None] if spared else weight.clone()
        if rows.mask is not None and rows.mask.dtype != torch.bool:
            # What the mask adds to the BOS column; where it hides the column, `_put` sees that for itself.
            added = _added(rows.mask).masked_fill(~is_bos[:, None, None, :], 0.0).sum(-1).to(dtype)
            weight, counted = weight + added, None if counted is None else counted + added
    hold_from, cornered = None, True
    if rule is not None:
        coefficients, strength, hold_from, cornered = rule.coefficients_HC, rule.strength, rule.hold_from, rule.cornered
    mask = rows.mask
    if rows.causal:
        mask = torch.ones(rows.q_BHTD.shape[2], rows.k_BGSD.shape[2], dtype=torch.bool).tril()[None, None]
    joined = slots.together(rows.slots, rows.q_BHTD, wide(rows.q_BHTD.dtype)) or (None, None)
    # An operator's dispatch costs as much as a short cache does.
    compute: Callable[..., tuple[Tensor, Tensor]] = _operator if is_compiling() else _attend_few
    out, log_z = compute(
        *(*rows[:3], mask, is_bos, logit, weight, counted, *joined, beta, coefficients, strength),
        *(hold_from, cornered, spared, rows.scale, rows.softcap, want_lse),
    )
    return out, log_z if want_lse else None


def _attend_few(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_bos: Tensor | None, logit: Tensor | None,
    weight: Tensor | None, counted: Tensor | None, slot: Tensor | None, slot_value: Tensor | None,
    beta: Tensor | None, coefficients: Tensor | None, strength: Tensor | None, hold_from: float | None, cornered: bool,
    spared: bool, scale: float, softcap: float | None, want_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Slots are columns behind the keys. In a model every operator that is called costs more than its arithmetic."""
    groups, keys = k.shape[1:3]
    s = _scores(q, k, scale)  # (B, H, T, S), worked on in place
    if softcap is not None:
        s = soft_capped(s, softcap)
    if beta is not None:
        s.mul_(beta.unsqueeze(-1))
    _hide(s, mask)
    if coefficients is not None:
        assert strength is not None
        # As an entropy reads it, hidden keys first; what hides a key hides it also when it is multiplied by β.
        _put(s, is_bos, logit, counted, mask)
        log_share = torch.log_softmax(s, -1)
        entropy = -torch.linalg.vecdot(log_share.exp(), log_share)
        del log_share
        sharper = EntropyScale(coefficients, strength, hold_from, spared, cornered).beta(entropy)
        s.mul_(sharper.unsqueeze(-1))
        if mask is not None and mask.dtype != torch.bool and bool((added := _added(mask)).any()):
            s.add_((1 - sharper.unsqueeze(-1)) * added)  # β sharpens the logits, not what the mask adds to them
        if logit is not None and not spared:
            logit = logit * sharper
    _put(s, is_bos, logit, weight, mask)
    if slot is not None:
        s = torch.cat((s, slot.to(s.dtype).permute(1, 2, 3, 0)), -1)
    share = torch.softmax(s, -1)
    log_z = s.logsumexp(-1) if want_lse else s.new_empty(0)
    if mask is not None:
        nothing = s.amax(-1) <= NOTHING
        share.masked_fill_(nothing.unsqueeze(-1), 0.0)
        log_z = log_z.masked_fill_(nothing, float("-inf")) if want_lse else log_z
    out = _mixed(share[..., :keys].view(q.shape[0], groups, -1, keys), v).view(*q.shape[:3], v.shape[3])
    if slot_value is not None:
        out = out + torch.einsum("bhtn,nhd->bhtd", share[..., keys:], slot_value.to(out.dtype))
    return out.to(v.dtype), log_z


_operator = custom_op("ropemods::attend_few", _attend_few, mutates_args=())


@_operator.register_fake
def _like_queries(q: Tensor, k: Tensor, v: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    log_z = torch.empty(q.shape[:3] if others[-1] else 0, dtype=wide(q.dtype))
    return torch.empty((*q.shape[:3], v.shape[3]), dtype=v.dtype), log_z


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    dtype, groups = wide(q.dtype), k.shape[1]
    q_BGND = (q.to(dtype) * scale).unflatten(1, (groups, -1)).flatten(2, 3)
    runs = [k] if k.dtype == dtype else k.split(RUN, 2)
    parts = [torch.matmul(q_BGND, run.to(dtype).transpose(2, 3)) for run in runs]
    s_BGNS = parts[0] if len(parts) == 1 else torch.cat(parts, 3)
    return s_BGNS.view(*q.shape[:3], k.shape[2])


def _mixed(weights_BGNS: Tensor, v: Tensor) -> Tensor:
    if v.dtype == weights_BGNS.dtype:
        return torch.matmul(weights_BGNS, v)
    runs = zip(weights_BGNS.split(RUN, -1), v.split(RUN, 2), strict=True)
    return torch.stack([torch.matmul(weights, run.to(weights.dtype)) for weights, run in runs]).sum(0)


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


def _put(s: Tensor, is_bos: Tensor | None, logit: Tensor | None, weight: Tensor | None, mask: Tensor | None) -> None:
    """The BOS columns' logits into the scores; a column that the mask hides stays hidden."""
    if is_bos is None or logit is None or weight is None:
        return
    here = is_bos[:, None, None, :]
    if mask is not None:
        here = here & (s > 1e5 * CLOSED)
    torch.where(here, (logit + weight).to(s.dtype).clamp(min=CLOSED).unsqueeze(-1), s, out=s)
