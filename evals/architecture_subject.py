"""A model under check: fresh copies of it, modified or not, and what two of them have in common.

A check takes a `Subject` and returns nothing when what it checks holds, or a sentence that qualifies it. It fails with
a sentence when it does not hold. `Lacking` says that the stock model has no such property, which is then nothing that
a modification could break.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

import ropemods as rm
from evals import tiny_configs, tiny_models
from ropemods.attention import capabilities
from ropemods.mods import MODS, Mod
from ropemods.mods.probe import rows_with

ROUNDING = 5e-4
"""Of fp32 logits of a few layers, relative to the largest; a lost modification is off by several per cent."""


def example(kind: type[Mod]) -> Mod:
    """One of a kind, on every layer: the defaults, or the first setting that is worth trying."""
    try:
        return kind()
    except (TypeError, ValueError):
        return kind.worth_trying()[0]


def runs_fused(mod: Mod) -> bool:
    rows = rows_with([mod], head_dim=8, dtype=torch.float32)
    return capabilities.limit("flash", rows, "cpu") is None


class Lacking(Exception):
    """The stock model itself does not have the property."""


class Refused(Exception):
    """`apply` declined, with a reason."""


class Subject:
    """One tiny architecture: `subject()` is a copy of its stock model."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config
        self.model = tiny_models.from_config(config)
        self.taken: list[Mod] | None = None

    def __call__(self) -> PreTrainedModel:
        return copy.deepcopy(self.model)

    def wide(self) -> Subject:
        """The same with no window shorter than a sequence."""
        return Subject(tiny_configs.wide(self.config))

    def written_out(self) -> Subject:
        """The same on the eager path."""
        config = copy.deepcopy(self.config)
        config._attn_implementation = "eager"
        return Subject(config)

    def together(self) -> list[Mod]:
        """As many as the model takes at once, from the first on; what it refuses has a check, and a reason."""
        if self.taken is None:
            self.taken = []
            for kind in MODS:  # as one would try them: without any rotation there is little for the others to do
                mod = (*kind.worth_trying(), example(kind))[0]
                if self.takes(*self.taken, mod):
                    self.taken.append(mod)
        if not self.taken:
            self.modified([example(MODS[0])])  # for its refusal
        return self.taken

    def takes(self, *mods: Mod) -> bool:
        try:
            rm.apply(self(), *mods)
        except ValueError:
            return False
        return True

    def modified(self, mods: list[Mod], strength: float = 1.0) -> PreTrainedModel:
        """A copy with modifications, whose own parameters are moved off their initial values."""
        model = self()
        try:
            rm.apply(model, *mods, strength=strength)
        except ValueError as refusal:
            raise Refused(str(refusal)) from refusal
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "ropemods" in name:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        return model


Check = Callable[[Subject], str | None]


def run(model: PreTrainedModel, ids: Tensor, **inputs) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **inputs).logits


def distance(found: Tensor, wanted: Tensor) -> float:
    return (found.double() - wanted.double()).abs().max().item() / max(1.0, wanted.abs().max().item())


def near(found: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    error = distance(found, wanted)
    assert error <= tolerance, f"{what}: off by {error:.1e} of the largest value"


def acts(found: Tensor, stock: Tensor, what: str) -> None:
    change = distance(found, stock)
    assert change > 1e-4, f"{what} changed the logits by {change:.1e} of the largest only"
