"""Parameters that are elsewhere: spread over ranks by DeepSpeed ZeRO-3, or offloaded to memory or disk by accelerate.

Between forward passes an offloaded parameter has no memory of its own (it is on the meta device), and the hook that
accelerate has put on its module knows where it computes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def gathered(*modules: nn.Module) -> Iterator[None]:
    """Inside, every rank holds the whole parameters of `modules`; what it wrote to those spread over ranks is kept."""
    spread = [p for module in modules for p in module.parameters() if hasattr(p, "ds_id")]
    if not spread:
        with contextlib.ExitStack() as stack:
            for part in (part for module in modules for part in module.modules() if _offloads(part)):
                from accelerate.utils import align_module_device

                stack.enter_context(align_module_device(part))
            yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(spread, modifier_rank=0):
        yield


@contextlib.contextmanager
def gathered_in_turn(model: nn.Module) -> Iterator[None]:
    """Inside, every module of a partitioned model has its own parameters whole while its forward runs, for reading."""
    if not any(hasattr(p, "ds_id") for p in model.parameters()):
        yield
        return
    import deepspeed

    opened: list[tuple[nn.Module, contextlib.ExitStack]] = []

    def enter(module: nn.Module, args: tuple) -> None:
        own = [p for p in module.parameters(recurse=False) if hasattr(p, "ds_id")]
        if own:
            stack = contextlib.ExitStack()
            stack.enter_context(deepspeed.zero.GatheredParameters(own))
            opened.append((module, stack))

    def leave(module: nn.Module, args: tuple, output: object) -> None:
        while opened and any(module is each for each, _ in opened):
            last, stack = opened.pop()
            stack.close()
            if last is module:
                return

    handles = [m.register_forward_pre_hook(enter) for m in model.modules()]
    handles += [m.register_forward_hook(leave) for m in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for _, stack in reversed(opened):
            stack.close()


def _hooks(module: nn.Module) -> list[Any]:
    """What accelerate has put on one module."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else [hook, *getattr(hook, "hooks", ())]


def _offloads(module: nn.Module) -> bool:
    return any(getattr(hook, "offload", False) for hook in _hooks(module))


def keep_here(module: nn.Module) -> None:
    """Take accelerate's hooks off a small module, whose values then stay where it computes.

    They move every argument of the module to its device, and one that is a module with offloaded weights cannot move.
    """
    if any(_hooks(part) for part in module.modules()):
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(module, recurse=True)


def home(module: nn.Module) -> torch.device | None:
    """The device that a module computes on; None where it has no parameters."""
    for part in module.modules():
        for hook in _hooks(part):
            if getattr(hook, "execution_device", None) is not None:
                return torch.device(hook.execution_device)
    tensor = next(module.parameters(), None)
    return None if tensor is None else tensor.device


def without_memory(model: nn.Module) -> list[str]:
    """The parameters that have no values anywhere: of a model that was made on the meta device and not loaded."""
    return [
        f"{name}.{own}" if name else own
        for name, module in model.named_modules()
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.is_meta and not _hooks(module)
    ]


@contextlib.contextmanager
def without_memory_for_parameters() -> Iterator[None]:
    """Put every parameter on the meta device as soon as a module owns it; buffers are left as they are made."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: Tensor | None) -> None:
        register(module, name, None if param is None else nn.Parameter(param.to("meta"), param.requires_grad))

    nn.Module.register_parameter = on_meta  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
