"""Modifications of a user's own, one for each place that a modification may act in."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, nn

import ropemods as rm
from ropemods.attention.rows import Rows
from ropemods.attention.terms import EntropyScale, Slot
from ropemods.mods.base import Call, Site, Stage, Table
from ropemods.mods.bos_column import with_bos_column


@rm.register
@dataclasses.dataclass(frozen=True)
class Slowed(rm.Mod):
    """Every rotary frequency is lower by a factor."""

    kind: ClassVar[str] = "slowed"

    by: float = 0.5

    def frequencies(self, inv_freq_F: Tensor, alpha: float) -> Tensor:
        return inv_freq_F * (1 - alpha * self.by)


@rm.register
@dataclasses.dataclass(frozen=True)
class Shifted(rm.Mod):
    """A trainable number for each head joins the softmax's denominator."""

    kind: ClassVar[str] = "shifted"

    start: float = 0.5
    names: tuple[str, ...] = ()

    @property
    def has_parameters(self) -> bool:
        return True

    def stage(self, site: Site) -> Stage:
        return ShiftedStage(self, site.heads)


class ShiftedStage(Stage):
    def __init__(self, mod: Shifted, heads: int) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.full((heads,), mod.start))

    def forward(self, rows: Rows, call: Call) -> Rows:
        return rows.plus(Slot(self.number.float() + self.strength.log()))


@rm.register
@dataclasses.dataclass(frozen=True)
class Cooled(rm.Mod):
    """A temperature that the entropy does not move."""

    kind: ClassVar[str] = "cooled"

    def stage(self, site: Site) -> Stage:
        return CooledStage()


class CooledStage(Stage):
    def forward(self, rows: Rows, call: Call) -> Rows:
        rule = torch.tensor([[0.0, 2.0]], device=rows.q_BHTD.device)
        return rows.plus(EntropyScale(rule, self.strength))


@rm.register
@dataclasses.dataclass(frozen=True)
class Levelled(rm.Mod):
    """The BOS column at logit 0."""

    kind: ClassVar[str] = "levelled"

    @property
    def needs_bos(self) -> bool:
        return True

    def stage(self, site: Site) -> Stage:
        return LevelledStage()


class LevelledStage(Stage):
    def forward(self, rows: Rows, call: Call) -> Rows:
        rows = with_bos_column(rows, call)
        assert rows.column is not None
        logit = rows.column.logit_BHT * (1 - self.strength)
        return rows.plus(rows.column._replace(logit_BHT=logit))


@rm.register
@dataclasses.dataclass(frozen=True)
class Dimmed(rm.Mod):
    """Every other channel of what the input embedding gives is smaller, whatever the token."""

    kind: ClassVar[str] = "dimmed"

    def embedding_stage(self, bos_token_id: int | None) -> Stage:
        return DimmedStage()


class DimmedStage(Stage):
    def forward(self, embedded_BTE: Tensor, ids_BT: Tensor, table: Table) -> Tensor:
        even = torch.arange(embedded_BTE.shape[-1], device=embedded_BTE.device) % 2 == 0
        return torch.where(even, embedded_BTE * (1 - self.strength / 2), embedded_BTE)
