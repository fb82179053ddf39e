"""How far early queries' attention to their neighbours departs from late queries', with a gradient.

`measure` asks the same of whole crops without a gradient; here a few queries of each sequence are read, so that the
answer can be trained on at a cost that does not grow with the sequence:

    D(i, δ) = mean over sequences of r(i, δ) − mean over sequences and late queries j of r(j, δ)
    r(i, δ) = s_{i,i−δ} − logsumexp over the w offsets δ′ of s_{i,i−δ′}

A run is a stretch of a row in which one sequence stands by itself: query i of a run sees the run's first i + 1 tokens.
Late queries are spread evenly over a run's second half. The key at offset δ of a late query need not be one of an early
query, so keys are taken in two parts: those before and under the early queries, and w for each late query.

Shapes: B batch, H query heads, G key heads, T tokens, D head dim, L layers, N runs, E early queries, A late queries,
Q = E + A, W window, C keys taken of a run = (E + W − 1) + A · W.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ropemods.attention.rows import Rows, soft_capped, wide


class Plan(NamedTuple):
    """Which queries and keys of a batch are read."""

    row_N1: Tensor
    query_NQ: Tensor
    """Columns."""
    key_NC: Tensor
    early: int
    window: int
    near: int
    """Columns up to the last that an early query sees."""

    @property
    def runs(self) -> int:
        return len(self.row_N1)


class Read(NamedTuple):
    """What was taken of one layer's rows, in the model's dtype and without a graph."""

    q_NQHD: Tensor
    k_NCGD: Tensor
    beta_NQH: Tensor | None
    scale: float
    softcap: float | None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.q_NQHD, self.k_NCGD) if self.beta_NQH is None else (self.q_NQHD, self.k_NCGD, self.beta_NQH)


def plan(
    runs: Sequence[tuple[int, int, int]],
    *,
    early: tuple[int, int],
    window: int,
    late: int,
    device: torch.device,
) -> Plan:
    """For runs given as (row, first column, length), each of at least 2 · early[1] tokens."""
    row_N1, start_N1, length_N1 = torch.tensor(runs).unsqueeze(-1).unbind(1)
    early_E = torch.arange(*early)
    half_N1 = length_N1 // 2
    late_NA = half_N1 + torch.arange(late) * (length_N1 - half_N1) // late
    query_NQ = torch.cat((early_E.expand(len(runs), -1), late_NA), 1)
    near_NC = torch.arange(early[0] - window + 1, early[1]).expand(len(runs), -1)
    far_NC = (late_NA[..., None] + torch.arange(1 - window, 1)).flatten(1)
    key_NC = torch.cat((near_NC, far_NC), 1)
    return Plan(
        row_N1.to(device),
        (start_N1 + query_NQ).to(device),
        (start_N1 + key_NC).to(device),
        early=len(early_E),
        window=window,
        near=int(start_N1.max()) + early[1],
    )


def read(rows: Rows, plan: Plan) -> Read:
    row_N1, query_NQ, key_NC = plan.row_N1, plan.query_NQ, plan.key_NC
    beta_BHT = None if rows.row_scale is None else rows.row_scale.beta_BHT
    return Read(
        rows.q_BHTD[row_N1, :, query_NQ],
        rows.k_BGSD[row_N1, :, key_NC],
        None if beta_BHT is None else beta_BHT[row_N1, :, query_NQ],
        rows.scale,
        rows.softcap,
    )


def tensors(rows: Rows) -> list[Tensor]:
    """What a gradient may be wanted of, in the order of `Read.tensors`."""
    return [rows.q_BHTD, rows.k_BGSD, *([] if rows.row_scale is None else [rows.row_scale.beta_BHT])]


def with_tensors(rows: Rows, given: tuple[Tensor, ...]) -> Rows:
    rows = rows._replace(q_BHTD=given[0], k_BGSD=given[1])
    scale = rows.row_scale
    return rows if scale is None else rows._replace(row_scale=scale._replace(beta_BHT=given[2]))


def put_back(grads: tuple[Tensor, ...], plan: Plan, more: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of `tensors` with those of what was read of them added."""
    columns = (plan.query_NQ, plan.key_NC, plan.query_NQ)
    return tuple(_added(g, at, plan.row_N1, x) for g, at, x in zip(grads, columns, more, strict=False))


def _added(grad_BHTx: Tensor, at_NQ: Tensor, row_N1: Tensor, more_NQHx: Tensor) -> Tensor:
    B, H, T = grad_BHTx.shape[:3]
    flat = grad_BHTx.transpose(1, 2).reshape(B * T, H, *grad_BHTx.shape[3:])
    index = (row_N1 * T + at_NQ).flatten()
    flat = flat.index_add(0, index, more_NQHx.flatten(0, 1).to(flat.dtype))
    return flat.view(B, T, H, *grad_BHTx.shape[3:]).transpose(1, 2)


def deviations(q_LNQHD: Tensor, k_LNCGD: Tensor, beta_LNQH: Tensor | None, like: Read, plan: Plan) -> Tensor:
    """D of several layers that score alike (LHEW), in fp32 (fp64 for fp64)."""
    (L, N, Q, H, D), G, W, E = q_LNQHD.shape, k_LNCGD.shape[3], plan.window, plan.early
    dtype = wide(q_LNQHD.dtype)
    # r numbers the query heads that share a key head.
    q_LNQGrD = (q_LNQHD.to(dtype) * like.scale).view(L, N, Q, G, H // G, D)
    near_LNCGD, far_LNCGD = k_LNCGD.to(dtype).split((E + W - 1, (Q - E) * W), dim=2)
    early_LNEGDW = near_LNCGD.unfold(2, W, 1)
    late_LNAGDW = far_LNCGD.view(L, N, Q - E, W, G, D).permute(0, 1, 2, 4, 5, 3)
    s_LNQGrW = torch.cat(
        (torch.matmul(q_LNQGrD[:, :, :E], early_LNEGDW), torch.matmul(q_LNQGrD[:, :, E:], late_LNAGDW)), 2
    )
    # Keys come in rising order, so the last is at offset 0.
    s_LNQHW = soft_capped(s_LNQGrW.flatten(3, 4).flip(-1), like.softcap)
    if beta_LNQH is not None:
        s_LNQHW = s_LNQHW * beta_LNQH.to(dtype)[..., None]
    r_LNQHW = s_LNQHW - s_LNQHW.logsumexp(-1, keepdim=True)
    r_LQHW = r_LNQHW.mean(1)
    return (r_LQHW[:, :E] - r_LQHW[:, E:].mean(1, keepdim=True)).transpose(1, 2)
