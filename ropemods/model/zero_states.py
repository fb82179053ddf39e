"""Positions whose hidden state is exactly zero, and the gradient that they have: none.

Where nothing in a model has a bias, a position whose input is zero stays zero through every layer, whatever the weights
are. So the derivative of its whole trajectory by every weight is zero. Backpropagation finds that zero as a product:
the normalisation of a zero vector has the Jacobian 1/√ε (300 or more), once a layer, times activations that are zero.
After some ten layers the first factor overflows, and the product is not zero but NaN.

So the gradient is cut where it would start to grow, at the input of the layers and at the output of each. What is cut
is exact zeros alone, and values pass unchanged. With biases a position leaves zero in the first layer and has the
gradient of any other; where biases stand but are still zero themselves, the cut leaves out the part of their gradient
that goes by way of the hidden state of such a position, which is the part that has no finite value.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ropemods.model.anatomy import anatomy_of
from ropemods.mods.zero_gradient import without_gradient


def install(model: PreTrainedModel) -> list:
    """Hook every layer of the stacks that attention stands in; returns what removes the hooks."""
    layers = _stacked(model)
    for layer in layers:
        layer.ropemods_owner = [model]  # in a list, so that the model does not become its own descendant
    return [layer.register_forward_hook(_cut) for layer in layers]


def _cut(layer: nn.Module, args: tuple, output: Any) -> Any:
    if not layer.ropemods_owner[0].ropemods_attached.zeros_active:
        return None
    if isinstance(output, Tensor):
        return without_gradient(output)
    return (without_gradient(output[0]), *output[1:])


def _stacked(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of every module list that holds attention, those without attention too."""
    stacks: dict[int, nn.ModuleList] = {}
    for name in anatomy_of(model).names:
        parts = name.split(".")
        for end in range(len(parts), 0, -1):
            module = model.get_submodule(".".join(parts[:end]))
            if isinstance(module, nn.ModuleList):
                stacks[id(module)] = module
                break
    return [layer for stack in stacks.values() for layer in stack]
