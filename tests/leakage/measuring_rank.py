"""One rank that measures the zoo's llama, whole or spread by ZeRO-3; started by `test_measure.py`."""

from __future__ import annotations

import torch
import torch.distributed as dist

import ropemods as rm
from tests import zoo
from tests.leakage.small import PROTOCOL, documents, tokenizer


def partitioned(model: torch.nn.Module) -> torch.nn.Module:
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": 1,
            # Nothing is small enough to stay whole.
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        },
    )
    return engine


def main(kind: str, folder: str) -> None:
    if kind == "zero3":
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    else:
        dist.init_process_group("gloo")
    model = zoo.build("llama")
    if kind == "zero3":
        model = partitioned(model)
        assert all(hasattr(p, "ds_id") and p.numel() == 0 for p in model.module.parameters())
    report = rm.measure(
        model, tokenizer(), documents(), PROTOCOL, interventions=("zero", "clamp"), progress=False, command="test"
    )
    report.to_json(f"{folder}/{dist.get_rank()}.json")
    dist.destroy_process_group()
