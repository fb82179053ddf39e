"""One rank of a run that trains a modified model for three steps; started by `test_two_ranks.py`.

Rank 0 writes `losses.json` and the consolidated checkpoint.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import ropemods as rm
from tests import zoo

STEPS, ROWS = 3, 4
MODS = [
    rm.TruncatedRoPE(0.5),
    rm.AdaptiveTemperature(trainable="shared", spare_bos=True),
    rm.UnrotatedBos(layers=[0]),
    rm.ReplacedBos("mean"),
    rm.LearnedSink(init=0.2, read_bos=True),
]


def modified():
    return rm.apply(zoo.build("llama"), *MODS, strength=0.8).train()


def batch(step: int) -> torch.Tensor:
    return zoo.tokens(rows=ROWS, seed=step)


def train(model, forward, backward_and_step, rank: int, world: int) -> list[float]:
    losses = []
    for step in range(STEPS):
        ids = batch(step).chunk(world)[rank]
        loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        backward_and_step(loss)
        mean = loss.detach().clone()
        if world > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / world)
    return losses


def alone() -> tuple[list[float], torch.nn.Module]:
    """The same training in one process; what the ranks must agree with."""
    model = modified()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(loss):
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return train(model, model, step, 0, 1), model


def zero3(rank: int, world: int):
    import deepspeed

    model = modified()
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=list(model.parameters()),
        config={
            "train_micro_batch_size_per_gpu": ROWS // world,
            "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
            # Nothing is small enough to stay whole, so every parameter of the modifications is spread too.
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,  # SGD, whose steps are comparable
            "gradient_clipping": 0.0,  # DeepSpeed clips to 1 unless told otherwise
        },
    )
    assert all(p.numel() == 0 for n, p in model.named_parameters() if "ropemods" in n), "not partitioned"

    def step(loss):
        engine.backward(loss)
        engine.step()

    losses = train(model, engine, step, rank, world)
    return losses, model, engine._zero3_consolidated_16bit_state_dict()


def fsdp2(rank: int, world: int):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    dist.init_process_group("gloo")
    model = modified()
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters()), "not sharded"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(loss):
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    losses = train(model, model, step, rank, world)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return losses, model, get_model_state_dict(model, options=options)


def ddp(rank: int, world: int):
    dist.init_process_group("gloo")
    model = modified()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(loss):
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return train(model, wrapped, step, rank, world), model, model.state_dict()


def main(kind: str, output: Path) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    losses, model, state = {"zero3": zero3, "fsdp2": fsdp2, "ddp": ddp}[kind](rank, world)
    if rank == 0:
        model.save_pretrained(output, state_dict=state)
        (output / "losses.json").write_text(json.dumps(losses))
    dist.barrier()
    # The work is done. A rank whose neighbour has already gone may abort in gloo's threads while Python shuts down.
    sys.stdout.flush()
    os._exit(0)
