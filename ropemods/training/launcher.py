"""The command that starts a recipe under a launcher, as a list of words and never through a shell.

    python       one process
    torchrun     processes of this machine, DDP (or DeepSpeed with --deepspeed CONFIG)
    accelerate   what its config file says: recipes/accelerate/*.yaml
    deepspeed    processes of this machine, or of those in a hostfile

The number of processes is handed to the recipe as `world_size` too, so a launcher that starts another number is found
out before anything is trained.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Literal, get_args

Launcher = Literal["python", "torchrun", "accelerate", "deepspeed"]
MODULE = "ropemods.training"


def command(
    recipe: str,
    *,
    launcher: Launcher = "python",
    num_processes: int | None = None,
    launcher_config: str | None = None,
    hostfile: str | None = None,
    port: int | None = None,
    more: Sequence[str] = (),
) -> list[str]:
    """The words of the command. `port` is where the processes meet; `more` are flags for the recipe."""
    if launcher not in get_args(Launcher):
        raise ValueError(f"launcher={launcher!r}: one of {', '.join(get_args(Launcher))}")
    if num_processes is not None and num_processes < 1:
        raise ValueError(f"num_processes={num_processes}: at least 1")
    if launcher == "python" and (num_processes or 1) > 1:
        raise ValueError(
            f"num_processes={num_processes} with launcher=python, which starts one; use torchrun, accelerate or "
            "deepspeed"
        )
    if launcher_config is not None and launcher != "accelerate":
        raise ValueError(f"launcher_config is a config of accelerate, and the launcher is {launcher}")
    if hostfile is not None and launcher != "deepspeed":
        raise ValueError(f"hostfile is read by deepspeed, and the launcher is {launcher}")
    if port is not None and launcher == "python":
        raise ValueError("port is where several processes meet, and launcher=python starts one")
    if port is not None and not 0 < port < 65536:
        raise ValueError(f"port={port}: from 1 to 65535")
    if launcher in ("torchrun", "deepspeed") and num_processes is None:
        raise ValueError(f"launcher={launcher} needs num_processes, on all machines together")
    asked = [] if num_processes is None else ["--world_size", str(num_processes)]
    start = _start(launcher, num_processes, launcher_config, hostfile, port)
    return [*start, "--config", recipe, *asked, *more]


def _start(
    launcher: Launcher, processes: int | None, config: str | None, hostfile: str | None, port: int | None
) -> list[str]:
    # Each launcher as a module of this Python, so that all processes run in this environment.
    python = [sys.executable, "-m"]
    if launcher == "python":
        return [*python, MODULE]
    if launcher == "torchrun":
        meeting = [] if port is None else ["--master_port", str(port)]
        return [*python, "torch.distributed.run", "--nproc_per_node", str(processes), *meeting, "-m", MODULE]
    if launcher == "accelerate":
        chosen = [] if config is None else ["--config_file", config]
        count = [] if processes is None else ["--num_processes", str(processes)]
        meeting = [] if port is None else ["--main_process_port", str(port)]
        return [*python, "accelerate.commands.launch", *chosen, *count, *meeting, "-m", MODULE]
    hosts = [] if hostfile is None else ["--hostfile", hostfile]
    # With a hostfile the slots of the machines say how many; this number is for one machine.
    count = ["--num_gpus", str(processes)] if hostfile is None else []
    meeting = [] if port is None else ["--master_port", str(port)]
    return [*python, "deepspeed.launcher.runner", *hosts, *count, *meeting, "--module", MODULE]
