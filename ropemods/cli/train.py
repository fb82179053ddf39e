"""`ropemods train`: run a recipe under a launcher, and say the command that does it."""

from __future__ import annotations

import shlex
import subprocess
from dataclasses import dataclass
from typing import Literal

from ropemods.cli.command import Command
from ropemods.settings.extras import need
from ropemods.settings.options import REQUIRED, option
from ropemods.settings.strict_yaml import read


@dataclass(frozen=True, kw_only=True)
class Options:
    """Fine-tune by a recipe and compare what comes of it. Its arms are base, base with untrained modifications, control
    and modified. The exact
    command is printed before it is run. What stands behind -- goes to the recipe: any of its keys as a flag, which wins
    over the file (`python -m ropemods.training --help` lists them).
    """

    recipe: str = option(REQUIRED, "a YAML file, such as recipes/smoke.yaml", positional=True)
    flags: tuple[str, ...] = option(
        (), "behind --: flags for the recipe, such as --learning_rate 1e-5", positional=True
    )
    gguf_file: str | None = option(
        None, "the GGUF file to read in the recipe's model_name_or_path", metavar="FILE", unset="the recipe's, if any"
    )
    launcher: Literal["python", "torchrun", "accelerate", "deepspeed"] = option("python", "what starts the processes")
    num_processes: int | None = option(None, "how many, on all machines together", unset="what the launcher takes")
    launcher_config: str | None = option(None, "config file of accelerate", metavar="FILE", unset="accelerate's own")
    hostfile: str | None = option(None, "machines and their GPUs, for deepspeed", metavar="FILE", unset="this machine")
    port: int | None = option(None, "port at which the processes meet", unset="the launcher's own, mostly 29500")
    print_only: bool = option(False, "print the command and do not run it")


def run(options: Options) -> None:
    from ropemods.training.launcher import command

    words = command(
        options.recipe,
        launcher=options.launcher,
        num_processes=options.num_processes,
        launcher_config=options.launcher_config,
        hostfile=options.hostfile,
        port=options.port,
        more=[*([] if options.gguf_file is None else ["--gguf_file", options.gguf_file]), *options.flags],
    )
    print(shlex.join(words), flush=True)
    if options.print_only:
        return
    _check_installed(options)
    code = subprocess.run(words, check=False).returncode
    if code:
        raise OSError(f"the command above ended with exit code {code}; its own message is above")


def _check_installed(options: Options) -> None:
    """What the launcher needs; the recipe itself is checked by the processes that read it, before they do anything."""
    need("accelerate", "training")
    if options.launcher == "deepspeed":
        need("deepspeed", "--launcher deepspeed")
    config = options.launcher_config
    if config is not None and read(config).get("distributed_type") == "DEEPSPEED":
        need("deepspeed", config)


COMMAND = Command(
    options=Options,
    run=run,
    example="""
        ropemods train recipes/llama-3.2-1b/full.yaml
        ropemods train recipes/mistral-7b/full.yaml --launcher accelerate --num_processes 8 \\
            --launcher_config recipes/accelerate/deepspeed_zero2.yaml -- --learning_rate 1e-5
    """,
)
