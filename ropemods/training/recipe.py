"""Recipes: one flat YAML file says everything about a fine-tune, and a flag of the same name overrides each key.

A recipe's keys are its own (`Options` below), six that hold a mapping or a list (`mods`, `schedule`, `penalty`, `lora`,
`protocol`, `probe`), and any argument of transformers' TrainingArguments under its own name. How they are read, from
YAML and from flags, is in `reading.py`.

    model_name_or_path: meta-llama/Llama-3.2-1B
    output_dir: runs/llama-3.2-1b
    mods: [{kind: truncated_rope, keep: 0.75}, {kind: learned_sink}]
    schedule: {steps: 300, shape: cosine}       # the arguments of StrengthSchedule
    penalty: {weight: 3.0}                      # the arguments of penalize; left out, leakage is not penalised
    lora: {r: 16, target_modules: all-linear}   # the arguments of peft's LoraConfig; left out, everything trains
    protocol: {sequences: 384, length: 512}     # the fields of Protocol
    data: books.jsonl.xz
    max_steps: 1000
    learning_rate: 2e-5
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ropemods.leakage.protocol import Protocol
from ropemods.mods import Mod
from ropemods.penalty import Penalty
from ropemods.settings.options import REQUIRED, option
from ropemods.training.arm import ARMS
from ropemods.training.data import DataOptions
from ropemods.training.text import Source
from ropemods.training.token_rows import Packing, Text


@dataclass(frozen=True, kw_only=True)
class Options:
    """The keys that are a recipe's own."""

    model_name_or_path: str = option(REQUIRED, "the base model: a folder, or a name on the hub")
    gguf_file: str | None = option(None, "the GGUF file in model_name_or_path to read", unset="none")
    output_dir: str = option(REQUIRED, "where rows, checkpoints, reports and tables go")
    tokenizer_name_or_path: str | None = option(None, "where the tokenizer is", unset="with the model")
    revision: str | None = option(None, "the model's revision on the hub")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("float32", "the dtype of the weights")
    attn_implementation: str = option("sdpa", "the attention implementation")
    bos_token_id: int | None = option(
        None, "the token that sequences begin with", unset="the tokenizer's or the model's"
    )

    arms: tuple[str, ...] = option(tuple(ARMS)[:4], f"which arms to run, of {', '.join(ARMS)}")
    seeds: int = option(1, "how many times to train each arm, each time in another order of the rows")

    data: str = option(REQUIRED, "training text: a .txt, .jsonl or .parquet file, or a dataset as name:config:split")
    held_out_data: str | None = option(None, "text that never trains", unset="a share of data")
    held_out: float = option(0.05, "the share of the documents that never trains, chosen by a hash of their text")
    held_out_rows: int = option(128, "at most so many rows for the held-out loss")
    held_out_join: int = option(0, "join short held-out documents to so many characters for the measurement; 0 never")
    column: str = option("text", "the field that holds the text")
    separator: str = option("auto", "what parts the documents of a .txt file")
    data_seed: int = option(0, "order of the documents")
    text: Text = option(  # noqa: RUF009
        "natural", "sequences begin at document and paragraph starts, or anywhere"
    )
    packing: Packing | None = option(  # noqa: RUF009
        None, "how sequences share a row", unset="restart for natural text"
    )
    length: int = option(1024, "tokens in a row")

    max_steps: int | None = option(None, "optimizer steps", unset="as many as num_train_epochs gives")
    num_train_epochs: int | None = option(None, "how many times the text may be read", unset="once")
    global_batch_size: int | None = option(None, "rows in an optimizer step, all ranks", unset="what the others give")
    distributed: str | None = option(None, "stop unless this is in force: ddp, fsdp2, zero1, zero2, zero3")
    world_size: int | None = option(None, "stop unless there are so many processes")
    resume_from_checkpoint: bool = option(False, "go on from each arm's last complete checkpoint")

    calibration_rows: int = option(8, "training rows from which modifications take initial values")
    probe_steps: int = option(0, "measure the residual leakage on a small set every so many steps; 0 never does")
    guard_factor: float = option(3.0, "stop when the loss stays at this multiple of its start")
    guard_patience: int = option(20, "for so many steps")

    def __post_init__(self) -> None:
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown or not self.arms:
            raise ValueError(f"arms={list(self.arms)}: some of {', '.join(ARMS)}")
        for name, least in (("seeds", 1), ("calibration_rows", 1), ("probe_steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: at least {least}")
        for name in ("max_steps", "num_train_epochs", "global_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: at least 1, or left out")
        if self.max_steps is None and self.num_train_epochs is None:
            raise ValueError("say how long to train: max_steps, or num_train_epochs, or both")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole recipe, checked."""

    options: Options
    mods: tuple[Mod, ...] = ()
    schedule: tuple[dict[str, Any], ...] = ()
    penalty: Penalty | None = None
    """Of the arm `modified`, with mods or without."""
    lora: dict[str, Any] | None = None
    protocol: Protocol | None = None
    """None measures no leakage, only the held-out loss."""
    probe: Protocol | None = None
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of TrainingArguments."""

    def __post_init__(self) -> None:
        needing = [arm for arm in self.options.arms if arm == "untrained" or (arm == "modified" and not self.penalty)]
        if needing and not self.mods:
            also = " (a penalty alone makes the arm modified)" if "modified" in needing else ""
            raise ValueError(f"arms {', '.join(needing)} need modifications; give mods, or leave these arms out{also}")
        if self.penalty is not None and self.options.length < self.penalty.least:
            raise ValueError(
                f"penalty: early={self.penalty.early} needs sequences of {self.penalty.least} tokens, and length is "
                f"{self.options.length}; give longer rows, or earlier queries"
            )
        if self.options.text == "stationary" and "stationary" in self.options.arms:
            raise ValueError("text is stationary, so the arm 'stationary' is the control itself; leave it out of arms")
        check_schedule(self.mods, self.schedule)
        if self.options.probe_steps and self.probe is None:
            raise ValueError("probe_steps needs a probe: {sequences: ..., length: ...}, as small as a protocol can be")
        self.schedules()

    def schedules(self) -> list[Any]:
        """New callbacks that walk the strength, checked against the number of steps."""
        from ropemods.schedule import StrengthSchedule

        made = [StrengthSchedule(**entry) for entry in self.schedule or ({},)] if self.mods else []
        steps = self.options.max_steps
        for each in made:
            if steps is not None and each.end > steps:
                raise ValueError(
                    f"schedule: {each} reaches strength 1 at step {each.end}, after the last of max_steps={steps}; "
                    "shorten it or train for longer"
                )
        return made

    def data_options(self, *, text: Text | None = None) -> DataOptions:
        options = self.options

        def source(name: str) -> Source:
            return Source(name=name, column=options.column, separator=options.separator, seed=options.data_seed)

        wanted = self.protocol.sequences * self.protocol.length * 16 if self.protocol is not None else 0
        return DataOptions(
            source=source(options.data),
            held_out_source=None if options.held_out_data is None else source(options.held_out_data),
            held_out=options.held_out,
            held_out_rows=options.held_out_rows,
            held_out_join=options.held_out_join,
            held_out_characters=wanted,
            text=text or options.text,
            packing=options.packing if text in (None, options.text) else None,
            length=options.length,
        )

    def batch(self, world_size: int) -> tuple[int, int]:
        """Rows on a device at once, and gradient accumulation steps."""
        each = int(self.training.get("per_device_train_batch_size", 8))
        accumulate = self.training.get("gradient_accumulation_steps")
        wanted = self.options.global_batch_size
        if wanted is None:
            return each, int(accumulate or 1)
        if wanted % (each * world_size):
            raise ValueError(
                f"global_batch_size={wanted} cannot be dealt to {world_size} ranks in batches of {each}: "
                f"{each} × {world_size} does not divide it. Change per_device_train_batch_size, the number of ranks, "
                f"or use {max(1, wanted // (each * world_size)) * each * world_size}"
            )
        needed = wanted // (each * world_size)
        if accumulate is not None and accumulate != needed:
            raise ValueError(
                f"global_batch_size={wanted} on {world_size} ranks in batches of {each} takes "
                f"gradient_accumulation_steps={needed}, and the recipe says {accumulate}; leave one of them out"
            )
        return each, needed

    def to_json(self) -> dict[str, Any]:
        """Every key with its value, as it could stand in a YAML file."""
        own = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self.options).items()}
        return {
            **own,
            "mods": [mod.to_json() for mod in self.mods],
            "schedule": [dict(entry) for entry in self.schedule],
            # A recipe without one hashes as it did before there were penalties.
            **({} if self.penalty is None else {"penalty": self.penalty.to_json()}),
            "lora": self.lora,
            "protocol": None if self.protocol is None else self.protocol.to_dict(),
            "probe": None if self.probe is None else self.probe.to_dict(),
            **self.training,
        }


def check_schedule(mods: Sequence[Mod], schedule: Sequence[Mapping[str, Any]]) -> None:
    """That every modification is moved by one entry of a schedule, or none by any."""
    kinds = list(dict.fromkeys(mod.kind for mod in mods))
    moved = [kind for entry in schedule or ({},) for kind in ([entry["kind"]] if entry.get("kind") else kinds)]
    for kind in moved:
        if kind not in kinds:
            raise ValueError(f"schedule: kind {kind!r} is not among the mods: {', '.join(kinds)}")
    for kind in kinds:
        if moved.count(kind) != 1:
            raise ValueError(
                f"schedule: {kind} is moved by {moved.count(kind)} of its entries and not by one; without kind an "
                "entry moves all modifications, and with kinds there must be one for each"
            )
