"""Where in a model NaN or infinity first appears."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def first_non_finite(model: nn.Module, run: Callable[[], object]) -> str | None:
    """The first module whose output is not finite while `run` runs the model, in words; None where all is finite.

    Hooks of children fire before those of their parents, so the first one that sees it is the innermost.
    """
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            if not found and not _finite(output):
                found.append(_said(name, module, given=_finite((inputs, keywords))))

        return look

    handles = [
        module.register_forward_hook(watch(name), with_kwargs=True) for name, module in model.named_modules() if name
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _said(name: str, module: nn.Module, *, given: bool) -> str:
    kind = type(module).__name__
    for parameter_name, parameter in module.named_parameters(recurse=False):
        held = parameter.numel() and parameter.device.type != "meta" and int((~parameter.isfinite()).sum())
        if held:
            return f"{name} ({kind}), whose {parameter_name} holds {held} such values of {parameter.numel()}"
    return f"{name} ({kind})" if given else f"what is handed to {name} ({kind})"


def _finite(value: Any) -> bool:
    return all(bool(x.isfinite().all()) for x in _tensors(value))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.device.type != "meta":
            yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
