"""AnchoredBos: the BOS is scored as if it always stood the same way back.

As in `unrotated_bos`, the logit of the BOS column no longer says how far along the sequence a query is. The offset
there is 0, which no query but the BOS itself has met in training; here it is one that a trained model knows:

    b_i = scale · ⟨R(−strength · (i − offset)) q_i, k_bos⟩          (q_i and k_bos as the model rotated them)

`offset="calibrated"`: with a calibration batch, in each layer the offset that changes the mass on BOS least (the
summary names it); without one, 32. Strength 0 is RoPE. Nothing trains. Cost: that of UnrotatedBos.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from torch import Tensor

from ropemods.attention.rows import Rows
from ropemods.mods.base import Call, Site
from ropemods.mods.bos_column import check_offset, first_offset, offset_of_least_change
from ropemods.mods.unrotated_bos import UnrotatedBos, UnrotatedBosStage


@dataclasses.dataclass(frozen=True)
class AnchoredBos(UnrotatedBos):
    """Score the BOS column at one offset for every query."""

    kind: ClassVar[str] = "anchored_bos"
    always_shown: ClassVar[tuple[str, ...]] = ("offset",)

    offset: int | Literal["calibrated"] = "calibrated"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_offset(self.kind, self.offset)

    @property
    def calibrates(self) -> bool:
        return self.offset == "calibrated"

    def stage(self, site: Site) -> AnchoredBosStage:
        return AnchoredBosStage(self)


class AnchoredBosStage(UnrotatedBosStage):
    offset: Tensor

    def __init__(self, mod: AnchoredBos) -> None:
        super().__init__()
        self.mod = mod
        self.register_buffer("offset", first_offset(mod.offset))

    def back(self) -> Tensor:
        return self.offset

    def calibrate(self, rows: Rows, call: Call) -> None:
        if self.mod.calibrates:
            self.offset.fill_(offset_of_least_change(rows, call))

    def learned(self) -> str:
        return f"BOS scored {int(self.offset)} back"
