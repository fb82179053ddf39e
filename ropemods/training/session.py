"""A session: one recipe on the processes that a launcher started, with the data that all of its arms share."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments
from transformers.utils import logging

from ropemods.training import models, world
from ropemods.training.arm import ARMS, Arm
from ropemods.training.batches import first_sequences
from ropemods.training.data import Data, TooLittleText, prepare
from ropemods.training.models import Base
from ropemods.training.progress import watched
from ropemods.training.recipe import Recipe
from ropemods.training.token_rows import Text
from ropemods.training.world import World

MAY_CHANGE = {
    "output_dir", "resume_from_checkpoint", "arms", "seeds", "distributed", "world_size", "protocol", "probe",
    "probe_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size", "deepspeed",
    "save_steps", "save_strategy", "save_total_limit", "report_to", "disable_tqdm", "logging_steps", "logging_strategy",
    "logging_first_step", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id",
    "held_out_rows", "held_out_join",
}  # fmt: skip
"""Keys that do not change what is trained; a run may be resumed under other values of these."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """What does not change from arm to arm."""

    recipe: Recipe
    base: Base
    world: World
    device: torch.device
    first: bool
    """Whether this is the rank that prints and writes."""
    data: dict[Text, Data]
    batch: tuple[int, int]
    """Rows on a device at once, and gradient accumulation steps."""
    steps: int
    command: str

    @property
    def folder(self) -> Path:
        return Path(self.recipe.options.output_dir)

    @property
    def global_batch(self) -> int:
        """Rows in one optimizer step."""
        return self.batch[0] * self.batch[1] * self.world.size

    def say(self, text: str) -> None:
        if self.first:
            print(text, flush=True)

    def introduce(self) -> None:
        """Say what is about to happen, and on what."""
        options = self.recipe.options
        file = "" if options.gguf_file is None else f", {options.gguf_file} unpacked to {options.dtype}"
        self.say(
            f"{options.model_name_or_path}{file} · {self.world} asked for · BOS is token {self.base.bos}, from "
            f"{self.base.bos_from} · {self.steps} steps of {self.global_batch} rows"
        )
        for data in self.data.values():
            facts = data.facts
            self.say(
                f"{facts['description']}; {facts['rows']:,} rows from {facts['documents']:,} documents, "
                f"{facts['held_out_documents']:,} more held out"
            )

    def plan(self) -> Iterator[tuple[Arm, int | None]]:
        """Every run: trained arms once a seed, the others once."""
        for name in self.recipe.options.arms:
            arm = ARMS[name]
            yield from ((arm, seed) for seed in (range(self.recipe.options.seeds) if arm.trained else (None,)))

    def calibration(self) -> Tensor:
        """Token ids (B, T) from which modifications take initial values; the same for every arm and seed."""
        return first_sequences(self.data[self.recipe.options.text].rows, self.recipe.options.calibration_rows)

    def arguments(self, **changes: Any) -> TrainingArguments:
        return arguments(self.recipe, self.batch, max_steps=self.steps, **changes)

    def identity(self, arm: str, seed: int, text: Text) -> dict[str, Any]:
        """What must be the same for a run to go on from a checkpoint."""
        settings = {k: v for k, v in self.recipe.to_json().items() if k not in MAY_CHANGE}
        recipe = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]
        return {
            "arm": arm,
            "seed": seed,
            "recipe": recipe,
            "rows": self.data[text].facts["digest"],
            "global_batch_size": self.global_batch,
            "max_steps": self.steps,
        }


def begin(recipe: Recipe, command: str) -> Session:
    """Check everything that can be checked before training, and make the data."""
    _quiet()
    base = models.find(recipe)
    args = arguments(recipe, (1, 1), max_steps=1)
    wanted = world.asked(args, kind=recipe.options.distributed, world_size=recipe.options.world_size)
    batch = recipe.batch(wanted.size)
    first = args.process_index == 0
    options = recipe.options
    texts: list[Text] = [options.text]
    if "stationary" in options.arms and options.text != "stationary":
        texts.append("stationary")
    rows_a_step = batch[0] * batch[1] * wanted.size
    epochs = options.num_train_epochs or 1
    rows = None if options.max_steps is None else -(-options.max_steps * rows_a_step // epochs)
    data = {text: _data(recipe, base, args, text, rows) for text in texts}
    steps = options.max_steps or min(len(d.rows) for d in data.values()) * epochs // rows_a_step
    if steps == 0:
        raise TooLittleText(
            f"{options.data} gave {len(data[options.text].rows)} rows, fewer than the {rows_a_step} of one optimizer "
            "step; give more text, or lower the batch or the length"
        )
    for schedule in recipe.schedules():
        if schedule.end > steps:
            raise ValueError(f"{schedule} ends at step {schedule.end}, and the text lasts for {steps} steps")
    return Session(
        recipe=recipe,
        base=base,
        world=wanted,
        device=args.device,
        first=first,
        data=data,
        batch=batch,
        steps=steps,
        command=command,
    )


def _data(recipe: Recipe, base: Base, args: TrainingArguments, text: Text, rows: int | None) -> Data:
    return prepare(
        recipe.data_options(text=text),
        base.tokenizer,
        Path(recipe.options.output_dir) / "data",
        bos=base.bos,
        rows=rows,
        first_of_ranks=partial(world.first_of_ranks, args),
    )


def arguments(recipe: Recipe, batch: tuple[int, int], **changes: Any) -> TrainingArguments:
    """The recipe's training arguments, with what the library decides."""
    settings: dict[str, Any] = {
        "output_dir": recipe.options.output_dir,
        "logging_steps": 10,
        "logging_first_step": True,
        "disable_tqdm": not watched(),
        **recipe.training,
        "per_device_train_batch_size": batch[0],
        "gradient_accumulation_steps": batch[1],
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
        "save_total_limit": None,
        "report_to": "none",
    }
    return TrainingArguments(**settings | changes)


def _quiet() -> None:
    """Keep a user's output clean of what only concerns the libraries underneath."""
    if not watched():
        logging.disable_progress_bar()
    # DeepSpeed calls collectives under names that torch has since renamed, once a layer and step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    # And PEFT asks transformers a question under its old name.
    warnings.filterwarnings("ignore", category=FutureWarning, message=r".is_gradient_checkpointing. is deprecated")
