"""Deviations read off whole rows of logits: with every term that modifications add, and with the rows' denominators.

`deviations` reads the few logits that a local softmax needs. The total needs the denominators as well:

    M(i) = mean over sequences of m(i) − mean over sequences and late queries j of m(j)
    m(i) = logsumexp over the w offsets δ of ℓ_{i,i−δ} − log of the denominator of row i

so D(i, δ) + M(i) is how far a query's log-probabilities depart from those of late queries. Whole rows are made for the
chosen queries only, a few sequences at a time, and are made again for their gradient instead of being kept.

Shapes: as in `deviations`; S keys, P of the runs, X = W + 1 where M is wanted (it comes last), else W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ropemods.attention import eager, slots
from ropemods.attention.rows import Rows, shown
from ropemods.attention.terms import KeyBias, RowScale
from ropemods.model.deviations import Plan

AT_ONCE = 1 << 24
"""Logits that are worked on together."""


def read(rows: Rows) -> Rows:
    """What the logits are made of, without a graph."""
    return _mapped(_of_logits(rows), Tensor.detach)._replace(mask=rows.mask)


def tensors(rows: Rows) -> list[Tensor]:
    """What a gradient may be wanted of."""
    found: list[Tensor] = []

    def take(x: Tensor) -> Tensor:
        if x.is_floating_point():
            found.append(x)
        return x

    _mapped(_of_logits(rows), take)
    return found


def with_tensors(rows: Rows, given: tuple[Tensor, ...]) -> Rows:
    """`rows` with these in the place of those of `tensors` that are trained."""
    left: Iterator[Tensor] = iter(given)

    def other(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        new = next(left)
        return new if x.requires_grad else x

    changed = _mapped(_of_logits(rows), other)
    with_values = [new._replace(value_HD=old.value_HD) for new, old in zip(changed.slots, rows.slots, strict=True)]
    return changed._replace(v_BGSD=rows.v_BGSD, mask=rows.mask, slots=tuple(with_values))


def deviations(seen: Rows, plan: Plan, *, total: bool) -> Tensor:
    """D of one layer, with M behind it where `total` (HEX), in fp32 (fp64 for fp64)."""
    with torch.autocast(seen.q_BHTD.device.type, enabled=False):
        return torch.stack([_of(seen, part, plan, total) for part in _parts(seen, plan)]).sum(0)


def put_back(
    grads: tuple[Tensor, ...], seen: Rows, plan: Plan, weight_HEX: Tensor, scale: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of `tensors`, and with them that of `scale` times the sum of weight × deviations."""
    with torch.enable_grad(), torch.autocast(seen.q_BHTD.device.type, enabled=False):
        leaves = _mapped(_of_logits(seen), lambda x: x.detach().requires_grad_() if x.is_floating_point() else x)
        leaves = leaves._replace(mask=seen.mask)
        for part in _parts(seen, plan):
            found_HEX = _of(leaves, part, plan, total=weight_HEX.shape[-1] > plan.window)
            ((weight_HEX.to(found_HEX) * found_HEX).sum() * scale.to(found_HEX)).backward()
    return tuple(g if x.grad is None else g + x.grad for g, x in zip(grads, tensors(leaves), strict=True))


def _of(seen: Rows, part: slice, plan: Plan, total: bool) -> Tensor:
    """What some of the runs add to the deviations."""
    E, near = plan.early, plan.near
    early_HEX = _shares(seen, plan.row_N1[part], plan.query_NQ[part, :E], near, plan.window, total).sum(0)
    late_HAX = _shares(seen, plan.row_N1[part], plan.query_NQ[part, E:], None, plan.window, total).sum(0)
    return (early_HEX - late_HAX.mean(1, keepdim=True)) / plan.runs


