"""Which kernels compute the rows of the sdpa path, on which machine: the one place where that is decided.

- `flash`: stock kernels throughout, the entropy from a call with the keys in the values' place (`flash`, `cpu_column`).
- `triton`: our fused kernels (`triton.path`), which do a whole call at once, forward and backward.
- `triton-rows`: our row statistics for the entropy (`triton.entropy`), stock kernels for everything else.
- `flex`: torch's FlexAttention (`flex`), compiled on first use; not on a CPU.

The environment variable ROPEMODS_KERNEL names one for the whole process, or a file of what was measured to be best on
this card (`measured_paths`); a path that cannot run there is an error that names those that can. Without it `flash`
runs, on every machine: on the one card where paths were timed side by side it was the fastest (evals/bench.md), so that
no machine gets another unasked. (`attn_implementation="eager"` is no path of this
kind: it is asked for where the model is loaded, and writes the scores out.)
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator

import torch

VARIABLE = "ROPEMODS_KERNEL"
PATHS = ("flash", "triton", "triton-rows", "flex")
DEFAULT = "flash"
MEASURED = "measured"
"""For every call the path that a file has for it."""


def asked() -> str:
    return os.environ.get(VARIABLE, DEFAULT)


@torch.compiler.assume_constant_result
def chosen(device: torch.device) -> str:
    """One of PATHS, or MEASURED."""
    named = asked()
    if named.endswith(".json"):
        return MEASURED if device.type == "cuda" else DEFAULT
    if named not in PATHS:
        raise ValueError(
            f"{VARIABLE} must be one of {', '.join(PATHS)}, or a .json file of measured choices, not {named!r}"
        )
    reason = obstacle(named, device)
    if reason is not None:
        able = [path for path in PATHS if obstacle(path, device) is None]
        raise ValueError(f"{VARIABLE} asks for {named}, but {reason}; {' and '.join(able)} can run there")
    return named


def obstacle(path: str, device: torch.device) -> str | None:
    """Why a path cannot run on a device; None when it can."""
    if path == "flash":
        return None  # what its kernels cannot take depends on the call, and `capabilities` says it
    if path == "flex":
        if device.type == "cpu":
            return "torch compiles FlexAttention for CPUs without the log-sum-exp"
        return None if device.type in ("cuda", "xpu") else f"FlexAttention does not run on device {device.type!r}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu" and os.environ.get(VARIABLE) == path and os.environ.get("TRITON_INTERPRET") == "1":
        return None  # slow, and asked for in two places
    if device.type != "cuda":
        return f"our kernels run on CUDA and the model is on {device.type!r}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"our kernels need compute capability 8.0, and this GPU has {major}.{minor}"
    return None


@contextlib.contextmanager
def using(path: str) -> Iterator[None]:
    """While open, `path` is what ROPEMODS_KERNEL asks for."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = path
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before
