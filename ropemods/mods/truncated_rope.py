"""TruncatedRoPE: the lowest rotary frequencies stop turning (p-RoPE, arXiv 2410.06205).

    g_k = θ^(−2(k−1)/d), k = 1 … d/2;   the floor(p · d/2) highest stay, the others become g_k · (1 − strength).

The exponent keeps the full d, so the kept frequencies are unchanged: this is not partial RoPE, which re-spreads the
ladder over fewer channels and keeps the lowest. `which="highest"` drops the highest instead, the paper's control.

Strength 0 is RoPE; 1 is p-RoPE: dropped pairs are not turned, whatever the position. Their cos is 1 and their sin 0,
both times what the model's scaling puts on every pair: YaRN and longrope multiply all tables by one factor (1.1386 for
YaRN by 4), which sharpens every logit alike and says nothing of position, so it stays as it was trained.
Nothing trains. It costs nothing: the tables are edited, not the attention. Cached decoding is that of RoPE.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ropemods.mods.base import Mod


@dataclasses.dataclass(frozen=True)
class TruncatedRoPE(Mod):
    """Keep the fraction `keep` of the rotary frequencies; the others stop turning."""

    kind: ClassVar[str] = "truncated_rope"
    always_shown: ClassVar[tuple[str, ...]] = ("keep",)

    keep: float = 0.75
    which: Literal["lowest", "highest"] = "lowest"
    """Which end of the ladder is dropped."""

    def __post_init__(self) -> None:
        if isinstance(self.keep, bool) or not isinstance(self.keep, int | float) or not 0 <= self.keep < 1:
            raise ValueError(
                f"truncated_rope: keep must be at least 0 (NoPE) and below 1 (RoPE itself), not {self.keep!r}"
            )
        super().__post_init__()

    @classmethod
    def worth_trying(cls) -> tuple[Mod, ...]:
        return cls(keep=0.75), cls(keep=0.5)

    @classmethod
    def keeping(cls, kept: int, count: int) -> TruncatedRoPE:
        """The one with the smallest round share that keeps so many of `count` frequencies."""
        for digits in range(1, 17):
            share = round(kept / count, digits)
            if share < 1 and cls(share).kept(count) == kept:
                return cls(share)
        share = kept / count
        while cls(share).kept(count) < kept:  # rounding may leave the quotient just below
            share = math.nextafter(share, 1.0)
        return cls(share)

    @property
    def share_kept(self) -> float | None:
        return self.keep if self.which == "lowest" else None

    def kept(self, count: int) -> int:
        """How many of `count` frequencies stay: the floor, as the paper's code and transformers have it."""
        return int(self.keep * (2 * count) // 2)

    def dropped(self, count: int) -> Tensor:
        """True for the frequencies that stop turning; index 0 is the highest."""
        index = torch.arange(count)
        kept = self.kept(count)
        return index >= kept if self.which == "lowest" else index < count - kept

    def frequencies(self, inv_freq_F: Tensor, alpha: float) -> Tensor:
        dropped = self.dropped(len(inv_freq_F)).to(inv_freq_F.device)
        return torch.where(dropped, inv_freq_F * (1 - alpha), inv_freq_F)
