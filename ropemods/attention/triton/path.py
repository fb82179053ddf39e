"""The rows of one attention call on the fused kernels: every term, forward and backward in one operator each.

Shapes: B batch, H query heads, T queries, S keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ropemods.attention import slots
from ropemods.attention.rows import Rows, scaled, scaled_column, shown, with_beta
from ropemods.attention.triton.attend import attend as attend_rows
from ropemods.attention.triton.entropy import entropy
from ropemods.attention.triton.launch import Column, Rule
from ropemods.attention.triton.spans import Spans, spans


def attend(rows: Rows) -> tuple[Tensor, Tensor]:
    """Returns out_BHTD and the log of the denominator (B, H, T)."""
    asked = rows.entropy_scale
    if asked is not None and not asked.cornered:  # the kernels have the published rule in them
        rows, asked = with_beta(rows, entropy(rows)), None
    rule = None
    if asked is not None:
        rows = scaled(rows) if rows.row_scale is not None else rows
        coefficients = asked.coefficients_HC.float().expand(rows.q_BHTD.shape[1], -1).contiguous()
        rule = Rule(coefficients, asked.strength.float(), float("inf") if asked.hold_from is None else asked.hold_from)
    beta_BHT = None if rows.row_scale is None else rows.row_scale.beta_BHT.float().contiguous()
    spared = beta_BHT is not None or (asked is not None and asked.spares_column)
    found = attend_rows(
        rows.q_BHTD,
        rows.k_BGSD,
        rows.v_BGSD,
        _spans(rows),
        scale=rows.scale,
        softcap=rows.softcap,
        mask=rows.mask,
        column=_column(rows, spared),
        slots=slots.together(rows.slots, rows.q_BHTD, torch.float32),
        rule=rule,
        beta_BHT=beta_BHT,
        spared=spared,
    )
    return found.out, found.log_z


def _column(rows: Rows, spared: bool) -> Column | None:
    bos = scaled_column(rows)
    if bos is None:
        return None
    shape = rows.q_BHTD.shape[0], rows.q_BHTD.shape[2]
    weight = bos.log_weight_BT(torch.float32).expand(shape).contiguous()
    counted = bos.closed().log_weight_BT(torch.float32).expand(shape).contiguous() if spared else weight
    return Column(
        bos.is_bos_BS.expand(shape[0], -1).to(torch.uint8).contiguous(),
        bos.logit_BHT.float().contiguous(),
        weight,
        counted.clone() if counted is weight else counted,
    )


def _spans(rows: Rows) -> Spans:
    """The keys from the first to the last that a row's mask lets it see, so that kernels pass over the others."""
    queries, keys = rows.q_BHTD.shape[2], rows.k_BGSD.shape[2]
    if rows.mask is None or rows.mask.shape[-2] != queries or rows.mask.shape[-1] != keys:
        return spans(queries, keys, causal=rows.causal, device=rows.q_BHTD.device)
    seen_BTS = shown(rows.mask).any(1).to(torch.uint8)
    some = seen_BTS.amax(-1) > 0
    first = torch.where(some, seen_BTS.argmax(-1), 0)
    past = torch.where(some, keys - seen_BTS.flip(-1).argmax(-1), 0)
    return Spans(first.to(torch.int32).contiguous(), past.to(torch.int32).contiguous())
