"""One rank of a run that trains a stock model with the leakage penalty; started by `tests/test_penalty.py`.

Rank 0 writes `losses.json` (of the loss and of the penalty in it) and the consolidated checkpoint.
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

STEPS, ROWS, PARTS, LENGTH = 3, 8, 2, 24


def penalised(total: float) -> tuple[torch.nn.Module, rm.Penalized]:
    model = zoo.build().train()
    return model, rm.penalize(model, weight=3.0, total=total, early=(4, 8), window=4, late=4)


def train(penalized, forward, backward, step, rank: int, world: int) -> list[float]:
    """Each step's rows come in parts, so that several passes go into a step."""
    said = []
    for n in range(STEPS):
        for count, part in enumerate(zoo.tokens(ROWS, LENGTH, seed=n).chunk(PARTS)):
            ids = part.chunk(world)[rank]
            loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
            mean = torch.stack((loss.detach().float(), penalized.last.penalty.float()))
            backward(loss / PARTS)
            step(last=count == PARTS - 1)
            if world > 1:
                dist.all_reduce(mean)
            said += (mean / world).tolist()
    return said


def stepping(optimizer):
    def step(*, last: bool) -> None:
        if last:
            optimizer.step()
            optimizer.zero_grad()

    return step


def alone(total: float) -> tuple[list[float], torch.nn.Module]:
    """The same training in one process; what the ranks must agree with."""
    model, penalized = penalised(total)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return train(penalized, model, torch.Tensor.backward, stepping(optimizer), 0, 1), model


def zero(stage: int, total: float, rank: int, world: int):
    import deepspeed

    model, penalized = penalised(total)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=list(model.parameters()),
        config={
            "train_micro_batch_size_per_gpu": ROWS // PARTS // world,
            "gradient_accumulation_steps": PARTS,
            "optimizer": {"type": "SGD", "params": {"lr": 0.05}},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,  # SGD, whose steps are comparable
            "gradient_clipping": 0.0,  # DeepSpeed clips to 1 unless told otherwise
        },
    )
    # The engine divides by the number of parts itself.
    said = train(penalized, engine, lambda loss: engine.backward(loss * PARTS), lambda last: engine.step(), rank, world)
    state = engine._zero3_consolidated_16bit_state_dict() if stage == 3 else model.state_dict()
    return said, model, state


def fsdp2(total: float, rank: int, world: int):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    model, penalized = penalised(total)
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    said = train(penalized, model, torch.Tensor.backward, stepping(optimizer), rank, world)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return said, model, get_model_state_dict(model, options=options)


def ddp(total: float, rank: int, world: int):
    dist.init_process_group("gloo")
    model, penalized = penalised(total)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return train(penalized, wrapped, torch.Tensor.backward, stepping(optimizer), rank, world), model, model.state_dict()


def main(kind: str, total: float, output: Path) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    runs = {"zero2": lambda *at: zero(2, *at), "zero3": lambda *at: zero(3, *at), "fsdp2": fsdp2, "ddp": ddp}
    said, model, state = runs[kind](total, rank, world)
    if rank == 0:
        model.save_pretrained(output, state_dict=state)
        (output / "losses.json").write_text(json.dumps(said))
    dist.barrier()
    # The work is done. A rank whose neighbour has already gone may abort in gloo's threads while Python shuts down.
    sys.stdout.flush()
    os._exit(0)
