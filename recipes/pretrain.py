"""Train a small reference model from scratch, tokenizer included: a twin for a claim about positions.

    python recipes/pretrain.py --output_dir runs/standard --data ropemods --max_steps 300 --length 128
    python recipes/pretrain.py --output_dir runs/nope --data ropemods --max_steps 300 --length 128 --rope nope

`--rope standard | ntk | llama3 | window | p-rope | nope` (ropemods/training/small_models.py says what each is); the
shape is given by `--hidden_size`, `--num_hidden_layers` and so on. Text, rows, batch, launchers and training arguments
are those of recipes/finetune.py, and so is the trainer: `--data` is a file, a folder of text files, or a dataset.
Everything may stand in a YAML file instead (`--config`).

The untrained model goes to `output_dir`/start, the trained one to `output_dir`/pretrain-0/model.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import typing
from pathlib import Path
from typing import Any

from ropemods.settings.extras import MissingPackage
from ropemods.settings.files import write_text
from ropemods.settings.options import converted
from ropemods.settings.strict_yaml import read
from ropemods.training import measuring, session
from ropemods.training.arm import Arm
from ropemods.training.arms import run_arm
from ropemods.training.recipe import Recipe
from ropemods.training.recipe_file import flags, from_values
from ropemods.training.small_models import Architecture, train_tokenizer, write_untrained
from ropemods.training.world import first_of_ranks, leave

# What pretraining takes for granted unless it is told otherwise.
DEFAULTS: dict[str, Any] = {
    "length": 256,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 50,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "per_device_train_batch_size": 16,
}


def main(words: list[str]) -> None:
    given = flags(words)
    values = {**DEFAULTS, **(read(given.pop("config")) if "config" in given else {}), **given}
    hints = typing.get_type_hints(Architecture)
    shape = {name: converted(values.pop(name), hints[name], name) for name in hints if name in values}
    architecture = Architecture(**shape)
    start = Path(str(values.get("output_dir"))) / "start"
    recipe = from_values({**values, "model_name_or_path": str(start), "arms": ["control"]}, source="pretrain")
    begin(recipe, architecture, start)

    this = session.begin(recipe, command=" ".join(sys.orig_argv))
    this.introduce()
    result = run_arm(this, Arm("pretrain", mods=False, trained=True), 0)
    unigram = measuring.unigram_loss(this.data[recipe.options.text], vocabulary=architecture.vocab_size)
    this.say(f"held-out loss {result.loss:.3f} nats per token; a unigram model has {unigram:.3f}")
    this.say(f"the model is in {this.folder / str(result.model)}")


def begin(recipe: Recipe, architecture: Architecture, folder: Path) -> None:
    """Tokenizer and untrained model, made by one rank."""
    with first_of_ranks(session.arguments(recipe, (1, 1), max_steps=1)):
        note, shape = folder / "architecture.json", dataclasses.asdict(architecture)
        if note.is_file():
            if json.loads(note.read_text(encoding="utf-8")) != shape:
                raise ValueError(f"{folder} holds another architecture; take another output_dir, or remove it")
            return
        options = recipe.data_options()
        tokenizer = train_tokenizer(options.source.documents(), vocab_size=architecture.vocab_size)
        count = write_untrained(architecture, tokenizer, folder, length=options.length, seed=0)
        write_text(note, json.dumps(shape, indent=2) + "\n")
        print(f"{count:,} parameters: {', '.join(f'{k}={v}' for k, v in shape.items())}", flush=True)


if __name__ == "__main__":
    if "--help" in sys.argv or "-h" in sys.argv:
        sys.exit(print(__doc__))
    try:
        main(sys.argv[1:])
        leave()
    except (ValueError, OSError, MissingPackage) as error:
        sys.exit(f"pretrain: {error}")
