"""From one attention call to what `Sums` keeps of it.

Everything is said of the rows as the kernel used them, with every term in them. Hidden keys have mass 0. Band and
position 1 hold pre-mask logits, so that the residual term never sees the mask.

**Entropy** is read on the grid of whole rows that the mask term needs anyway, and interpolated linearly in log i
between them: a pass of its own would cost as much as the model's attention. It is the entropy of the weights as used;
a slot is no key and is left out.

Shapes: B batch, H query heads, G key heads, T queries, S keys (= T), W window, R grid rows, D head dim,
I queries i ≥ w.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ropemods.attention.rows import Rows, scaled_column, shown, soft_capped, wide
from ropemods.attention.slots import together
from ropemods.attention.terms import KeyBias, RowScale
from ropemods.leakage.logits import NEGLIGIBLE, banded_logits, grid_logits
from ropemods.leakage.mask import interpolation
from ropemods.leakage.protocol import Protocol


class Local(NamedTuple):
    """What residual and total need: keyword arguments of `Sums.add`."""

    band_BHTW: Tensor
    lse_BHT: Tensor


class Whole(NamedTuple):
    """The curves and the grid rows: the other keyword arguments of `Sums.add`."""

    bos_mass_BHT: Tensor
    bos_logit_BHT: Tensor
    position1_mass_BHT: Tensor
    entropy_BHT: Tensor
    rows_BHRS: Tensor
    row_extra_BHR: Tensor | None


def local(rows: Rows, lse_BHT: Tensor, protocol: Protocol) -> Local:
    band_BHTW = banded_logits(rows.q_BHTD, rows.k_BGSD, scale=rows.scale, window=protocol.window, softcap=rows.softcap)
    keys_TW = torch.arange(band_BHTW.shape[2], device=lse_BHT.device)[:, None] - torch.arange(
        protocol.window, device=lse_BHT.device
    )
    return Local(_with_terms(rows, band_BHTW, keys_TW, slice(None)), lse_BHT)


def whole(rows: Rows, lse_BHT: Tensor, protocol: Protocol) -> Whole:
    bos_BHT = bos_logit(rows)
    first_BHT = _columns(rows, slice(1, 2))[..., 0]
    grid = protocol.grid()
    rows_BHRS = grid_rows(rows, bos_BHT, grid)
    extra_BHR, joined = None, together(rows.slots, rows.q_BHTD, rows_BHRS.dtype)
    if joined is not None:
        extra_BHR = joined.logit_NBHT[..., list(grid)].logsumexp(0)
    return Whole(
        bos_mass_BHT=_mass(bos_BHT, lse_BHT, _sees(rows, 0)),
        bos_logit_BHT=bos_BHT,
        position1_mass_BHT=_mass(first_BHT, lse_BHT, _sees(rows, 1)),
        entropy_BHT=_between(_entropy(rows_BHRS), protocol),
        rows_BHRS=rows_BHRS,
        row_extra_BHR=extra_BHR,
    )


def bos_logit(rows: Rows) -> Tensor:
    """The logit of column 0 for each query, with the log of its weight: −inf where it is closed (B, H, T)."""
    column = scaled_column(rows)
    if column is None:
        return _columns(rows, slice(0, 1))[..., 0]
    rest = rows._replace(row_scale=None)
    first_T1 = torch.zeros(column.logit_BHT.shape[2], 1, dtype=torch.long, device=column.logit_BHT.device)
    logit_BHT = _with_terms(rest, column.logit_BHT[..., None].clone(), first_T1, slice(None))[..., 0]
    return logit_BHT + column.log_weight_BT(logit_BHT.dtype)[:, None]


def bos_mass(rows: Rows, lse_BHT: Tensor) -> Tensor:
    """The attention weight of column 0 in each row (B, H, T)."""
    return _mass(bos_logit(rows), lse_BHT, _sees(rows, 0))


def grid_rows(rows: Rows, bos_BHT: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Whole rows of logits of the queries in `grid`, −inf on hidden keys (B, H, R, S)."""
    at = list(grid)
    rows_BHRS = grid_logits(rows.q_BHTD, rows.k_BGSD, rows=at, scale=rows.scale, softcap=rows.softcap)
    keys_RS = torch.arange(rows_BHRS.shape[3], device=bos_BHT.device).expand(len(at), -1)
    rows_BHRS = _with_terms(rows, rows_BHRS, keys_RS, at)
    if rows.names() - {"Slot"}:
        rows_BHRS[..., 0] = bos_BHT[:, :, at]
    if rows.mask is not None:
        rows_BHRS.masked_fill_(~shown(rows.mask[..., at, :]), -torch.inf)
    return rows_BHRS


def part(rows: Rows, chosen: slice) -> Rows:
    """Some sequences of the batch."""
    column, mask, row_scale = rows.column, rows.mask, rows.row_scale
    if column is not None:
        column = column._replace(
            is_bos_BS=_some(column.is_bos_BS, chosen),
            is_self_BT=_some(column.is_self_BT, chosen),
            logit_BHT=column.logit_BHT[chosen],
        )
    if row_scale is not None:
        row_scale = RowScale(*(None if x is None else x[chosen] for x in row_scale))
    return rows._replace(
        q_BHTD=rows.q_BHTD[chosen],
        k_BGSD=rows.k_BGSD[chosen],
        v_BGSD=rows.v_BGSD[chosen],
        mask=None if mask is None else _some(mask, chosen),
        column=column,
        row_scale=row_scale,
        key_bias=None if rows.key_bias is None else KeyBias(_some(rows.key_bias.bias_BHS, chosen)),
        slots=tuple(s._replace(logit=s.logit[chosen]) if s.logit.ndim == 3 else s for s in rows.slots),
    )


