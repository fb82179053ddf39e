"""Starting a launcher in a test: this Python, this checkout, a CPU, and quiet libraries."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FINETUNE = [sys.executable, str(ROOT / "recipes" / "finetune.py")]


def environment() -> dict[str, str]:
    # What an outer launcher or an earlier test left must not be taken for this launcher's.
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "MASTER_")) and k not in LAUNCHED}
    quiet = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    return {**kept, **quiet, "PYTHONPATH": str(ROOT)}


LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "CUDA_VISIBLE_DEVICES")


def start(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words, cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def run(words: list[str], *, fails: bool = False) -> str:
    """What the command printed; an error with that text if it did not end as expected."""
    done = subprocess.run(
        words, cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=400
    )
    assert (done.returncode != 0) == fails, done.stdout[-6000:]
    return done.stdout


def free_port() -> int:
    """A port of its own for each launch, so that runs of one machine do not meet."""
    with socket.socket() as observing:
        observing.bind(("127.0.0.1", 0))
        return int(observing.getsockname()[1])


def torchrun(processes: int) -> list[str]:
    meeting = ["--master_port", str(free_port())]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), *meeting]
