"""LearnedSink: the place to put unwanted attention is a parameter, not the BOS token.

    out_i = Σ_j e^{s_ij} v_j / (Σ_j e^{s_ij} + strength · e^{sink_h})

A trainable logit per head joins the denominator and carries no value. Unless `read_bos=True`, the BOS column is closed
to later queries as the sink opens: its weight is 1 − strength. The BOS itself goes on reading itself.

Closing column 0 alone leaves position 1 as the new closed trajectory: look at its mass too when you measure.

`init` is a number, or "calibrated": with a calibration batch, the logit at which the sink takes, on average, the mass
that BOS had in that head (beside BOS, where that goes on being read); without one, 0. A head that parks on BOS row by
row cannot be met by one number, so on a model with a real sink this start can cost more than 0 does: `apply` measures
it on the batch and says so. "distilled" goes on from there with a few steps that fit the logits, and nothing else, to
the model's own output on the batch (`ropemods.model.distillation`). `raised` is added to that start: a sink above what
BOS had makes every row's denominator depend less on how many keys it has. Strength 0 is the stock softmax. One number a
head trains: how far the sink has moved from its start, which is where weight decay pulls it.
Cost: one elementwise pass over the output, and eight more channels a head where the BOS column is closed.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ropemods.attention import eager
from ropemods.attention.plain_row import PlainRow
from ropemods.attention.rows import Rows, wide
from ropemods.attention.terms import Slot
from ropemods.mods.adaptive_temperature import AdaptiveTemperature
from ropemods.mods.base import Call, Mod, Site, Stage
from ropemods.mods.bos_column import bos_closed, with_bos_column


@dataclasses.dataclass(frozen=True)
class LearnedSink(Mod):
    """A trainable logit per head in the softmax denominator."""

    kind: ClassVar[str] = "learned_sink"

    init: float | Literal["calibrated", "distilled"] = "calibrated"
    read_bos: bool = False
    raised: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.raised and self.init != "calibrated":
            raise ValueError("learned_sink: raised is added to a calibrated start; with a number, give the sum as init")

    @property
    def needs_bos(self) -> bool:
        return not self.read_bos

    @property
    def has_parameters(self) -> bool:
        return True

    @property
    def calibrates(self) -> bool:
        return isinstance(self.init, str)

    @property
    def distils(self) -> bool:
        return self.init == "distilled"

    @classmethod
    def timed(cls) -> dict[str, tuple[Mod, ...]]:
        closed, temperature = cls(init=0.0), AdaptiveTemperature(spare_bos=True)
        return {
            "sink": (cls(init=0.0, read_bos=True),),
            "sink, BOS closed": (closed,),
            "temperature, sink, BOS closed": (temperature, closed),
        }

    @classmethod
    def worth_trying(cls) -> tuple[Mod, ...]:
        return cls(), cls(init=0.0)

    def gentler(self) -> tuple[Mod, ...]:
        numbers = [dataclasses.replace(self, init=0.0, raised=0.0, read_bos=read) for read in (self.read_bos, True)]
        return tuple(dict.fromkeys(mod for mod in numbers if mod != self))

    @property
    def closes_bos(self) -> bool:
        return not self.read_bos

    def stage(self, site: Site) -> Stage:
        return LearnedSinkStage(self, site.heads)


class LearnedSinkStage(Stage):
    """The sink stands at `start + logit`. The departure `logit` trains, so that weight decay pulls to the start.

    Checkpoints of 0.1 have no `start`, and the whole in `logit`.
    """

    start: Tensor
    since_version = {"start": 2}

    def __init__(self, mod: LearnedSink, heads: int) -> None:
        super().__init__()
        self.mod = mod
        start = mod.raised if isinstance(mod.init, str) else float(mod.init)
        self.register_buffer("start", torch.full((heads,), start))
        self.logit = nn.Parameter(torch.zeros(heads))

    def forward(self, rows: Rows, call: Call) -> Rows:
        strength = self.strength.to(wide(rows.q_BHTD.dtype))
        rows = rows.plus(Slot(self.sink_H(strength.dtype) + strength.log()))
        return rows if self.mod.read_bos else bos_closed(rows, call, strength)

    def naive(self, row: PlainRow, call: Call) -> None:
        row.slots.append((self.sink_H(torch.float64)[row.at[1]] + math.log(self.alpha), None))
        if not self.mod.read_bos and not row.is_bos:
            row.close_bos(self.alpha)

    def sink_H(self, dtype: torch.dtype) -> Tensor:
        """The logit of each head at strength 1."""
        return self.start.to(dtype) + self.logit.to(dtype)

    @torch.no_grad()
    def calibrate(self, rows: Rows, call: Call) -> None:
        if not self.mod.calibrates:
            return
        rows = with_bos_column(rows, call)
        assert rows.column is not None
        later = ~rows.column.is_self_BT[:, None, :]
        _, _, log_all = eager.attend(rows)
        _, _, log_rest = eager.attend(rows._replace(column=rows.column.closed()))
        seen = later & log_rest.isfinite()
        bos_mass = -torch.expm1(torch.where(seen, log_rest - log_all, 0.0))
        beside = log_all if self.mod.read_bos else log_rest
        self.start.copy_(sink_with_mass(beside, bos_mass, seen) + self.mod.raised)

    def distilled(self) -> list[nn.Parameter]:
        return [self.logit] if self.mod.distils else []

    @torch.no_grad()
    def settle(self) -> None:
        self.start += self.logit
        self.logit.zero_()


def sink_with_mass(log_beside_BHT: Tensor, mass_BHT: Tensor, seen_BHT: Tensor) -> Tensor:
    """Per head, the logit σ with mean sigmoid(σ − log Z) = mean mass, by bisection; the mean is monotone in σ.

    Z is the sum of what stays beside the sink.
    """
    seen = seen_BHT.expand_as(mass_BHT).to(mass_BHT.dtype)
    count = seen.sum((0, 2))
    wanted = (mass_BHT * seen).sum((0, 2)) / count
    log_beside = torch.where(seen_BHT, log_beside_BHT, 0.0)
    low, high = torch.full_like(wanted, -50.0), torch.full_like(wanted, 50.0)
    for _ in range(60):
        middle = (low + high) / 2
        mass = (torch.sigmoid(middle[:, None] - log_beside) * seen).sum((0, 2)) / count
        low, high = torch.where(mass < wanted, middle, low), torch.where(mass < wanted, high, middle)
    return (low + high) / 2
