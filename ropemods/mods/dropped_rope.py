"""DroppedRoPE: some layers do without rotation.

Layers without positions between layers with them (NoPE layers) read what is far away as well as what is near, and need
no extrapolation; models that have them leave every fourth layer unturned (`every=4`, which is layers 3, 7, 11, …).
With a strength schedule over the training this is DroPE's conversion of a RoPE model (arXiv 2512.12167), for
`layers=None` in all of its layers.

    frequencies of the chosen layers ← (1 − strength) · frequencies

Strength 0 is RoPE. Nothing trains. What a model's scaling multiplies every table by (YaRN, longrope) stays, as in
`truncated_rope`. Cost: none for all layers; for some, one more table.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from torch import Tensor

from ropemods.mods.base import Mod


@dataclasses.dataclass(frozen=True)
class DroppedRoPE(Mod):
    """No rotation in the chosen layers."""

    kind: ClassVar[str] = "dropped_rope"
    always_shown: ClassVar[tuple[str, ...]] = ("layers", "every")

    every: int | None = None
    """Each layer whose number, counted from 1, is a multiple of it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every is not None and (self.layers is not None or self.every < 1):
            raise ValueError(
                f"dropped_rope: every={self.every}, layers={self.layers}: give a number from 1 as every, or the "
                "layers, or neither for all of them"
            )

    @classmethod
    def worth_trying(cls) -> tuple[Mod, ...]:
        return (cls(every=4),)

    @property
    def for_some_layers(self) -> bool:
        return super().for_some_layers or self.every not in (None, 1)

    def selects(self, layer: int, layer_count: int) -> bool:
        return super().selects(layer, layer_count) and (layer + 1) % (self.every or 1) == 0

    def stock_entries(self, config: Any, layer_count: int) -> dict[str, Any]:
        rotated = getattr(config, "no_rope_layers", None)  # despite its name, 1 where a layer rotates
        if not isinstance(rotated, list) or not self.for_some_layers:
            return {}
        chosen = self.acts_on(layer_count)
        return {"no_rope_layers": [0 if n in chosen else int(one) for n, one in enumerate(rotated)]}

    def frequencies(self, inv_freq_F: Tensor, alpha: float) -> Tensor:
        return inv_freq_F * (1 - alpha)
