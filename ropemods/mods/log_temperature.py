"""LogTemperature: rows are sharpened by the logarithm of how many keys they see.

A softmax over n logits of a fixed spread grows flatter with n: its entropy rises as log n. A factor on the logits that
rises as log n as well keeps it where it was.

    start="model":  β = 1 + s · log(n / n₀)              s trains from 0, which is the model
    start="log":    β = s · log n                        s trains from 1 / log n₀ (SSMax, arXiv 2501.19399)
    steps=True:     β = 1 + s · log(⌊n / n₀⌋ + 1)        Llama 4's rule: rows of fewer than n₀ keys stay as they are

n₀ is `neutral`, the length at which a row keeps its logits before anything has trained; at 384, 1 / log n₀ is the 0.168
that SSMax begins with. Keys that the mask hides are not counted, so padding, packing and windows count as they should.
s is one number a head, a layer or for the model, or a fixed one; Llama 4 has 0.1 and n₀ = 8192.

Strength: β ← 1 + strength · (β − 1). Cost: a factor on the queries; where there is a mask, counting what it shows.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ropemods.attention.plain_row import PlainRow
from ropemods.attention.rows import Rows, visible_keys, wide
from ropemods.attention.terms import RowScale
from ropemods.mods.base import Call, Mod, SharedParameter, Site, Stage


@dataclasses.dataclass(frozen=True)
class LogTemperature(Mod):
    """Multiply each row's logits by a factor that grows with the logarithm of its length."""

    kind: ClassVar[str] = "log_temperature"
    always_shown: ClassVar[tuple[str, ...]] = ("scale",)

    scale: float | Literal["head", "layer", "shared"] = "head"
    """s: trained, one for each head, each layer or the model; or a number."""
    start: Literal["model", "log"] = "model"
    neutral: float = 384.0
    """n₀."""
    steps: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neutral <= 1:
            raise ValueError(f"log_temperature: neutral must be a length above 1, not {self.neutral:g}")
        if self.steps and self.start == "log":
            raise ValueError("log_temperature: steps are counted from the model; leave start='log' out")
        if self.scale == 0:
            raise ValueError("log_temperature: with a scale of 0 nothing would change; give a number, or 'head'")

    @classmethod
    def worth_trying(cls) -> tuple[Mod, ...]:
        return ()  # it starts at the model, so there is nothing to see before it has trained

    @property
    def has_parameters(self) -> bool:
        return isinstance(self.scale, str)

    @property
    def first(self) -> float:
        """The value of s that nothing has trained."""
        if isinstance(self.scale, str):
            return 1 / math.log(self.neutral) if self.start == "log" else 0.0
        return float(self.scale)

    def stage(self, site: Site) -> Stage:
        return LogTemperatureStage(self, site.heads)

    def shared_stage(self) -> Stage | None:
        return SharedParameter(self.kind, "moved", 1) if self.scale == "shared" else None


class LogTemperatureStage(Stage):
    def __init__(self, mod: LogTemperature, heads: int) -> None:
        super().__init__()
        self.mod = mod
        if mod.scale in ("layer", "head"):
            self.moved = nn.Parameter(torch.zeros(heads if mod.scale == "head" else 1))

    def forward(self, rows: Rows, call: Call) -> Rows:
        dtype = wide(rows.q_BHTD.dtype)
        count = visible_keys(rows).clamp(min=1).to(dtype)
        beta = self.base + self.scale_H(call, dtype)[:, None] * self.growth(count)
        beta = 1 + self.strength.to(dtype) * (beta - 1)
        beta = beta.expand(rows.q_BHTD.shape[:3])
        return rows.plus(RowScale(beta, beta))

    def naive(self, row: PlainRow, call: Call) -> None:
        scale_H = self.scale_H(call, torch.float64)
        count = torch.tensor(float(max(len(row.columns), 1)), dtype=torch.float64)
        beta = self.base + scale_H[row.at[1] % len(scale_H)] * self.growth(count)
        beta = 1 + self.alpha * (beta - 1)
        row.scales.append((beta, beta))

    def learned(self) -> str | None:
        if not hasattr(self, "moved"):
            return None
        scale = self.mod.first + self.moved.detach().float()
        return f"s = {scale.mean():.3f} ({scale.min():.3f} to {scale.max():.3f})"

    @property
    def base(self) -> float:
        return 0.0 if self.mod.start == "log" else 1.0

    def growth(self, count: Tensor) -> Tensor:
        """What s is multiplied by, from how many keys a row sees."""
        if self.mod.start == "log":
            return count.log()
        share = count / self.mod.neutral
        return torch.log1p(share.floor()) if self.mod.steps else share.log()

    def scale_H(self, call: Call, dtype: torch.dtype) -> Tensor:
        """s: one, or one a head."""
        if not self.mod.has_parameters:
            return self.strength.new_full((1,), self.mod.first, dtype=dtype)
        moved = call.shared[self.mod.kind] if self.mod.scale == "shared" else self.moved
        return self.mod.first + moved.to(dtype)
