"""Named running sums of one layer, and the gate that keeps NaN and infinity out of them.

A sum is either by group of documents, [K, …], or over all sequences. It comes into being with the first
value, on the layer's device or on the one that was asked for, in fp32.

Shapes: B batch, H query heads, K groups, T queries, W window, R grid rows, S keys, Q checked quantities.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

CURVES = ("bos_mass", "bos_logit", "position1_mass", "entropy")
CHECKED = ("local logits", "log Z", *(name.replace("_", " ") for name in CURVES), "grid logits")


class LayerSums:
    """`tensors[name]` are the sums; what is a total and what is by group follows from the name."""

    def __init__(self, groups: int, device: torch.device) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._groups = groups
        self._device = device

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def add_by_group(self, name: str, groups_B: Tensor, x_B: Tensor) -> None:
        """Add x of every sequence to the sum of its group."""
        if name not in self.tensors:
            shape = (self._groups, *x_B.shape[1:])
            self.tensors[name] = torch.zeros(shape, device=self._device)
        total_K = self.tensors[name]
        if total_K.device != x_B.device:
            groups_B, x_B = one_per_group(groups_B, x_B)
        # A batch has few sequences, and adding each where it belongs is several times faster than index_add_.
        for group, x in zip(groups_B.tolist(), x_B.to(total_K.device), strict=True):
            total_K[group] += x

    def add(self, name: str, x: Tensor) -> None:
        """Add x, a sum over sequences already."""
        x = x.to(self._device)
        self.tensors[name] = self.tensors[name] + x if name in self.tensors else x

    def good_heads(self) -> Tensor:
        """True for the heads in which every value was finite so far, [H]."""
        return self.tensors["bad"].sum(0) == 0

    def gate(
        self,
        *,
        band_BHTW: Tensor,
        lse_BHT: Tensor,
        curves: Mapping[str, Tensor],
        rows_BHRS: Tensor | None,
    ) -> Tensor:
        """Count, per quantity and head, the sequences with a bad value; [B, H] says which are good.

        −inf is a hidden key in `rows`, and a BOS that is closed off among the curves; elsewhere it
        is as bad as NaN.
        """
        good_BH = torch.ones(band_BHTW.shape[:2], dtype=torch.bool, device=band_BHTW.device)
        finite = [band_BHTW.isfinite().flatten(2).all(-1), lse_BHT.isfinite().all(-1)]
        for name in CURVES:
            fine = ~_nan_or_plus_inf(curves[name]) if name in curves else good_BH
            finite.append(fine)
        finite.append(good_BH if rows_BHRS is None else ~_nan_or_plus_inf(rows_BHRS))
        finite_QBH = torch.stack(finite)
        self.add("bad", (~finite_QBH).sum(1).float())
        return finite_QBH.all(0)


def one_per_group(groups_B: Tensor, x_B: Tensor) -> tuple[Tensor, Tensor]:
    """The groups that occur, and their sums: what is worth sending to another device."""
    found, slot_B = groups_B.unique(return_inverse=True)
    return found, x_B.new_zeros(len(found), *x_B.shape[1:]).index_add_(0, slot_B, x_B)


def keep(x_BH: Tensor, good_BH: Tensor) -> Tensor:
    """x where the head is good, 0 where it is not (NaN times 0 would be NaN)."""
    if good_BH.all():
        return x_BH
    return x_BH.where(good_BH.view(*good_BH.shape, *[1] * (x_BH.ndim - 2)), 0.0)


def _nan_or_plus_inf(x_BHx: Tensor) -> Tensor:
    """A maximum carries both, and −inf only where there is nothing else."""
    top_BH = x_BHx.flatten(2).amax(-1)
    return top_BH.isnan() | (top_BH == torch.inf)
