"""Peak memory of one stretch of work on this rank: of the GPU where there is one, else of the process."""

from __future__ import annotations

import re
from pathlib import Path

import torch


def restart() -> None:
    """Begin a new stretch."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif (control := Path("/proc/self/clear_refs")).exists():
        control.write_text("5")  # the kernel's word for: forget the peak of resident memory


def peak_bytes() -> int | None:
    """The most that was in use since `restart`; None on systems that do not tell."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else None
