"""Colours that colour-blind readers can tell apart, and that mean the same in every figure.

- Values: viridis, dark is little and bright is much.
- Differences: blue is less, orange is more, pale is no change.
- Arms: the two of the headline are blue and vermilion, the others grey, green, purple, ...; each
  also has its own dash and marker, so that print in grey keeps them apart. The arm colours stand in
  the style sheet, since they differ between light and dark.

A `Shade` turns a value into a colour. Its scale is a square root: leakage is nats², so equal steps
of colour are equal steps of the root in nats, and one strong head does not paint the others black.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

VIRIDIS: Final = (
    "#440154", "#48186a", "#472d7b", "#424086", "#3b528b", "#33638d", "#2c728e", "#26828e",
    "#21918c", "#1fa088", "#28ae80", "#3fbc73", "#5ec962", "#84d44b", "#addc30", "#d8e219",
    "#fde725",
)  # fmt: skip
BLUE_ORANGE: Final = (
    "#053061", "#2166ac", "#4393c3", "#92c5de", "#d1e5f0", "#f7f7f7",
    "#fee0b6", "#fdb863", "#e08214", "#b35806", "#7f3b08",
)  # fmt: skip


def mix(stops: tuple[str, ...], position: float) -> str:
    """The colour at position 0 to 1 along evenly spaced stops."""
    place = min(1.0, max(0.0, position)) * (len(stops) - 1)
    index = min(int(place), len(stops) - 2)
    rest = place - index
    pairs = zip(_channels(stops[index]), _channels(stops[index + 1]), strict=True)
    return "#" + "".join(f"{round(a + rest * (b - a)):02x}" for a, b in pairs)


def ink_on(colour: str) -> str:
    """The class of the text colour that reads better on a colour (WCAG relative luminance)."""
    linear = [((c / 255 + 0.055) / 1.055) ** 2.4 for c in _channels(colour)]
    luminance = sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return "on-light" if luminance > 0.18 else "on-dark"


def _channels(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


@dataclass(frozen=True, kw_only=True)
class Shade:
    """A colour scale from 0 to `limit`, or from -limit to limit where it shows differences."""

    limit: float
    difference: bool = False
    root: bool = True

    def position(self, value: float) -> float:
        """Where the value stands on the scale, 0 to 1. Values past an end stand at that end."""
        share = min(1.0, abs(value) / self.limit) if self.limit > 0 else 0.0
        share = math.sqrt(share) if self.root else share
        signed = math.copysign(share, value)
        return 0.5 + 0.5 * signed if self.difference else max(0.0, signed)

    def colour(self, value: float) -> str:
        """The colour of a value."""
        return mix(BLUE_ORANGE if self.difference else VIRIDIS, self.position(value))


def shared_limit(grids: Iterable[Iterable[Iterable[float]]]) -> float:
    """The largest finite size in all the grids: with one limit, equal colours are equal values."""
    sizes = (abs(v) for grid in grids for row in grid for v in row if math.isfinite(v))
    return max(sizes, default=0.0)


def depth_style(layer: int, layers: int) -> str:
    """A layer's line colours, as a style: dark to bright with depth, legible on each paper."""
    depth = layer / max(1, layers - 1)
    return f"--on-light:{mix(VIRIDIS, 0.82 * depth)};--on-dark:{mix(VIRIDIS, 0.3 + 0.7 * depth)}"
