"""The deep-set retriever of `max_retrieval`: many seeds side by side, each with weights and data of its own.

A two-layer GeLU MLP on every item and one on the query, one attention call, a two-layer GeLU MLP to the classes. What
multiplies every item alike is moved to the side of the one query or the one output, which changes nothing but the cost:

    ⟨W_q a, W_k W_2 h + …⟩ = ⟨W_2ᵀ W_kᵀ W_q a, h⟩ + a term that all items share, which softmax does not see
    Σ α W_v (W_2 h + b_2)  = W_v (W_2 Σ α h + b_2)

Attention is one call of ropemods' own rows, with the seeds as key groups, so that its heads are seeds × heads.
Shapes: B sets, N seeds, H heads of one seed, S items, D width, C classes, P coefficients.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ropemods.attention import eager
from ropemods.attention.rows import Rows
from ropemods.attention.terms import EntropyScale
from ropemods.mods import AdaptiveTemperature
from ropemods.mods.adaptive_temperature import PEAK

CLASSES = 10


class Sets(NamedTuple):
    priority_BNS: Tensor
    class_BNS: Tensor
    query_BN: Tensor

    @property
    def target_BN(self) -> Tensor:
        return self.class_BNS.gather(2, self.priority_BNS.argmax(2, keepdim=True)).squeeze(2)


def draw(sets: int, seeds: int, items: int, generator: torch.Generator) -> Sets:
    shape = (sets, seeds, items)
    return Sets(
        torch.rand(shape, generator=generator),
        torch.randint(0, CLASSES, shape, generator=generator),
        torch.rand(sets, seeds, generator=generator),
    )


class Retriever(nn.Module):
    def __init__(self, *, seeds: list[int], heads: int, width: int, trained: str = "no") -> None:
        """trained: "no", or the offsets of the temperature rule, "shared" by the heads of a seed or for each "head"."""
        super().__init__()
        self.seeds, self.heads, self.width = len(seeds), heads, width
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def linear(inputs: int, outputs: int) -> nn.ParameterList:
            bound = 1 / math.sqrt(inputs)
            weight = [torch.empty(outputs, inputs).uniform_(-bound, bound, generator=g) for g in generators]
            bias = [torch.empty(outputs).uniform_(-bound, bound, generator=g) for g in generators]
            return nn.ParameterList([nn.Parameter(torch.stack(weight)), nn.Parameter(torch.stack(bias))])

        self.item_1, self.item_2 = linear(1 + CLASSES, width), linear(width, width)
        self.asker_1, self.asker_2 = linear(1, width), linear(width, width)
        self.q, self.k, self.v = (linear(width, width) for _ in range(3))
        self.decoder_1, self.decoder_2 = linear(width, width), linear(width, CLASSES)
        if trained != "no":
            count = len(AdaptiveTemperature().coefficients)
            self.offsets = nn.Parameter(torch.zeros(self.seeds, heads if trained == "head" else 1, count))

    def hidden(self, sets: Sets) -> Tensor:
        """The items after the first layer and its GeLU, (B, N, S, D)."""
        weight, bias = self.item_1
        by_class_NCD = weight[:, :, 1:].transpose(1, 2) + bias.unsqueeze(1)
        seed_N1 = torch.arange(self.seeds).unsqueeze(1)
        x_BNSD = by_class_NCD[seed_N1, sets.class_BNS] + sets.priority_BNS.unsqueeze(3) * weight[:, None, :, 0]
        return functional.gelu(x_BNSD, approximate="tanh")

    def queries(self, sets: Sets) -> Tensor:
        """The queries as the items' hidden layer is to be read by them, (B, N · H, 1, D)."""
        x_BND = functional.gelu(_each(self.asker_1, sets.query_BN.unsqueeze(2)), approximate="tanh")
        q_BNHE = _each(self.q, _each(self.asker_2, x_BND)).unflatten(2, (self.heads, -1))
        k_NHED = self.k[0].unflatten(1, (self.heads, -1))
        return torch.einsum("bnhe,nhec,ncd->bnhd", q_BNHE, k_NHED, self.item_2[0]).flatten(1, 2).unsqueeze(2)

    def temperature(self, mod: AdaptiveTemperature) -> EntropyScale:
        """The rule that a stage of ropemods would ask for, with this model's offsets where it trained some."""
        coefficients = torch.tensor(mod.coefficients)
        if hasattr(self, "offsets"):
            unit = PEAK ** -torch.arange(len(mod.coefficients) - 1, -1, -1.0)
            coefficients = coefficients + (self.offsets * unit).expand(-1, self.heads, -1).flatten(0, 1)
        else:
            coefficients = coefficients.unsqueeze(0)
        return EntropyScale(coefficients, torch.ones(()), mod.peak() if mod.beyond == "hold" else None)

    def read(self, q_BHTD: Tensor, hidden_BNSD: Tensor, mod: AdaptiveTemperature | None) -> tuple[Tensor, Tensor]:
        """Class logits (B, N, C) and the attention (B, N · H, 1, S)."""
        rule = None if mod is None else self.temperature(mod)
        scale = 1 / math.sqrt(self.width // self.heads)
        rows = Rows(q_BHTD, hidden_BNSD, hidden_BNSD, None, False, scale, entropy_scale=rule)
        read_BHTD, attention, _ = eager.attend(rows)
        read_BNHD = read_BHTD.squeeze(2).unflatten(1, (self.seeds, self.heads))
        weight, bias = self.item_2
        items_BNHD = torch.einsum("bnhd,ncd->bnhc", read_BNHD, weight) + bias.unsqueeze(1)
        v_NHED = self.v[0].unflatten(1, (self.heads, -1))
        value_BND = torch.einsum("bnhc,nhec->bnhe", items_BNHD, v_NHED).flatten(2, 3) + self.v[1]
        x_BND = functional.gelu(_each(self.decoder_1, value_BND), approximate="tanh")
        return _each(self.decoder_2, x_BND), attention

    def forward(self, sets: Sets, mod: AdaptiveTemperature | None) -> Tensor:
        return self.read(self.queries(sets), self.hidden(sets), mod)[0]


def _each(layer: nn.ParameterList, x_BNI: Tensor) -> Tensor:
    """A linear layer with weights of its own for each seed."""
    weight, bias = layer
    return torch.einsum("bni,noi->bno", x_BNI, weight) + bias
