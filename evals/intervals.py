"""Means over seeds with 95% intervals by Student's t: right for few seeds, where a bootstrap would be too narrow."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any


def over_seeds(values: Sequence[float], *, probability: float = 0.975) -> dict[str, Any]:
    """The mean with its interval, and the values themselves. Give differences, seed by seed, where seeds are paired.

    `probability` is that of the upper end: nearer to 1 where many intervals are to hold together.
    """
    if len(values) < 2:
        raise ValueError(f"an interval over seeds needs two or more, not {len(values)}")
    mean = statistics.fmean(values)
    half = t_quantile(len(values) - 1, probability) * statistics.stdev(values) / math.sqrt(len(values))
    return {"value": mean, "low": mean - half, "high": mean + half, "seeds": list(values)}


def t_quantile(degrees: int, probability: float = 0.975) -> float:
    """Student's t: the point below which `probability` lies, by bisection of the integrated density."""
    low, high = 0.0, 100.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if 0.5 + _mass(middle, degrees) < probability else (low, middle)
    return low


def _mass(end: float, degrees: int, pieces: int = 2000) -> float:
    """∫ of the density from 0 to `end`: Simpson's rule in the angle θ, t = √ν tan θ, where it is cos^(ν−1) θ."""
    log_constant = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - 0.5 * math.log(math.pi)
    top = math.atan(end / math.sqrt(degrees))
    step = top / pieces
    weights = (1 if n in (0, pieces) else 4 if n % 2 else 2 for n in range(pieces + 1))
    total = sum(w * math.cos(n * step) ** (degrees - 1) for n, w in enumerate(weights))
    return math.exp(log_constant) * total * step / 3


def shown(estimate: dict[str, Any], form: str = "{:.1f}", *, times: float = 1.0) -> str:
    """`12.3 [11.9, 12.7]`."""
    value, low, high = (form.format(times * estimate[key]).replace("-", "−") for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def ends(estimate: dict[str, Any], form: str = "{:.1f}", *, times: float = 1.0) -> str:
    """`[11.9, 12.7]`."""
    low, high = (form.format(times * estimate[key]).replace("-", "−") for key in ("low", "high"))
    return f"[{low}, {high}]"
