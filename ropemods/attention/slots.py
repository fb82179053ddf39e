"""Slots joined to rows of which the output and the log-sum-exp over the keys are known.

    log Z = log(e^lse + Σ_s e^{z_s})         out′ = e^(lse − log Z) · out + Σ_s e^(z_s − log Z) · ν_s

A kernel's own backward is exact for the keys when it is handed log Z and out′ in the place of its own, since it
rebuilds p = e^(s − log Z) and ds = p (⟨dO, v⟩ − ⟨dO, out′⟩) from them. What is left are the slots' own gradients, with
share P = e^(z − log Z):   dz = P (⟨dO, ν⟩ − ⟨dO, out′⟩)   and   dν = Σ P dO.

Shapes: N slots, B batch, H query heads, T queries, D head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ropemods.attention.terms import Slot


class Slots(NamedTuple):
    """All slots of a call, as operators take them."""

    logit_NBHT: Tensor
    value_NHD: Tensor | None
    """None where no slot has a value; a slot without one among others has zeros."""


def together(slots: tuple[Slot, ...], q_BHTD: Tensor, dtype: torch.dtype) -> Slots | None:
    """The slots of rows with these queries; those without values are one, since they only add to the denominator."""
    if not slots:
        return None
    like_BHT = q_BHTD[..., 0].to(dtype)
    empty = [slot.logit_BHT(like_BHT) for slot in slots if slot.value_HD is None]
    filled = [slot for slot in slots if slot.value_HD is not None]
    logits = [slot.logit_BHT(like_BHT) for slot in filled]
    values = [slot.value_HD.to(dtype) for slot in filled if slot.value_HD is not None]
    if empty:
        joined = empty[0]
        for other in empty[1:]:
            joined = torch.logaddexp(joined, other)
        logits.append(joined)
        if values:
            values.append(torch.zeros_like(values[0]))
    return Slots(torch.stack(logits), torch.stack(values) if values else None)


def log_total(lse_BHT: Tensor, logit_NBHT: Tensor | None) -> Tensor:
    for logit_BHT in () if logit_NBHT is None else logit_NBHT.unbind():
        lse_BHT = torch.logaddexp(lse_BHT, logit_BHT.to(lse_BHT.dtype))
    return lse_BHT


def with_values(out_BHTD: Tensor, log_z_BHT: Tensor, logit_NBHT: Tensor | None, value_NHD: Tensor | None) -> Tensor:
    """`out_BHTD`, which has been scaled to log Z, and what the slots bring."""
    if logit_NBHT is None or value_NHD is None:
        return out_BHTD
    for logit_BHT, value_HD in zip(logit_NBHT.unbind(), value_NHD.unbind(), strict=True):
        share_BHT = torch.exp(logit_BHT.to(log_z_BHT.dtype) - log_z_BHT)
        out_BHTD = torch.addcmul(out_BHTD, share_BHT.unsqueeze(-1), value_HD[:, None].to(out_BHTD.dtype))
    return out_BHTD


def joined(out_BHTD: Tensor, lse_BHT: Tensor, slots: Slots | None) -> tuple[Tensor, Tensor]:
    """Output and log of the denominator with the slots in them."""
    if slots is None:
        return out_BHTD, lse_BHT
    log_z = log_total(lse_BHT, slots.logit_NBHT)
    # A row that sees nothing, and has slots that are closed, keeps its zeros.
    kept = torch.exp(lse_BHT - log_z).masked_fill(log_z == float("-inf"), 0.0).unsqueeze(-1)
    if slots.value_NHD is None:
        return (out_BHTD * kept).to(out_BHTD.dtype), log_z
    return with_values(out_BHTD * kept, log_z, *slots).to(out_BHTD.dtype), log_z


def gradients(
    d_wide: Tensor, delta: Tensor, log_z: Tensor, logit_NBHT: Tensor, value_NHD: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Of logits and values. `delta` is ⟨dO, out′⟩; it, dO and log Z are wide."""
    share_NBHT = torch.exp(logit_NBHT.to(log_z.dtype) - log_z)
    if value_NHD is None:
        return (-share_NBHT * delta).to(logit_NBHT.dtype), None
    from_value = torch.einsum("bhtd,nhd->nbht", d_wide, value_NHD.to(log_z.dtype))
    d_value = torch.einsum("nbht,bhtd->nhd", share_NBHT, d_wide)
    return (share_NBHT * (from_value - delta)).to(logit_NBHT.dtype), d_value.to(value_NHD.dtype)
