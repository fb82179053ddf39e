"""How a run is spread over processes: what was asked for, what is really in force, and an error where they differ.

Launchers and the Trainer find the distribution out from environment variables, flags and config files, and where those
do not fit together they tend to go on with less: accelerate leaves FSDP off on a CPU, so that every process trains a
model of its own, and a Trainer that is not told `use_cpu` believes in one process. Such a run ends without an error and
with a wrong answer. So every run states what is in force, read from the model as it was wrapped, and stops if it is not
what was asked.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist
from torch import nn
from transformers import TrainingArguments

Kind = Literal["none", "ddp", "fsdp1", "fsdp2", "zero0", "zero1", "zero2", "zero3"]
NAMES: dict[str, str] = {
    "none": "one process",
    "ddp": "DDP",
    "fsdp1": "FSDP 1",
    "fsdp2": "FSDP 2",
    "zero0": "DeepSpeed without ZeRO",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
}


@dataclass(frozen=True)
class World:
    """A distribution: its kind, the number of processes, and the backend they talk through (None for one process)."""

    kind: Kind
    size: int
    backend: str | None

    def __str__(self) -> str:
        talk = f" · {self.backend}" if self.backend is not None else ""
        return f"{NAMES[self.kind]} · world size {self.size}{talk}"


class NotAsAsked(RuntimeError):
    """The distribution in force is not the one that was asked for."""


def asked(
    args: TrainingArguments,
    *,
    kind: str | None = None,
    world_size: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> World:
    """What the recipe, the launcher and the training arguments ask for together."""
    size = int(environment.get("WORLD_SIZE", "1"))
    if "WORLD_SIZE" not in environment and "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment:
        raise NotAsAsked(
            "accelerate launch was asked for several processes and started one, as it does where its config says "
            "distributed_type: MULTI_CPU; on a CPU start the run with torchrun, or let the config say MULTI_GPU and "
            "the recipe use_cpu: true"
        )
    if world_size is not None and world_size != size:
        raise NotAsAsked(
            f"the recipe asks for world_size={world_size} and the launcher started {size} process"
            f"{'' if size == 1 else 'es'}; start it with the number asked (torchrun --nproc_per_node, accelerate "
            "launch --num_processes, deepspeed --num_gpus) or change world_size"
        )
    launched = _launched(args, size, environment)
    if kind is not None and kind not in NAMES:
        raise ValueError(f"distributed={kind!r}: one of {', '.join(NAMES)}")
    if kind is not None and kind != launched:
        raise NotAsAsked(
            f"the recipe asks for distributed={kind} ({NAMES[kind]}), and launcher and training arguments ask for "
            f"{launched} ({NAMES[launched]}); give the matching config (recipes/deepspeed, recipes/accelerate) or "
            "change distributed"
        )
    backend = args.ddp_backend or ("nccl" if args.device.type == "cuda" else "gloo")
    return World(launched, size, backend if size > 1 else None)


def _launched(args: TrainingArguments, size: int, environment: Mapping[str, str]) -> Kind:
    def on(name: str) -> bool:
        return environment.get(name, "false").lower() in ("1", "true", "yes")

    if args.deepspeed is not None or on("ACCELERATE_USE_DEEPSPEED"):
        return _zero(args.deepspeed_plugin.zero_stage)
    if args.fsdp or on("ACCELERATE_USE_FSDP"):
        return "fsdp2" if environment.get("FSDP_VERSION", "1") == "2" else "fsdp1"
    return "ddp" if size > 1 else "none"


def _zero(stage: int) -> Kind:
    kinds: tuple[Kind, ...] = ("zero0", "zero1", "zero2", "zero3")
    return kinds[stage]


def in_force(model: nn.Module) -> World:
    """The distribution that a model, as the Trainer has wrapped it, really trains with."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    kind = _kind(model)
    if kind == "ddp" and size == 1:  # a launcher that starts one process wraps it all the same
        kind = "none"
    return World(kind, size, dist.get_backend() if size > 1 else None)


def _kind(model: nn.Module) -> Kind:
    # By the name of the wrapper's class, so that none of the others has to be imported.
    for cls in type(model).__mro__:
        if cls.__name__ == "DistributedDataParallel":
            return "ddp"
        if cls.__name__ == "FSDPModule":
            return "fsdp2"
        if cls.__name__ == "FullyShardedDataParallel":
            return "fsdp1"
        if cls.__name__ == "DeepSpeedEngine":
            engine: Any = model
            return _zero(engine.zero_optimization_stage())
    return "none"


def check(wanted: World, found: World) -> None:
    """Raise unless what is in force is what was asked for."""
    if found != wanted:
        raise NotAsAsked(
            f"asked for: {wanted}; in force: {found}. The run would train something else than it says, so it stops "
            "here. On a CPU set use_cpu: true (and DS_ACCELERATOR=cpu for DeepSpeed); accelerate does not shard with "
            "FSDP on a CPU at all"
        )


@contextlib.contextmanager
def first_of_ranks(args: TrainingArguments) -> Iterator[None]:
    """Lets the first rank in, then the first of each other machine, then the rest.

    Work whose result is a file is then done once where machines share the folder, and once a machine where they do not.
    """
    state = args.distributed_state
    assert state is not None
    with state.main_process_first(), state.local_main_process_first():
        yield


def leave() -> None:
    """End the talk between ranks in order; a rank that ends while others still talk to it can abort."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
