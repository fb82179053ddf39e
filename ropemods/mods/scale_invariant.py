"""ScaleInvariant: every range of distances weighs alike, whichever power of ten it is (arXiv 2505.17083).

Take the logits of keys t tokens back for Gaussian with mean m and standard deviation a. Two things are asked of every
stretch from t to c · t: that the weight in it does not depend on t, E[e^L] ∝ 1 / (t/τ + 1), and that how sparse it is
does not either, E[L e^L] ∝ 1 / (t/τ + 1). Since E[e^L] = e^(m + a²/2) and E[L e^L] = (m + a²) e^(m + a²/2), this is
m + a²/2 = −log(t/τ + 1) + ½ and m + a² = 1, where the constants leave the key at t = 0 as it is:

    logit ← a_t · logit + m_t,      a_t = √(2 log(t/τ + 1) + 1),      m_t = −2 log(t/τ + 1)

`start="model"`: one gate g a head, trained from 0, has 1 + g (a − 1) and g · m in their place; "paper" has g = 1,
and nothing trains. Strength multiplies g.
Cost: written-out scores (attn_implementation="eager") or FlexAttention, since fused kernels know no distances.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ropemods.attention.plain_row import PlainRow
from ropemods.attention.rows import Rows, wide
from ropemods.attention.terms import OffsetBias
from ropemods.mods.base import Call, Mod, Site, Stage


@dataclasses.dataclass(frozen=True)
class ScaleInvariant(Mod):
    """Scale and shift each logit by how far back its key stands."""

    kind: ClassVar[str] = "scale_invariant"
    always_shown: ClassVar[tuple[str, ...]] = ("tau",)

    tau: float = 10.0
    """The distance from which on keys stand for one another by their scale; the paper's value."""
    start: Literal["model", "paper"] = "model"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau <= 0:
            raise ValueError(f"scale_invariant: tau is a distance in tokens, above 0, not {self.tau:g}")

    @classmethod
    def worth_trying(cls) -> tuple[Mod, ...]:
        return ()  # it starts at the model, so there is nothing to see before it has trained

    @property
    def has_parameters(self) -> bool:
        return self.start == "model"

    def stage(self, site: Site) -> Stage:
        return ScaleInvariantStage(self, site.heads)


class ScaleInvariantStage(Stage):
    def __init__(self, mod: ScaleInvariant, heads: int) -> None:
        super().__init__()
        self.mod = mod
        if mod.has_parameters:
            self.gate = nn.Parameter(torch.zeros(heads))

    def forward(self, rows: Rows, call: Call) -> Rows:
        offset = torch.arange(rows.k_BGSD.shape[2], device=rows.q_BHTD.device)
        return rows.plus(self.term(offset.to(wide(rows.q_BHTD.dtype))))

    def naive(self, row: PlainRow, call: Call) -> None:
        if row.columns:
            self.term(torch.arange(row.columns[-1] + 1, dtype=torch.float64)).naive(row)

    def learned(self) -> str | None:
        gate = getattr(self, "gate", None)
        return None if gate is None else f"g = {gate.mean():.3f} ({gate.min():.3f} to {gate.max():.3f})"

    def term(self, offset_O: Tensor) -> OffsetBias:
        gate = self.gate if self.mod.has_parameters else self.strength.new_ones(1)
        gate_H1 = (self.strength * gate).to(offset_O.dtype)[:, None]
        apart_O = torch.log1p(offset_O / self.mod.tau)
        return OffsetBias(1 + gate_H1 * ((2 * apart_O + 1).sqrt() - 1), -2 * gate_H1 * apart_O)