def complaint(rows: Rows) -> str | None:
    """Why leakage is not defined on these rows; None when it is."""
    T = rows.q_BHTD.shape[2]
    if rows.k_BGSD.shape[2] != T:
        return (
            f"{T} queries read {rows.k_BGSD.shape[2]} keys, so keys are not the tokens one by one (the model adds "
            "keys of its own, or a cache was in use)"
        )
    if rows.mask is None:
        return None if rows.causal else "it is not causal: without a mask every query sees every key"
    if shown(rows.mask[..., 0, 1:]).any():
        return "it is not causal: the first query sees later keys"
    if rows.mask.dtype != torch.bool:
        last = rows.mask[..., -1, :]
        if (last.where(shown(last), 0.0) != 0).any():
            return "its mask adds a bias to the logits of visible keys, as ALiBi does"
    return None


def hidden_offsets(rows: Rows, window: int) -> bool:
    """Whether the last query cannot see all of the offsets that are compared."""
    return rows.mask is not None and not bool(shown(rows.mask[..., -1, -window:]).all())


def _some(x_B: Tensor, chosen: slice) -> Tensor:
    return x_B if x_B.shape[0] == 1 else x_B[chosen]


def _columns(rows: Rows, keys: slice) -> Tensor:
    """Logits of a few keys for every query, before the mask (B, H, T, keys)."""
    (B, H, T, D), G = rows.q_BHTD.shape, rows.k_BGSD.shape[1]
    dtype = wide(rows.q_BHTD.dtype)
    q_BGmD = rows.q_BHTD.to(dtype).reshape(B, G, H // G * T, D)
    s_BHTk = torch.matmul(q_BGmD, rows.k_BGSD[:, :, keys].to(dtype).mT).view(B, H, T, -1) * rows.scale
    s_BHTk = soft_capped(s_BHTk, rows.softcap)
    keys_Tk = torch.arange(rows.k_BGSD.shape[2], device=s_BHTk.device)[keys].expand(T, -1)
    return _with_terms(rows, s_BHTk, keys_Tk, slice(None))


def _with_terms(rows: Rows, s_BHRk: Tensor, keys_Rk: Tensor, at: slice | list[int]) -> Tensor:
    """Logits of some keys for the queries `at`, worked on in place, as the terms of their rows leave them."""
    if rows.offset_bias is not None:
        queries_R1 = torch.arange(rows.q_BHTD.shape[2], device=s_BHRk.device)[at, None]
        offsets_Rk = (queries_R1 - keys_Rk).clamp(min=0)
        s_BHRk.mul_(rows.offset_bias.scale_HO[:, offsets_Rk].to(s_BHRk.dtype))
    if rows.row_scale is not None:
        s_BHRk.mul_(rows.row_scale.beta_BHT[:, :, at, None].to(s_BHRk.dtype))
    if rows.offset_bias is not None:
        s_BHRk.add_(rows.offset_bias.bias_HO[:, offsets_Rk].to(s_BHRk.dtype))
    if rows.key_bias is not None:
        s_BHRk.add_(rows.key_bias.bias_BHS[..., keys_Rk.clamp(min=0)].to(s_BHRk.dtype))
    return s_BHRk


def _sees(rows: Rows, key: int) -> Tensor:
    """Which queries see one key, broadcastable to (B, H, T)."""
    if rows.mask is None:
        return torch.arange(rows.q_BHTD.shape[2], device=rows.q_BHTD.device) >= key
    return shown(rows.mask[..., key])


def _mass(logit_BHT: Tensor, lse_BHT: Tensor, seen: Tensor) -> Tensor:
    return (logit_BHT - lse_BHT).exp().where(seen, 0.0)


def _entropy(rows_BHRS: Tensor) -> Tensor:
    """log Z − Σ p s over the keys (B, H, R)."""
    # Hidden keys have weight 0 and a logit of −inf; their product is 0, which floating point does not know.
    x_BHRS = (rows_BHRS - rows_BHRS.amax(-1, keepdim=True)).clamp_(min=NEGLIGIBLE)
    e_BHRS = x_BHRS.exp()
    Z_BHR = e_BHRS.sum(-1)
    return Z_BHR.log() - (e_BHRS * x_BHRS).sum(-1) / Z_BHR


def _between(at_grid_BHR: Tensor, protocol: Protocol) -> Tensor:
    """Values of the grid rows for all queries from w on, 0 before them (B, H, T)."""
    weights_IR = _weights(protocol, at_grid_BHR.device, at_grid_BHR.dtype)
    all_BHT = at_grid_BHR.new_zeros(*at_grid_BHR.shape[:2], protocol.length)
    all_BHT[..., protocol.window :] = at_grid_BHR @ weights_IR.T
    return all_BHT


@cache
def _weights(protocol: Protocol, device: torch.device, dtype: torch.dtype) -> Tensor:
    return interpolation(protocol.grid(), range(protocol.window, protocol.length)).to(device, dtype)
