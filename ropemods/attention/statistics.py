"""Which kernel reads the entropy of a row, on which machine.

- `flash`: Attn(q, k, k) on a stock kernel (`ropemods.attention.flash`), everywhere.
- `triton`: our own (`ropemods.attention.triton`), which does without the second matrix product, on CUDA from compute
  capability 8.0 on. It has been run in Triton's interpreter and compiled, but not yet run on a GPU, so it must be
  asked for.

The environment variable ROPEMODS_ROW_STATISTICS names one of them for the whole process; one that cannot run there is
an error. Either way the main pass is the stock kernel.
"""

from __future__ import annotations

import importlib.util
import os

import torch

VARIABLE = "ROPEMODS_ROW_STATISTICS"
KERNELS = ("flash", "triton")


@torch.compiler.assume_constant_result
def row_statistics_kernel(device: torch.device) -> str:
    """`flash` or `triton`."""
    asked = os.environ.get(VARIABLE, "flash")
    if asked not in KERNELS:
        raise ValueError(f"{VARIABLE} must be {' or '.join(KERNELS)}, not {asked!r}")
    if asked == "triton":
        obstacle = _obstacle(device)
        if obstacle is not None:
            raise ValueError(f"{VARIABLE} asks for triton, but {obstacle}; flash runs here")
    return asked


def _obstacle(device: torch.device) -> str | None:
    """Why our kernels cannot run there."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu" and os.environ.get(VARIABLE) == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        return None  # slow, and asked for in two places
    if device.type != "cuda":
        return f"the kernels run on CUDA and the model is on {device.type!r}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the kernels need compute capability 8.0, and this GPU has {major}.{minor}"
    return None
