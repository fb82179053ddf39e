"""The entropy of the rows of one attention call, on the row-statistics kernel.

The BOS column is hidden from the kernel and joined to what it returns (`ropemods.attention.column_entropy`).

Shapes: B batch, H query heads, T queries.
"""

from __future__ import annotations

from torch import Tensor

from ropemods.attention.column_entropy import with_column, without_column
from ropemods.attention.rows import Rows, scaled
from ropemods.attention.triton.row_stats import row_stats
from ropemods.attention.triton.spans import spans


def entropy(rows: Rows) -> Tensor:
    """H of every row (B, H, T) as its entropy scale reads it."""
    if rows.row_scale is not None:
        rows = scaled(rows)
    queries, keys = rows.q_BHTD.shape[2], rows.k_BGSD.shape[2]
    where = spans(queries, keys, causal=rows.causal, device=rows.q_BHTD.device)
    lse, others = row_stats(
        rows.q_BHTD, rows.k_BGSD, where, mask=without_column(rows), scale=rows.scale, softcap=rows.softcap
    )
    return with_column(rows, lse, others)
