"""OutputGate: each head may keep its output to itself (gated attention, arXiv 2505.06708).

    out ← 2 σ(x W + b) · out          x the layer's input, one gate for each head, or for each channel of each head

A head with nothing to say needs no sink to park on: it can close its gate. The paper's gate is σ; doubled, W = 0 and
b = 0 are the model, with a gradient, and a gate may open as far as it may close.

Strength: out ← (1 + strength · (2 σ − 1)) · out. Attention weights stay what they are. Cost: one product of the layer's
input with W, hidden × heads numbers a layer, or hidden × heads × head dim where each channel has a gate.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ropemods.attention.plain_row import PlainRow
from ropemods.attention.rows import wide
from ropemods.mods.base import Call, Mod, Site, Stage


@dataclasses.dataclass(frozen=True)
class OutputGate(Mod):
    """Multiply the heads' output by a gate that reads the layer's input."""

    kind: ClassVar[str] = "output_gate"
    always_shown: ClassVar[tuple[str, ...]] = ("per",)

    per: Literal["head", "channel"] = "head"

    @classmethod
    def worth_trying(cls) -> tuple[Mod, ...]:
        return ()  # it starts at the model, so there is nothing to see before it has trained

    @property
    def has_parameters(self) -> bool:
        return True

    @property
    def needs_hidden(self) -> bool:
        return True

    def stage(self, site: Site) -> Stage:
        return OutputGateStage(self, site)


class OutputGateStage(Stage):
    place = "output"

    def __init__(self, mod: OutputGate, site: Site) -> None:
        super().__init__()
        self.shape = site.heads, site.head_dim if mod.per == "channel" else 1
        gates = self.shape[0] * self.shape[1]
        self.weight = nn.Parameter(torch.zeros(gates, site.hidden))
        self.bias = nn.Parameter(torch.zeros(gates))

    def forward(self, out_BHTD: Tensor, call: Call) -> Tensor:
        assert call.hidden_BTC is not None
        gate_BTHD = self.gate(call.hidden_BTC.to(out_BHTD.dtype)).unflatten(-1, self.shape)
        return (out_BHTD * gate_BTHD.transpose(1, 2)).to(out_BHTD.dtype)

    def naive(self, row: PlainRow, call: Call) -> None:
        assert call.hidden_BTC is not None
        batch, head, query = row.at
        gates = self.gate(call.hidden_BTC[batch, query].double()).unflatten(-1, self.shape)
        row.after.append(lambda out_D: out_D * gates[head])

    def gate(self, hidden: Tensor) -> Tensor:
        logit = nn.functional.linear(hidden, self.weight.to(hidden.dtype), self.bias.to(hidden.dtype))
        logit = logit.to(wide(logit.dtype))
        return 1 + self.strength.to(logit.dtype) * (2 * torch.sigmoid(logit) - 1)
