"""A model in another floating-point dtype for a while.

Parameters are replaced by converted copies, and the model's own objects are put back afterwards. They are never
written to: their values, gradients and the hooks that wrappers have put on them stay as they were. While the copies
stand there the model takes as much memory again, or twice as much for half precision measured in float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype that most of the model's floating-point parameters have."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + getattr(parameter, "ds_numel", parameter.numel())
    return max(sizes, key=lambda dtype: sizes[dtype])


@contextlib.contextmanager
def in_dtype(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside, every floating-point parameter of the model is of `dtype`, and so is every half-precision buffer."""
    obstacle = _obstacle(model, dtype)
    if obstacle is not None:
        asked = str(dtype).removeprefix("torch.")
        found = str(dtype_of(model)).removeprefix("torch.")
        raise ValueError(
            f"the protocol asks for {asked}, the model is in {found}, and {obstacle}, so it cannot be converted in "
            f"place; measure with dtype='model', or load it in {asked}"
        )
    replaced: list[tuple[dict[str, Tensor | None], str, Tensor]] = []
    copies: dict[int, Tensor] = {}  # tied parameters stay one
    try:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and _differs(parameter, dtype):
                    if id(parameter) not in copies:
                        copies[id(parameter)] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
                    replaced.append((module._parameters, name, parameter))
                    module._parameters[name] = copies[id(parameter)]  # type: ignore[assignment]
            for name, buffer in module._buffers.items():
                # Tables in float32 are float32 by design, whatever the parameters are in.
                if buffer is not None and buffer.dtype in (torch.bfloat16, torch.float16) and buffer.dtype != dtype:
                    replaced.append((module._buffers, name, buffer))
                    module._buffers[name] = buffer.to(dtype)
        yield
    finally:
        for owner, name, original in replaced:
            owner[name] = original


def _differs(parameter: Tensor, dtype: torch.dtype) -> bool:
    return parameter.is_floating_point() and parameter.dtype != dtype


def _obstacle(model: nn.Module, dtype: torch.dtype) -> str | None:
    """Why the model cannot be converted; None when it can, or need not be."""
    wrong = [parameter for parameter in model.parameters() if _differs(parameter, dtype)]
    if getattr(model, "hf_quantizer", None) is not None and wrong:
        return "its weights are quantised"
    for parameter in wrong:
        if hasattr(parameter, "ds_id"):
            return "ZeRO-3 has spread its parameters over the ranks"
        if hasattr(parameter, "device_mesh"):
            return "its parameters are sharded over the ranks"
        if parameter.is_meta:
            return "parts of it are offloaded"
    return None
