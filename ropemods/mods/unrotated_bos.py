"""UnrotatedBos: the BOS is scored as if every query stood where it stands.

The BOS column is the only one whose offset always equals the query's own position i, so its logit spells out absolute
position. Here the query is turned back towards its BOS before the two are multiplied:

    b_i = scale · ⟨R(−strength · i) q_i, k_bos⟩          (q_i and k_bos as the model rotated them)

Strength 0 is RoPE; at 1 the offset is 0 for every query, which is both vectors left unrotated. Nothing trains.
Cost: a head wider by eight channels, no second attention pass and no mask. The BOS key in a cache is the stock one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from ropemods.attention.plain_row import PlainRow, rotate
from ropemods.attention.rows import Rows, wide
from ropemods.mods.base import Call, Mod, Site, Stage
from ropemods.mods.bos_column import bos_logit, check_told, turned, with_bos_column


@dataclasses.dataclass(frozen=True)
class UnrotatedBos(Mod):
    """Score the BOS column at offset (1 − strength) · i instead of i."""

    kind: ClassVar[str] = "unrotated_bos"

    @property
    def needs_bos(self) -> bool:
        return True

    @property
    def needs_layout(self) -> bool:
        return True

    def conflict(self, others: Sequence[Mod], layer_count: int) -> str | None:
        own = self.acts_on(layer_count)
        for other in (other for other in others if other.closes_bos):
            if both := sorted(own & other.acts_on(layer_count)):
                rest = sorted(own - set(both))
                name, closing = type(self).__name__, type(other).__name__
                instead = f"give {name} the layers {rest} alone" if rest else f"leave {name} out"
                if hasattr(other, "read_bos"):
                    instead = f"use {closing}(read_bos=True), or {instead}"
                return (
                    f"{name} rescores the BOS column and {closing} closes it, in layers {both} both, where the first "
                    f"would do nothing; {instead}"
                )
        return None

    def stage(self, site: Site) -> Stage:
        return UnrotatedBosStage()


class UnrotatedBosStage(Stage):
    def back(self) -> Tensor | int:
        """The offset at which the BOS is scored."""
        return 0

    def forward(self, rows: Rows, call: Call) -> Rows:
        check_told(call)
        assert call.bos_distance_BT is not None
        strength = self.strength.to(wide(rows.q_BHTD.dtype))
        q_BHTD = turned(rows, call, strength * (call.bos_distance_BT - self.back()).to(strength.dtype))
        return with_bos_column(rows, call, bos_logit(rows, call, q_BHTD))

    def naive(self, row: PlainRow, call: Call) -> None:
        assert call.bos_distance_BT is not None and call.inv_freq_F is not None
        if row.bos is None:
            return
        turn = self.alpha * (call.bos_distance_BT[row.at[::2]] - self.back()).double()
        angle_F = -turn * call.inv_freq_F.double()
        turned_D = rotate(row.query_D, angle_F, call.layout)
        row.bos_logit = row.capped(row.scale * (turned_D * row.keys_ND[row.bos]).sum())
