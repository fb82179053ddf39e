"""One softmax row written out, in fp64: what a term or a modification does to it, naively.

The oracle of the whole library. A row is given its keys, takes in what each term adds, in any order, and then computes
its output by the formula of `rows`, one number at a time where that is clearest. Nothing here is fast, and nothing is
shared with the fast paths; what they compute is right when it equals this.

Shapes: N keys that the row sees, D head dim, F rotary frequencies.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass
class PlainRow:
    """A query with the keys it sees. Terms fill in what is below `scale`."""

    at: tuple[int, int, int]
    """Which sequence of the batch, query head and query it is."""
    query_D: Tensor
    keys_ND: Tensor
    values_ND: Tensor
    columns: list[int]
    """Of the keys, among all keys of the call."""
    offsets_N: Tensor
    """How far each key stands before the last, which is the query's own."""
    bos: int | None = None
    """Which of the keys is the query's BOS; None where it sees none."""
    is_bos: bool = False
    """Whether the query is itself the BOS."""
    scale: float = 1.0
    softcap: float | None = None

    bos_logit: Tensor | None = None
    """Instead of the natural one."""
    bos_log_weight: Tensor | float = 0.0
    added_N: Tensor | None = None
    """To the logits, out of reach of any factor on them: what a mask adds, biases of keys and offsets."""
    factors_N: Tensor | None = None
    """On the logits, by offset."""
    scales: list[tuple[Tensor, Tensor | float]] = dataclasses.field(default_factory=list)
    """Factors on all logits, each with the factor on that of BOS."""
    rule: tuple[Callable[[Tensor], Tensor], bool] | None = None
    """From the entropy to one more factor, and whether it spares BOS."""
    slots: list[tuple[Tensor, Tensor | None]] = dataclasses.field(default_factory=list)
    """Logits that join the denominator, with the values they bring."""
    after: list[Callable[[Tensor], Tensor]] = dataclasses.field(default_factory=list)
    """What is done to the output."""

    def close_bos(self, share: float) -> None:
        """Take that share of the BOS column's weight away."""
        self.bos_log_weight = self.bos_log_weight + torch.log1p(torch.tensor(-share, dtype=torch.float64))

    def capped(self, logits: Tensor) -> Tensor:
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def add(self, values_N: Tensor) -> None:
        self.added_N = values_N if self.added_N is None else self.added_N + values_N

    def out(self) -> Tensor:
        """Σ w e^ℓ v over keys and slots, by Σ w e^ℓ. A row without any gives zeros."""
        logits = self.capped(self.scale * (self.keys_ND * self.query_D).sum(-1))
        count = len(logits)
        is_bos = torch.arange(count) == (-1 if self.bos is None else self.bos)
        if self.bos_logit is not None:
            logits = torch.where(is_bos, self.bos_logit, logits)
        weight = torch.where(is_bos, torch.as_tensor(self.bos_log_weight, dtype=logits.dtype).exp(), 1.0)
        if self.factors_N is not None:
            logits = logits * self.factors_N
        for factor, of_bos in self.scales:
            logits = logits * torch.where(is_bos, torch.as_tensor(of_bos, dtype=logits.dtype), factor)
        added = torch.zeros_like(logits) if self.added_N is None else self.added_N
        if self.rule is not None:
            beta, spares = self.rule
            counted = (weight > 0) & ~(is_bos & spares)
            if bool(counted.any()):
                factor = beta(entropy((logits + added)[counted] + weight[counted].log()))
                logits = torch.where(is_bos & spares, logits, logits * factor)
        numerators = weight * torch.exp(logits + added)
        denominator, mixed = numerators.sum(), (numerators[:, None] * self.values_ND).sum(0)
        for logit, value in self.slots:
            denominator = denominator + torch.exp(logit)
            mixed = mixed if value is None else mixed + torch.exp(logit) * value
        out = mixed if denominator == 0 else mixed / denominator
        for change in self.after:
            out = change(out)
        return out


def entropy(logits_N: Tensor) -> Tensor:
    """−Σ p log p of the softmax, in nats."""
    log_p = torch.log_softmax(logits_N, 0)
    return -(log_p.exp() * log_p).sum()


def rotate(x_D: Tensor, angle_F: Tensor, layout: Any = None) -> Tensor:
    """Turn each rotary pair of one vector by its angle, counterclockwise; the other channels stay.

    `layout` (interleaved, start) says which channels are pairs; None: (f, f + F) from the first channel on.
    """
    interleaved, start = (False, 0) if layout is None else layout
    out, frequencies = x_D.clone(), len(angle_F)
    for f in range(frequencies):
        first = start + (2 * f if interleaved else f)
        second = start + (2 * f + 1 if interleaved else f + frequencies)
        cos, sin = math.cos(angle_F[f]), math.sin(angle_F[f])
        out[first] = x_D[first] * cos - x_D[second] * sin
        out[second] = x_D[second] * cos + x_D[first] * sin
    return out
