"""The rows of one attention call on the fused kernels: every term, forward and backward in one operator each.

Shapes: B batch, H query heads, T queries, S keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ropemods.attention.rows import Rows, with_beta
from ropemods.attention.triton.attend import attend as attend_rows
from ropemods.attention.triton.entropy import entropy
from ropemods.attention.triton.launch import Column, Rule
from ropemods.attention.triton.spans import Spans, spans


def tempered(rows: Rows) -> Rows:
    """`rows` with β in the place of the temperature it asks for."""
    return rows if rows.temperature is None else with_beta(rows, entropy(rows))


def attend(rows: Rows) -> tuple[Tensor, Tensor]:
    """Returns out_BHTD and the log of the denominator (B, H, T)."""
    _check(rows)
    q, heads = rows.q_BHTD, rows.q_BHTD.shape[1]
    rule = None
    if rows.temperature is not None:
        asked = rows.temperature
        coefficients = asked.coefficients_HC.float().expand(heads, -1).contiguous()
        hold_from = float("inf") if asked.hold_from is None else asked.hold_from
        rule = Rule(coefficients, asked.strength.float(), hold_from)
    spared = rows.temperature.spare_bos if rows.temperature is not None else rows.beta_spares_bos
    found = attend_rows(
        q,
        rows.k_BGSD,
        rows.v_BGSD,
        _spans(rows),
        scale=rows.scale,
        softcap=rows.softcap,
        mask=rows.mask,
        column=_column(rows, spared),
        sink_H=None if rows.sink_H is None else rows.sink_H.float().contiguous(),
        rule=rule,
        beta_BHT=None if rows.beta_BHT is None else rows.beta_BHT.float().contiguous(),
        spared=spared,
    )
    return found.out, found.log_z


def _column(rows: Rows, spared: bool) -> Column | None:
    bos = rows.bos
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
    seen_BTS = (rows.mask if rows.mask.dtype == torch.bool else rows.mask > float("-inf")).any(1).to(torch.uint8)
    some = seen_BTS.amax(-1) > 0
    first = torch.where(some, seen_BTS.argmax(-1), 0)
    past = torch.where(some, keys - seen_BTS.flip(-1).argmax(-1), 0)
    return Spans(first.to(torch.int32).contiguous(), past.to(torch.int32).contiguous())


def _check(rows: Rows) -> None:
    if rows.dropout > 0:
        raise ValueError(
            f"attention dropout of {rows.dropout} was asked for on the triton kernels, which have none; set "
            "config.attention_dropout = 0, or ROPEMODS_KERNEL=flash, or load the model with attn_implementation='eager'"
        )
