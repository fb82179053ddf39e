"""Parameters that DeepSpeed ZeRO-3 has spread over ranks, made whole while they are read or written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def gathered(*modules: nn.Module) -> Iterator[None]:
    """Inside, every rank holds the whole parameters of `modules`; what it wrote to them is kept."""
    spread = [p for module in modules for p in module.parameters() if hasattr(p, "ds_id")]
    if not spread:
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
