"""The BOS column as modifications score it: apart from the other keys, at its natural logit until one says another."""

from __future__ import annotations

import torch
from torch import Tensor

from ropemods.attention import eager
from ropemods.attention.rows import Rows, dot_with_bos, soft_capped, wide
from ropemods.attention.terms import Column
from ropemods.mods.base import Call, Layout

NEARNESS = tuple(sorted({2**k for k in range(17)} | {3 * 2**k for k in range(16)}))
"""Offsets that are tried where one is chosen: dense near the BOS, where a step of the offset turns a query most."""

UNCALIBRATED = 32
"""The offset where no batch was given to choose one on: free on models whose typical offsets are in the hundreds."""


def check_offset(kind: str, offset: int | str) -> None:
    if isinstance(offset, int) and offset < 0:
        raise ValueError(f"{kind}: offset is how many tokens back, 0 or more, not {offset}")


def first_offset(offset: int | str) -> Tensor:
    return torch.tensor(offset if isinstance(offset, int) else UNCALIBRATED)


def with_bos_column(rows: Rows, call: Call, logit_BHT: Tensor | None = None) -> Rows:
    """`rows` with the BOS column scored apart: at this logit, else at the one that an earlier stage has given it, else
    at its natural one."""
    if rows.column is not None:
        return rows if logit_BHT is None else rows.plus(rows.column._replace(logit_BHT=logit_BHT))
    check_told(call)
    assert call.bos_column_BN is not None and call.bos_is_self_BT is not None
    column_BN, keys = call.bos_column_BN, rows.k_BGSD.shape[2]
    batch = rows.q_BHTD.shape[0]
    if column_BN.shape[1] == 1:  # one BOS a row, as nearly always: a comparison costs decoding less than marks
        is_bos_BS = (torch.arange(keys, device=column_BN.device) == column_BN).expand(batch, -1)
    else:
        # A BOS that has left the cache (a negative column) is marked one past the end, which is then cut off.
        marks = torch.zeros(batch, keys + 1, dtype=torch.bool, device=column_BN.device)
        marks = marks.scatter(1, torch.where(column_BN < 0, keys, column_BN).expand(batch, -1), True)
        is_bos_BS = marks[:, :keys]
    if logit_BHT is None:
        logit_BHT = bos_logit(rows, call, rows.q_BHTD)
    column = Column(
        is_bos_BS=is_bos_BS,
        is_self_BT=call.bos_is_self_BT,
        logit_BHT=logit_BHT,
        log_weight=torch.zeros((), device=rows.q_BHTD.device),
    )
    return rows.plus(column)


def bos_closed(rows: Rows, call: Call, strength: Tensor) -> Rows:
    """`rows` with that share of the BOS column's weight gone."""
    rows = with_bos_column(rows, call)
    assert rows.column is not None
    return rows.plus(rows.column._replace(log_weight=rows.column.log_weight + torch.log1p(-strength)))


def check_told(call: Call) -> None:
    if call.bos_column_BN is None or call.bos_is_self_BT is None:
        raise RuntimeError(
            "an attention layer was not told where its BOS tokens are: the model does not hand keyword arguments "
            "down to its attention layers, or the layer was called on its own; call the whole model"
        )


def bos_logit(rows: Rows, call: Call, q_BHTD: Tensor) -> Tensor:
    """What these queries, in the place of the rows' own, score the BOS with (B, H, T)."""
    return soft_capped(dot_with_bos(q_BHTD, bos_key(rows, call), rows.scale), rows.softcap)


def bos_key(rows: Rows, call: Call) -> Tensor:
    """The key of each query's BOS (B, G, N, D)."""
    batch, groups, _, dim = rows.k_BGSD.shape
    assert call.bos_column_BN is not None
    index = call.bos_column_BN.clamp(min=0)[:, None, :, None].expand(batch, groups, -1, dim)
    return rows.k_BGSD.gather(2, index)


def turned(rows: Rows, call: Call, turn_BT: Tensor) -> Tensor:
    """The queries (B, H, T, D), wide, as if each stood so many tokens further back; where nothing turns them (no table
    for the layer), as they are."""
    q_BHTD = rows.q_BHTD.to(wide(rows.q_BHTD.dtype))
    if call.inv_freq_F is None or call.layout is None:
        return q_BHTD
    angle_BTF = turn_BT.to(q_BHTD.dtype).unsqueeze(-1) * call.inv_freq_F.to(q_BHTD.dtype)
    return turned_back(q_BHTD, angle_BTF.unsqueeze(1), call.layout)


def turned_back(x: Tensor, angle: Tensor, layout: Layout) -> Tensor:
    """The rotary channels of x turned clockwise by `angle` (…, F); the other channels stay."""
    width = 2 * angle.shape[-1]
    before, rotary, after = x.tensor_split([layout.start, layout.start + width], dim=-1)
    cos, sin = angle.cos(), angle.sin()
    if layout.interleaved:
        first, second = rotary[..., 0::2], rotary[..., 1::2]
    else:
        first, second = rotary.chunk(2, dim=-1)
    first, second = first * cos + second * sin, second * cos - first * sin
    if layout.interleaved:
        turned = torch.stack((first, second), -1).flatten(-2)
    else:
        turned = torch.cat((first, second), -1)
    return torch.cat((before, turned, after), -1)


@torch.no_grad()
def offset_of_least_change(rows: Rows, call: Call) -> int:
    """Of a batch that the stock model reads: the offset at which scoring the BOS for every query changes the mass that
    rows give it least, in the mean square over heads and later queries."""
    rows = with_bos_column(rows, call)
    assert rows.column is not None and call.bos_distance_BT is not None
    _, _, log_rest = eager.attend(rows._replace(column=rows.column.closed()))
    seen = ~rows.column.is_self_BT[:, None, :] & log_rest.isfinite()
    mass = torch.sigmoid(rows.column.logit_BHT - log_rest)
    key, distance_BT = bos_key(rows, call), call.bos_distance_BT
    longest = max(int(distance_BT.max()), 1)

    def change(offset: int) -> float:
        query_BHTD = turned(rows, call, distance_BT - offset)
        logit = soft_capped(dot_with_bos(query_BHTD, key, rows.scale), rows.softcap)
        return float(torch.where(seen, torch.sigmoid(logit - log_rest) - mass, 0.0).square().sum())

    return min((offset for offset in NEARNESS if offset <= longest), key=change)
