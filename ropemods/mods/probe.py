"""One small attention call with modifications at full strength, to see which terms they ask for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ropemods.attention.rows import Rows
from ropemods.mods.base import Call, Layout, Mod, Site

TOKENS, HEADS = 4, 2


def rows_with(
    mods: Sequence[Mod], *, head_dim: int, dtype: torch.dtype, softcap: float | None = None, dropout: float = 0.0
) -> Rows:
    """Rows as a model in training would hand them to a path."""
    q, k, v = (torch.ones(1, HEADS, TOKENS, head_dim, dtype=dtype, requires_grad=True) for _ in range(3))
    position_BT = torch.arange(TOKENS)[None]
    shared: dict[str, torch.Tensor] = {}
    for mod in mods:
        if (stage := mod.shared_stage()) is not None:
            shared = stage(shared, Call())
    call = Call(
        bos_column_BN=torch.zeros(1, 1, dtype=torch.long),
        bos_distance_BT=position_BT,
        bos_is_self_BT=position_BT == 0,
        position_BT=position_BT,
        inv_freq_F=torch.ones(head_dim // 2),
        layout=Layout(interleaved=False, start=0),
        shared=shared,
        hidden_BTC=torch.zeros(1, TOKENS, HEADS * head_dim, dtype=dtype),
    )
    rows = Rows(q, k, v, mask=None, causal=True, scale=head_dim**-0.5, softcap=softcap, dropout=dropout)
    for mod in mods:
        stage = mod.stage(Site(0, HEADS, head_dim, HEADS * head_dim, head_dim))
        if stage is not None and stage.place == "rows":
            stage.set_strength(1.0)
            rows = stage(rows, call)
    return rows
