"""Ranks that start in no time: forked from a process that has imported what they need, and nothing else.

Importing torch, transformers, peft and datasets takes each process some ten seconds. multiprocessing's fork server does
it once, and each rank is a fresh fork of it: it has the imports, and nothing that a test or another rank did. A rank
finds the environment that torchrun gives. That launchers start it is for the tests of launchers.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

ROOT = Path(__file__).resolve().parents[1]


def free_port() -> int:
    """A port of its own for each launch, so that runs of one machine do not meet."""
    with socket.socket() as observing:
        observing.bind(("127.0.0.1", 0))
        return int(observing.getsockname()[1])


def run(task: Callable[..., None], *args: Any, ranks: int) -> str:
    """Call a module's function on each of these ranks, and return what they said; an error if one of them failed."""
    multiprocessing.set_forkserver_preload(["tests.forked_imports"])
    meeting = None if ranks == 1 else free_port()
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder, "said.txt")
        said.touch()
        try:
            mp.start_processes(
                _rank, args=(task, args, ranks, meeting, str(said)), nprocs=ranks, start_method="forkserver"
            )
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            raise AssertionError(f"{error}\n{said.read_text()[-6000:]}") from None
        return said.read_text()


def script(words: list[str], *, ranks: int) -> str:
    """Run a script's file as a program, in place of `python FILE …` or `torchrun FILE …`."""
    return run(_program, words, ranks=ranks)


def _program(words: list[str]) -> None:
    sys.argv = words
    sys.path[0] = str(Path(words[0]).parent)
    with contextlib.suppress(AttributeError):
        del sys.modules["__mp_main__"]
    runpy.run_path(words[0], run_name="__main__")


def _rank(rank: int, task: Callable[..., None], args: tuple[Any, ...], ranks: int, port: int | None, said: str) -> None:
    os.chdir(ROOT)
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    if port is not None:
        here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        size = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        os.environ |= here | size
    output = os.open(said, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    task(*args)
    sys.stdout.flush()
    sys.stderr.flush()
