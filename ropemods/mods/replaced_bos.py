"""ReplacedBos: another vector stands at the input where the BOS embedding stood (after arXiv 2606.06160).

Position 0 attends only to itself, so its whole trajectory is a closed system driven by the embedding of the token
there; heads that use it as a sink read that trajectory.

    e ← (1 − strength) · e_bos + strength · e_new

`by="zero"`: in bias-free models (RMSNorm, gated MLP, no q/k/v biases) zero is a fixed point of every layer, so the BOS
has k = v = 0 and logit 0 throughout: each head is exactly softmax-off-by-one, e^s / (1 + Σ e^s). Biases break this.
`by="mean"`: the mean embedding. `by="noise"`: a fixed random vector with the norm of the BOS embedding.
`by="random_token"`: in training, the embedding of a token drawn anew for every sequence, so that no one fingerprint can
be relied on; in evaluation the model's own BOS embedding stands there.

What zero trains: where it is a fixed point, the BOS stays zero whatever the weights are, so the derivative of its
trajectory by every weight is exactly zero, and it is given none (`ropemods.model.zero_states`). Backpropagation alone
would find that zero as 0 · ∞, since a normalisation at zero has the Jacobian 1/√ε once a layer. With biases the
trajectory leaves zero, and its gradient is that of any other token.

A norm right behind the embedding undoes a change of scale. So by="zero" changes little on the way in a model with
RMSNorm, and almost all of it at the last step, from any strength below 1 to 1; the other vectors turn by degrees.

Strength 0 is the stock model. Nothing trains (the mean and noise vectors are fixed when the modification is applied).
It costs nothing, and decoding is not touched: only the BOS token's input changes. All but `random_token` fold into
the embedding row on export. What a row of the table can say is what is done: a BOS token inside a sequence is replaced
too, which matters where the token that begins sequences also ends them; `apply` warns of such a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ropemods.mods.base import Mod, Stage, Table
from ropemods.mods.zero_gradient import without_gradient

NOISE_SEED = 0


@dataclasses.dataclass(frozen=True)
class ReplacedBos(Mod):
    """Replace the input embedding of the BOS token."""

    kind: ClassVar[str] = "replaced_bos"
    always_shown: ClassVar[tuple[str, ...]] = ("by",)

    by: Literal["zero", "mean", "noise", "random_token"] = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            raise ValueError("replaced_bos: it acts at the input, before every layer, so it takes no layers=")

    @classmethod
    def worth_trying(cls) -> tuple[Mod, ...]:
        return cls(by="mean"), cls(by="zero")

    @property
    def needs_bos(self) -> bool:
        return True

    @property
    def zeroes_states(self) -> bool:
        return self.by == "zero"

    def conflict(self, others: Sequence[Mod], layer_count: int) -> str | None:
        closing = [other for other in others if other.closes_bos]
        if set().union(*(other.acts_on(layer_count) for other in closing)) != set(range(layer_count)):
            return None
        closer = type(closing[0]).__name__
        other_form = f"use {closer}(read_bos=True), " if hasattr(closing[0], "read_bos") else ""
        return (
            f"ReplacedBos changes what later tokens read at BOS and {closer} closes that column to them in every "
            f"layer, so the first would reach no later token; {other_form}leave a layer open with layers=, or leave "
            "ReplacedBos out"
        )

    def export_obstacle(self) -> str | None:
        if self.by == "random_token":
            return "it acts in training only; set its strength to 0 to export the model as it is evaluated"
        return None

    def embedding_stage(self, bos_token_id: int | None) -> Stage:
        assert bos_token_id is not None
        return ReplacedBosStage(self, bos_token_id)


class ReplacedBosStage(Stage):
    """Acts on the output of the input embedding wherever its input is the BOS token."""

    vector: Tensor

    def __init__(self, mod: ReplacedBos, bos_token_id: int) -> None:
        super().__init__()
        self.mod, self.bos_token_id = mod, bos_token_id

    @torch.no_grad()
    def measure(self, embedding: nn.Module) -> None:
        weight = embedding.weight
        assert isinstance(weight, Tensor)
        if self.mod.by == "mean":
            # In pieces: the whole table embedded at once would double the model's largest tensor.
            ids = torch.arange(weight.shape[0], device=weight.device)
            total = torch.stack([embedding.forward(part).double().sum(0) for part in ids.split(4096)]).sum(0)
            self.vector.copy_((total / weight.shape[0]).to(weight.dtype))
        elif self.mod.by == "noise":
            bos = embedding.forward(torch.tensor([self.bos_token_id], device=weight.device))[0].double()
            noise = torch.randn(bos.shape, generator=torch.Generator().manual_seed(NOISE_SEED), dtype=torch.float64)
            self.vector.copy_(noise.to(bos.device) * (bos.norm() / noise.norm()))

    def allocate(self, embedding: nn.Module) -> None:
        weight = embedding.weight
        assert isinstance(weight, Tensor)
        if self.mod.by in ("mean", "noise"):
            self.register_buffer("vector", torch.empty_like(weight[0]), persistent=True)

    def forward(self, embedded_BTE: Tensor, ids_BT: Tensor, table: Table) -> Tensor:
        is_bos = (ids_BT == self.bos_token_id).unsqueeze(-1)
        if self.mod.by == "random_token":
            if not self.training:
                return embedded_BTE
            new = table.embed(torch.randint(table.tokens, ids_BT.shape, device=ids_BT.device))
        elif self.mod.by == "zero":
            new = torch.zeros_like(embedded_BTE)
        else:
            new = self.vector.to(embedded_BTE.dtype).expand_as(embedded_BTE)
        alpha = self.strength.to(embedded_BTE.dtype)
        replaced = torch.where(is_bos, (1 - alpha) * embedded_BTE + alpha * new, embedded_BTE)
        return without_gradient(replaced) if self.mod.zeroes_states else replaced
