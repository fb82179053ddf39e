"""What one attention call computes: every softmax row, with the terms that modifications add (`terms`).

A plain row i is  out_i = Σ_j e^{s_ij} v_j / Σ_j e^{s_ij}  with s_ij = scale · ⟨q_i, k_j⟩, soft-capped where the model
does that. `plus` adds a term, by the term's own rule where there is one of its kind already.

Shapes: B batch, H query heads, G key/value heads, T queries, S keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ropemods.attention.terms import Column, EntropyScale, KeyBias, OffsetBias, RowScale, Slot, Term

FIELDS: dict[type, str] = {
    Column: "column",
    KeyBias: "key_bias",
    OffsetBias: "offset_bias",
    RowScale: "row_scale",
    EntropyScale: "entropy_scale",
    Slot: "slots",
}


class Rows(NamedTuple):
    """One attention call. `None` terms are absent, and cost nothing."""

    q_BHTD: Tensor
    k_BGSD: Tensor
    v_BGSD: Tensor
    mask: Tensor | None
    """Broadcastable to (B, 1 or H, T, S): boolean (True may be seen) or additive."""
    causal: bool
    """Query i sees keys 0..i. Only without a mask."""
    scale: float
    softcap: float | None = None
    dropout: float = 0.0
    column: Column | None = None
    key_bias: KeyBias | None = None
    offset_bias: OffsetBias | None = None
    row_scale: RowScale | None = None
    entropy_scale: EntropyScale | None = None
    """Asked for; a backend's `tempered` turns it into a row scale."""
    slots: tuple[Slot, ...] = ()

    def plus(self, term: Any) -> Rows:
        """With one more term, or, of a kind that two of compose, with both as one."""
        name = FIELDS[type(term)]
        before = getattr(self, name)
        if name == "slots":
            return self._replace(slots=(*before, term))
        return self._replace(**{name: before.joined(term) if before is not None and hasattr(term, "joined") else term})

    def terms(self) -> Iterator[Term]:
        for name in FIELDS.values():
            held = getattr(self, name)
            yield from held if name == "slots" else () if held is None else (held,)

    def names(self) -> set[str]:
        """Of the kinds of terms that are there."""
        return {type(term).__name__ for term in self.terms()}


HIDDEN = -9984.0
"""An additive mask of this or less hides the key, in every dtype: -1e4, as bf16 rounds it."""


def shown(mask: Tensor) -> Tensor:
    """Where a mask, boolean (or of ones and zeros) or additive, shows the key."""
    return mask > HIDDEN if mask.dtype.is_floating_point else mask.bool()


def visible_keys(rows: Rows) -> Tensor:
    """How many keys each query may see: (B or 1, H or 1, T)."""
    queries, keys = rows.q_BHTD.shape[2], rows.k_BGSD.shape[2]
    if rows.mask is not None:
        return shown(rows.mask).expand(*rows.mask.shape[:-1], keys).sum(-1).expand(*rows.mask.shape[:2], queries)
    index_T = torch.arange(queries, device=rows.q_BHTD.device)
    return (index_T + keys - queries + 1 if rows.causal else torch.full_like(index_T, keys))[None, None]


def own_column(rows: Rows) -> Tensor:
    """The column of each query's own key, which is the last that it sees: (B or 1, T). A static cache has keys behind
    it that are not filled yet."""
    queries, keys = rows.q_BHTD.shape[2], rows.k_BGSD.shape[2]
    index_S = torch.arange(keys, device=rows.q_BHTD.device)
    if rows.mask is None:
        return index_S[None, keys - queries :]
    return torch.where(shown(rows.mask).any(1), index_S, 0).amax(-1).expand(-1, queries)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype logits are reasoned about in: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def soft_capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def with_beta(rows: Rows, entropy_BHT: Tensor) -> Rows:
    """`rows` with the rule of its entropy scale applied, given the entropy that it reads."""
    rule = rows.entropy_scale
    assert rule is not None
    beta_BHT = rule.beta(entropy_BHT)
    return rows._replace(entropy_scale=None).plus(RowScale(beta_BHT, None if rule.spares_column else beta_BHT))


def scaled(rows: Rows) -> Rows:
    """`rows` with its row scale on the queries and on the column, for kernels that know no other factor.

    Not where logits are soft-capped, which is done before they are scaled.
    """
    if rows.row_scale is None:
        return rows
    assert rows.softcap is None
    q = (rows.q_BHTD * rows.row_scale.beta_BHT.unsqueeze(-1)).to(rows.q_BHTD.dtype)
    return rows._replace(q_BHTD=q, row_scale=None, column=scaled_column(rows))


def scaled_column(rows: Rows) -> Column | None:
    column = rows.column
    if column is None or rows.row_scale is None or rows.row_scale.column_BHT is None:
        return column
    return column._replace(logit_BHT=column.logit_BHT * rows.row_scale.column_BHT.to(column.logit_BHT.dtype))


def additive_mask(rows: Rows, dtype: torch.dtype) -> Tensor | None:
    """The visibility of `rows` as a term to add to the logits; the causal pattern is left implicit."""
    if rows.mask is None or rows.mask.dtype != torch.bool:
        return rows.mask if rows.mask is None else rows.mask.to(dtype)
    return torch.zeros_like(rows.mask, dtype=dtype).masked_fill_(~rows.mask, float("-inf"))


def dot_with_bos(q_BHTD: Tensor, k_bos_BGND: Tensor, scale: float) -> Tensor:
    """scale · ⟨q_i, k_bos⟩ for each query, with one BOS key a row (N = 1) or one a query (N = T); accumulated wide."""
    dtype = wide(q_BHTD.dtype)
    groups = k_bos_BGND.shape[1]
    q_BGRTD = q_BHTD.to(dtype).unflatten(1, (groups, -1))
    if k_bos_BGND.shape[2] == 1:  # one vector for all queries: a product that nothing of their size is made for
        product = torch.matmul(q_BGRTD.flatten(2, 3), k_bos_BGND.to(dtype).transpose(2, 3))
        return (product * scale).view(q_BHTD.shape[:3])
    logit_BGRT = (q_BGRTD * k_bos_BGND.to(dtype).unsqueeze(2)).sum(-1) * scale
    return logit_BGRT.flatten(1, 2)
