"""AdaptiveTemperature: each softmax row is sharpened by a factor read off its own entropy (arXiv 2410.01104).

    H = −Σ p log p (nats);   β = max(P(H), 1) if H > 0.5 else 1;   attention = softmax(β · logits)
    P(H) = −0.037 H⁴ + 0.481 H³ − 2.3 H² + 4.917 H − 1.791

As published, β exceeds 1 only for 0.8486 < H < 5.9445: past about 382 effective tokens the rule switches itself off.
`beyond="hold"` keeps the peak, β = 2.42 at H = 4.412, for every larger entropy. `spare_bos=True` takes H over the
other keys and leaves the BOS logit alone, since sharpening otherwise moves mass to the sink.

With `trainable` the polynomial trains: one for the model ("shared"), for each layer, or for each head. What trains
are offsets from `coefficients` in units of β at the peak, coefficient_k = published_k + offset_k / 4.412^k, so that
equal steps in each offset move β about equally, weight decay pulls towards the published rule, and half precision
does not round the rule itself.

The published rule was found on models trained without it, and is no start for one that is trained already: SmolLM2-135M
loses 23% by it (evals/results/untrained.json). `start="model"` begins at β = 1 for every entropy, and lets training
leave it (for each head, if `trainable` does not say otherwise): the polynomial is 1 + Σ offset_k (H / 4.412)^k, without
the corner at 0.5 and without the floor at 1, which would have no gradient there.

Strength: β ← 1 + strength · (β − 1). Cost: one more attention pass for the entropy, forward and backward.
A decoded token computes the entropy of its one row, so cached decoding equals the full pass.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ropemods.attention.plain_row import PlainRow
from ropemods.attention.rows import Rows
from ropemods.attention.terms import EntropyScale
from ropemods.mods.base import Call, Mod, SharedParameter, Site, Stage
from ropemods.mods.bos_column import with_bos_column

PUBLISHED = (-0.037, 0.481, -2.3, 4.917, -1.791)
"""Highest power first."""
PEAK = 4.412
"""The entropy at which the published polynomial is largest; also the unit of the trained offsets."""


@dataclasses.dataclass(frozen=True)
class AdaptiveTemperature(Mod):
    """Multiply each row's logits by β(entropy of the row)."""

    kind: ClassVar[str] = "adaptive_temperature"

    coefficients: tuple[float, ...] = PUBLISHED
    """P(H), highest power first."""
    beyond: Literal["paper", "hold"] = "paper"
    """Past the peak of P: follow it down, or hold its value."""
    trainable: Literal[False, "shared", "layer", "head"] = False
    spare_bos: bool = False
    start: Literal["paper", "model"] = "paper"
    """What the polynomial is before anything has trained: the rule, or 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start == "model":
            if self.coefficients != PUBLISHED:
                raise ValueError(
                    "adaptive_temperature: start='model' is β = 1 until it has trained, whatever the coefficients; "
                    "leave them out"
                )
            if not self.trainable:  # or it would stay at 1 for ever
                object.__setattr__(self, "trainable", "head")
            return
        if len(self.coefficients) < 2:
            raise ValueError(f"adaptive_temperature: coefficients must be two or more, not {self.coefficients!r}")
        if self.peak() is None:
            raise ValueError(
                f"adaptive_temperature: P(H) with coefficients {self.coefficients} is at most 1 for every entropy from "
                "0.5 to 12 nats, so nothing would ever be sharpened; the highest power comes first"
            )

    @classmethod
    def timed(cls) -> dict[str, tuple[Mod, ...]]:
        return {"temperature": (cls(),)}

    @classmethod
    def worth_trying(cls) -> tuple[Mod, ...]:
        return cls(), cls(spare_bos=True)

    def peak(self) -> float | None:
        """Where P is largest between 0.5 and 12 nats; None when it nowhere exceeds 1 there."""
        entropy = torch.linspace(0.5, 12.0, 11501, dtype=torch.float64)
        value = torch.zeros_like(entropy)
        for coefficient in self.coefficients:
            value = value * entropy + coefficient
        return round(float(entropy[value.argmax()]), 3) if value.max() > 1 else None

    @property
    def first(self) -> tuple[float, ...]:
        """The coefficients that nothing has trained."""
        return self.coefficients if self.start == "paper" else (*(0.0 for _ in self.coefficients[1:]), 1.0)

    @property
    def needs_bos(self) -> bool:
        return self.spare_bos

    @property
    def has_parameters(self) -> bool:
        return bool(self.trainable)

    def stage(self, site: Site) -> Stage:
        return TemperatureStage(self, site.heads)

    def shared_stage(self) -> Stage | None:
        return SharedParameter(self.kind, "offsets", 1, len(self.coefficients)) if self.trainable == "shared" else None


class TemperatureStage(Stage):
    """Asks for a temperature on the rows of one layer."""

    published: Tensor
    unit: Tensor

    def __init__(self, mod: AdaptiveTemperature, heads: int) -> None:
        super().__init__()
        self.mod = mod
        self.hold_from = (mod.peak() if mod.start == "paper" else PEAK) if mod.beyond == "hold" else None
        count = len(mod.coefficients)
        self.register_buffer("published", torch.zeros(1, count), persistent=False)
        self.register_buffer("unit", torch.zeros(1, count), persistent=False)
        if mod.trainable in ("layer", "head"):
            self.offsets = nn.Parameter(torch.zeros(heads if mod.trainable == "head" else 1, count))
        self.fill_constants()

    def fill_constants(self) -> None:
        super().fill_constants()
        if self.published.is_meta:
            return
        count, device = len(self.mod.coefficients), self.published.device
        self.published = torch.tensor([self.mod.first], dtype=torch.float64, device=device)
        powers = torch.arange(count - 1, -1, -1, dtype=torch.float64, device=device)
        self.unit = (PEAK**-powers).unsqueeze(0)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self.fill_constants()
        return self

    def forward(self, rows: Rows, call: Call) -> Rows:
        if self.mod.spare_bos:
            rows = with_bos_column(rows, call)
        return rows.plus(self.rule(call))

    def rule(self, call: Call) -> EntropyScale:
        if self.mod.trainable == "shared":
            offsets = call.shared[self.mod.kind]
        else:
            offsets = getattr(self, "offsets", None)
        coefficients = self.published
        if offsets is not None:
            coefficients = coefficients + offsets * self.unit
        return EntropyScale(
            coefficients,
            self.strength,
            self.hold_from,
            spares_column=self.mod.spare_bos,
            cornered=self.mod.start == "paper",
        )

    def learned(self) -> str | None:
        if not hasattr(self, "offsets"):
            return None
        entropy = torch.arange(1.0, 7.0, device=self.offsets.device).expand(1, len(self.offsets), -1)
        with torch.no_grad():
            beta = self.rule(Call())._replace(strength=torch.ones_like(self.strength)).beta(entropy).mean((0, 1))
        return "β at H = 1 … 6: " + ", ".join(f"{value:.3f}" for value in beta.tolist())

    def naive(self, row: PlainRow, call: Call) -> None:
        self.rule(call).naive(row)
