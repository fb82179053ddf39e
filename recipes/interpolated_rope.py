"""A modification of your own, whole: position interpolation (arXiv 2306.15595), for reading further than was trained.

    g_k ← g_k / factor at strength 1: position factor · n is turned as position n was. Strength 0 is the model.

Nothing of ropemods knows this file. By its place it is used like ours, on the command line and in recipes:

    ropemods apply MODEL OUT --mods recipes.interpolated_rope:InterpolatedRoPE:factor=4
    ropemods measure OUT --register recipes.interpolated_rope:InterpolatedRoPE --text FILE
    python recipes/finetune.py --config recipes/smoke.yaml --mods recipes.interpolated_rope:InterpolatedRoPE

In Python `rm.from_pretrained(OUT)` reads it once this file is imported.
"""

import dataclasses
from typing import ClassVar

from torch import Tensor

import ropemods as rm


@rm.register
@dataclasses.dataclass(frozen=True)
class InterpolatedRoPE(rm.Mod):
    """Every rotary frequency is lower by `factor`."""

    kind: ClassVar[str] = "interpolated_rope"

    factor: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor <= 1:
            raise ValueError(f"interpolated_rope: factor must be above 1 (the model itself), not {self.factor}")

    def frequencies(self, inv_freq_F: Tensor, alpha: float) -> Tensor:
        return inv_freq_F / (1 + alpha * (self.factor - 1))