def _shares(seen: Rows, row_P1: Tensor, query_PQ: Tensor, keys: int | None, window: int, total: bool) -> Tensor:
    """r, and m behind it where `total`, of some queries, which see none but the first `keys` columns (P, H, Q, X)."""
    rows = _of_queries(seen, row_P1, query_PQ, keys)
    assert rows.mask is not None
    hidden = ~shown(rows.mask)
    # Offsets are told by what is visible; else the band is read as it is before any mask, as `measure` reads it.
    logits_PHQS, bias_PHQS = eager.logits_of(rows if rows.offset_bias is not None else rows._replace(mask=None))
    if bias_PHQS is not None:
        logits_PHQS = logits_PHQS + (bias_PHQS if rows.offset_bias is None else bias_PHQS.masked_fill(hidden, 0.0))
    key_PHQW = (query_PQ[..., None] - torch.arange(window, device=query_PQ.device)).unsqueeze(1)
    band_PHQW = logits_PHQS.gather(-1, key_PHQW.expand(-1, logits_PHQS.shape[1], -1, -1))
    of_band_PHQ = band_PHQW.logsumexp(-1)
    r_PHQW = band_PHQW - of_band_PHQ[..., None]
    if not total:
        return r_PHQW
    lse_PHQ = logits_PHQS.masked_fill(hidden, -torch.inf).logsumexp(-1)
    joined = slots.together(rows.slots, rows.q_BHTD, lse_PHQ.dtype)
    lse_PHQ = slots.log_total(lse_PHQ, None if joined is None else joined.logit_NBHT)
    return torch.cat((r_PHQW, (of_band_PHQ - lse_PHQ)[..., None]), -1)


def _parts(seen: Rows, plan: Plan) -> Iterator[slice]:
    H, S = seen.q_BHTD.shape[1], seen.k_BGSD.shape[2]
    step = max(1, AT_ONCE // (H * plan.query_NQ.shape[1] * S))
    return (slice(start, start + step) for start in range(0, plan.runs, step))


def _of_queries(rows: Rows, row_P1: Tensor, query_PQ: Tensor, keys: int | None) -> Rows:
    """Some queries of some sequences on the first `keys` columns, with the mask written out."""
    (B, H, T, _), row_P = rows.q_BHTD.shape, row_P1[:, 0]

    def of_sequences(x_B: Tensor) -> Tensor:
        return x_B if x_B.shape[0] == 1 else x_B[row_P]

    def of_queries(x_BHTx: Tensor) -> Tensor:
        return x_BHTx.expand(B, *x_BHTx.shape[1:])[row_P1, :, query_PQ].transpose(1, 2)

    mask, column, scale = rows.mask, rows.column, rows.row_scale
    if mask is None:
        mask = (torch.arange(T, device=query_PQ.device)[:keys] <= query_PQ[..., None])[:, None]
    else:
        mask = of_queries(mask[..., :keys].expand(*mask.shape[:2], T, -1))
    if column is not None:
        column = column._replace(
            is_bos_BS=of_sequences(column.is_bos_BS[:, :keys]),
            is_self_BT=column.is_self_BT.expand(B, T)[row_P1, query_PQ],
            logit_BHT=of_queries(column.logit_BHT.expand(B, H, T)),
        )
    return rows._replace(
        q_BHTD=of_queries(rows.q_BHTD),
        k_BGSD=rows.k_BGSD[row_P, :, :keys],
        mask=mask,
        causal=False,
        column=column,
        row_scale=None if scale is None else RowScale(*(x if x is None else of_queries(x) for x in scale)),
        key_bias=None if rows.key_bias is None else KeyBias(of_sequences(rows.key_bias.bias_BHS[..., :keys])),
        slots=tuple(s._replace(logit=of_queries(s.logit)) if s.logit.ndim == 3 else s for s in rows.slots),
    )


def _of_logits(rows: Rows) -> Rows:
    """Without what logits do not depend on, and without the mask, which is no one's to train."""
    empty = tuple(slot._replace(value_HD=None) for slot in rows.slots)
    return rows._replace(v_BGSD=None, mask=None, slots=empty)  # type: ignore[arg-type]


def _mapped(held: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Records with every tensor in them changed."""
    if isinstance(held, Tensor):
        return change(held)
    if not isinstance(held, tuple):
        return held
    parts = [_mapped(x, change) for x in held]
    return type(held)(*parts) if hasattr(held, "_fields") else tuple(parts)
