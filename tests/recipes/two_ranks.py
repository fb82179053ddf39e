"""What each of two ranks runs under torchrun, one distribution after another: `two_ranks.py CASES.json`.

The file holds the recipe of each case. Results go to the recipes' output folders; the sharded case, which has no
Trainer, writes its losses beside them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import fully_shard
from transformers import get_scheduler

import ropemods
from ropemods.training import measuring, models, session
from ropemods.training.arms import run_arm
from ropemods.training.batches import Ordered, collator, order
from ropemods.training.recipe_file import from_values


def by_the_trainer(values: dict[str, Any]) -> None:
    this = session.begin(from_values(values, source="case"), command="test")
    for arm, seed in this.plan():
        run_arm(this, arm, seed)


def fully_sharded(values: dict[str, Any]) -> None:
    """The Trainer's own loop, for a model that torch's `fully_shard` has spread over the ranks."""
    this = session.begin(from_values(values, source="case"), command="test")
    args, (schedule,) = this.arguments(), this.recipe.schedules()
    model: Any = models.modified(this.recipe, models.load(this.recipe, this.base), this.calibration(), strength=0.0)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    rates = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=this.steps)
    data = this.data["natural"]
    rows = Ordered(data.rows, order(len(data.rows), wanted=this.steps * this.global_batch, seed=0))
    rank, size, curve = torch.distributed.get_rank(), this.batch[0], []
    for step in range(this.steps):
        ropemods.set_strength(model, schedule.at(step))
        mine = range(step * this.global_batch + rank * size, step * this.global_batch + (rank + 1) * size)
        batch = collator("restart")([rows[n] for n in mine])
        count = (batch["labels"][:, 1:] != -100).sum()
        torch.distributed.all_reduce(count)
        # fully_shard averages gradients over the ranks; this loss is their sum.
        loss = model(**batch, use_cache=False, num_items_in_batch=count).loss * this.world.size
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        shown = loss.detach().clone()
        torch.distributed.all_reduce(shown)
        curve.append((step + 1, float(shown) / this.world.size))
    ropemods.set_strength(model, 1.0)
    loss, _ = measuring.held_out_loss(model.eval(), data, device=args.device)
    if this.first:
        Path(values["output_dir"], "sharded.json").write_text(json.dumps({"loss": loss, "curve": curve}))


if __name__ == "__main__":
    for values in json.loads(Path(sys.argv[1]).read_text()):
        if values.pop("sharded", False):
            fully_sharded(values)
        else:
            by_the_trainer(values)
