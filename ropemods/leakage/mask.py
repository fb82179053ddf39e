"""The mask term: what the causal mask alone shows of a query's position.

Logits are made Toeplitz in the mean, s̃ = s − D with D_ij = E s_ij − (mean of E s along the
diagonal), the real mask is kept, and the term is the spread over i of

    V_mask(i, δ) = E[s̃_{i,i−δ} − log Z̃_i],     Z̃_i = Σ_j e^{s̃_ij} over the keys that i may see.

E s̃_{i,i−δ} is the same for every i by construction, so only −E log Z̃_i can vary and that is what is
summed here.

**An estimated D must not be counted as signal.** log Z̃ answers an error e in D by −Σ_j ā_ij e_ij
with ā_ij the mean attention of the Toeplitz rows: noise as large as the term's own. So every
sequence also carries its own answer to that error (its influence on D),

    ψ_i(s) = log Z̃_i(s; D) − Σ_j ā_ij (d_ij(s) − D_ij) + ¼ Var_{a_i(s)}(D − D′)
             d_ij(s) = s_ij − (the mean of s along that diagonal),   a_i(s) = softmax of s̃_i

and errors in D and ā enter only as products of two. The mean of such a product is −½ E Var_a(e); the last
term gives it back, from D and an independent D′ of as many sequences. What is left has mean 0 but is
common to all groups, and its square would count. So there are two chains, a and b, whose D and ā come
from different documents, and a product takes ψ^a of one group and ψ^b of another: four folds in the sense of the
definition. In one pass: the first groups give D (even groups for a, odd for b), the next ā under
that D (likewise), the rest ψ^a and ψ^b.

The intervals take D and ā as given. What these add falls with 1/N², the width of the interval with 1/√N, or
with 1/N where the term is 0.

**The grid.** Rows are whole, so only a grid of queries is read (`Protocol.grid`: dyadic, because log Z
bends like log i, and even). Between grid rows V is interpolated linearly in log i; from there on the
mask term is averaged over queries exactly as the others are, and no part of the axis weighs more because
rows are dense there. The mean along a diagonal runs over its cells on grid rows, each row weighted by
the number of queries it stands for in that interpolation.

**BOS** (column 0) has no diagonal: its offset is always i. Its D is 0, so that whatever its logit does
as i grows (rotation, dilution) stays in the term; the sink curves show it apart.

Rows are kept by offset, y[r, o] = s[i_r, i_r − o], so that a diagonal is a column.

Shapes: C = 2 chains, B batch, H heads, K groups, R grid rows, S keys, O offsets (= S).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ropemods.leakage.layer_sums import LayerSums
from ropemods.leakage.logits import NEGLIGIBLE
from ropemods.leakage.protocol import Protocol

FIXED = ("mask.visible", "mask.D", "mask.attention")
"""What a closed fold left behind: the same on every rank, so not to be added up."""
PSI = ("mask.psi_a", "mask.psi_b")
"""ψ of the two chains."""


class Geometry:
    """Which cells of the grid rows exist, which are content, and how a diagonal is averaged."""

    def __init__(self, protocol: Protocol, visible_RS: Tensor) -> None:
        device, w, T = visible_RS.device, protocol.window, protocol.length
        rows_R = torch.tensor(protocol.grid(), device=device)
        self.column_RO = rows_R[:, None] - torch.arange(T, device=device)
        seen_RO = visible_RS.gather(1, self.column_RO.clamp(min=0))
        self.visible_RO = seen_RO & (self.column_RO >= 0)
        self.content_RO = self.visible_RO & (self.column_RO >= 1)
        self.hide_RO = torch.zeros(seen_RO.shape, device=device).masked_fill_(~self.visible_RO, -torch.inf)
        stands_for_R = interpolation(protocol.grid(), range(w, T)).sum(0).to(device, torch.float32)
        weight_RO = stands_for_R[:, None] * self.content_RO
        self.weight_RO = weight_RO / weight_RO.sum(0).clamp(min=1e-30)

    def by_offset(self, rows_BHRS: Tensor) -> Tensor:
        """y[r, o] = s[i_r, i_r − o]; −inf where there is no such key or it is hidden."""
        index = self.column_RO.clamp(min=0).expand(rows_BHRS.shape)
        return rows_BHRS.gather(-1, index).add_(self.hide_RO)

    def departure(self, y_xRO: Tensor) -> Tensor:
        """d = y − (the mean along its diagonal) on content cells, 0 elsewhere."""
        y_xRO = y_xRO.where(self.content_RO, 0.0)
        mean_xO = (y_xRO * self.weight_RO).sum(-2, keepdim=True)
        return (y_xRO - mean_xO).where(self.content_RO, 0.0)


def interpolation(rows: Sequence[int], queries: range) -> Tensor:
    """Weights [queries, R] that interpolate linearly in log i between the grid rows; fp64."""
    rows_R = torch.tensor(rows, dtype=torch.float64).log()
    at_I = torch.tensor([math.log(i) for i in queries], dtype=torch.float64)
    right_I = torch.searchsorted(rows_R, at_I).clamp(1, len(rows) - 1)
    left_I = right_I - 1
    share_I = (at_I - rows_R[left_I]) / (rows_R[right_I] - rows_R[left_I])
    weights_IR = torch.zeros(len(queries), len(rows), dtype=torch.float64)
    at = torch.arange(len(queries))
    weights_IR[at, right_I] = share_I
    weights_IR[at, left_I] = 1 - share_I
    return weights_IR


def add_rows(
    sums: LayerSums,
    fold: int,
    groups_B: Tensor,
    rows_BHRS: Tensor,
    extra_BHR: Tensor | None,
    geometry: Geometry,
) -> None:
    """Add a batch's whole rows to what the open fold is for.

    extra: a further logit in the denominator of each row, as a learned sink has.
    """
    y_BHRO = geometry.by_offset(rows_BHRS)
    content_RO = geometry.content_RO
    if fold == 0:
        sums.add("mask.rows", _by_chain(y_BHRO.where(content_RO, 0.0), groups_B))
        return
    D_CHRO = sums["mask.D"].to(y_BHRO.device)
    if fold == 1:
        a_BHRO, _ = _toeplitz_softmax(y_BHRO - D_CHRO[groups_B % 2], extra_BHR)
        sums.add("mask.attention_sum", _by_chain(a_BHRO.where(content_RO, 0.0), groups_B))
        return
    d_BHRO = geometry.departure(y_BHRO)
    attention_CHRO = sums["mask.attention"].to(y_BHRO.device)
    doubt_HRO = D_CHRO[0] - D_CHRO[1]
    for chain, name in enumerate(PSI):
        D_HRO = D_CHRO[chain]
        a_BHRO, log_Z_BHR = _toeplitz_softmax(y_BHRO - D_HRO, extra_BHR)
        first_BHR = (attention_CHRO[chain] * d_BHRO).sum(-1) - (attention_CHRO[chain] * D_HRO).sum(-1)
        moved_BHRO = a_BHRO.mul_(doubt_HRO)
        mean_BHR = moved_BHRO.sum(-1)
        second_BHR = moved_BHRO.mul_(doubt_HRO).sum(-1) - mean_BHR.square()
        sums.add_by_group(name, groups_B, log_Z_BHR - first_BHR + second_BHR / 4)


def close_fold(
    sums: LayerSums,
    fold: int,
    protocol: Protocol,
    geometry: Geometry,
    reduce: Callable[[Tensor], Tensor],
) -> None:
    """Turn the sums of the first or second fold, added up over ranks, into D or into ā."""
    if fold > 1:
        return
    total_CHRO = reduce(sums.tensors.pop(("mask.rows", "mask.attention_sum")[fold]))
    mean_CHRO = total_CHRO / (len(protocol.folds()[fold]) // 2 * protocol.per_group)
    if fold == 1:
        sums.tensors["mask.attention"] = mean_CHRO
    else:
        at = geometry.weight_RO.device
        sums.tensors["mask.D"] = geometry.departure(mean_CHRO.to(at)).to(mean_CHRO.device)


def _by_chain(x_B: Tensor, groups_B: Tensor) -> Tensor:
    """Sums over the sequences of even and of odd groups, [2, …]."""
    total = x_B.new_zeros(2, *x_B.shape[1:])
    for group, x in zip(groups_B.tolist(), x_B, strict=True):
        total[group % 2] += x
    return total


def _toeplitz_softmax(even_BHRO: Tensor, extra_BHR: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention and log Z̃ of rows from which D was taken. Overwrites them: one exponential for both."""
    top_BHR = even_BHRO.amax(-1)
    if extra_BHR is not None:
        top_BHR = torch.maximum(top_BHR, extra_BHR)
    a_BHRO = even_BHRO.sub_(top_BHR[..., None]).clamp_(min=NEGLIGIBLE).exp_()
    Z_BHR = a_BHRO.sum(-1)
    if extra_BHR is not None:
        Z_BHR = Z_BHR + (extra_BHR - top_BHR).exp()
    return a_BHRO.div_(Z_BHR[..., None]), top_BHR + Z_BHR.log()
