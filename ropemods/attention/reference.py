"""The oracle: an attention call computed from rows that are written out one by one (`plain_row`), in the precision of
its tensors, which should be fp64. What it does for the terms of a call is the composition of their naive forms.

Shapes: B batch, H query heads, G key/value heads, T queries, S keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ropemods.attention.plain_row import PlainRow
from ropemods.attention.rows import Rows, shown

PAPER = (-0.037, 0.481, -2.3, 4.917, -1.791)


def temperature(entropy: Tensor, *, coefficients=PAPER, beyond: str = "paper", strength: float = 1.0) -> Tensor:
    """β = max(P(H), 1) for H > 0.5, else 1; P(H) = −0.037 H⁴ + 0.481 H³ − 2.3 H² + 4.917 H − 1.791 (2410.01104)."""
    h = entropy
    if beyond == "hold":
        h = torch.minimum(h, torch.tensor(peak(coefficients), dtype=h.dtype))
    a4, a3, a2, a1, a0 = torch.as_tensor(coefficients, dtype=h.dtype).unbind(-1)
    if a4.ndim:  # one polynomial per head, heads on the second axis of the entropy
        a4, a3, a2, a1, a0 = (a[None, :, None] for a in (a4, a3, a2, a1, a0))
    p = a4 * h**4 + a3 * h**3 + a2 * h**2 + a1 * h + a0
    beta = torch.where(entropy > 0.5, torch.maximum(p, torch.ones_like(p)), torch.ones_like(p))
    return 1 + strength * (beta - 1)


def peak(coefficients=PAPER) -> float:
    """The entropy at which the polynomial is largest, by a fine search of [0.5, 8]."""
    grid = torch.linspace(0.5, 8.0, 2_000_001, dtype=torch.float64)
    a4, a3, a2, a1, a0 = coefficients
    return float(grid[(a4 * grid**4 + a3 * grid**3 + a2 * grid**2 + a1 * grid + a0).argmax()])


def truncated_frequencies(inv_freq: Tensor, *, keep: float, which: str = "lowest", strength: float = 1.0) -> Tensor:
    """p-RoPE (2410.06205): the kept fraction turns as before, each dropped frequency is multiplied by 1 − strength."""
    count = len(inv_freq)
    kept = int(keep * (2 * count) // 2)
    out = inv_freq.clone()
    for index in range(count):
        dropped = index >= kept if which == "lowest" else index < count - kept
        if dropped:
            out[index] = inv_freq[index] * (1 - strength)
    return out


def attention(rows: Rows, fill: Callable[[PlainRow], None] | None = None, bos_BT: Tensor | None = None) -> Tensor:
    """The output (B, H, T, D) of a call.

    `fill` puts into each row what its terms do not hold; `bos_BT` is the column of each query's BOS where no term says.
    """
    q_BHTD, k_BGSD, v_BGSD = rows[:3]
    batch, heads, queries, _ = q_BHTD.shape
    groups, keys = k_BGSD.shape[1:3]
    seen_BTS, added_BHTS = visible(rows), added(rows)
    outputs = []
    for b in range(batch):
        for h in range(heads):
            group = h * groups // heads
            for t in range(queries):
                columns = seen_BTS[b, t].nonzero().flatten().tolist()
                row = PlainRow(
                    at=(b, h, t),
                    query_D=q_BHTD[b, h, t],
                    keys_ND=k_BGSD[b, group, columns],
                    values_ND=v_BGSD[b, group, columns],
                    columns=columns,
                    offsets_N=columns[-1] - torch.tensor(columns) if columns else torch.zeros(0, dtype=torch.long),
                    scale=rows.scale,
                    softcap=rows.softcap,
                )
                if added_BHTS is not None:
                    row.add(added_BHTS.expand(batch, heads, -1, -1)[b, h, t, columns])
                if rows.column is not None:
                    is_bos = rows.column.is_bos_BS.expand(batch, -1)[b]
                    row.bos = next((n for n, column in enumerate(columns) if is_bos[column]), None)
                    row.is_bos = bool(rows.column.is_self_BT.expand(batch, -1)[b, t])
                if bos_BT is not None:
                    bos = int(bos_BT[b, t])
                    row.bos = columns.index(bos) if bos in columns else None
                    row.is_bos = keys - queries + t == bos
                for term in rows.terms():
                    term.naive(row)
                if fill is not None:
                    fill(row)
                outputs.append(row.out())
    return torch.stack(outputs).view(batch, heads, queries, -1)


def visible(rows: Rows) -> Tensor:
    """(B, T, S): what each query sees; masks that differ by head are not for the oracle."""
    batch, queries, keys = len(rows.q_BHTD), rows.q_BHTD.shape[2], rows.k_BGSD.shape[2]
    if rows.mask is not None:
        return shown(rows.mask)[:, 0].expand(batch, queries, keys)
    everything = torch.ones(queries, keys, dtype=torch.bool)
    return (everything.tril() if rows.causal else everything).expand(batch, queries, keys)


def added(rows: Rows) -> Tensor | None:
    """What an additive mask adds to the keys that it shows."""
    if rows.mask is None or not rows.mask.dtype.is_floating_point:
        return None
    return rows.mask.where(shown(rows.mask), 0.0).to(rows.q_BHTD.dtype)
