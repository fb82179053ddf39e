"""Run a recipe in the processes that a launcher started: `python -m ropemods.training --config RECIPE`.

`recipes/finetune.py` is this under another name, and its docstring tells how to use it.
"""

from __future__ import annotations

import sys

from ropemods.settings.extras import MissingPackage
from ropemods.training import session, world
from ropemods.training.arms import run_arm
from ropemods.training.guard import Diverged
from ropemods.training.recipe_file import from_command_line, help_text
from ropemods.training.results import write_results
from ropemods.training.world import NotAsAsked


def main(words: list[str]) -> None:
    """Check the recipe and make its data, run its arms one after another, write what was found."""
    this = session.begin(from_command_line(words), command=" ".join(sys.orig_argv))
    this.introduce()
    results = [run_arm(this, arm, seed) for arm, seed in this.plan()]
    this.say("\n" + write_results(this, results))


def run(words: list[str]) -> None:
    """`main`, with errors that a user can mend told in a line."""
    if "--help" in words or "-h" in words:
        print(help_text())
        return
    try:
        main(words)
        world.leave()
    except (ValueError, OSError, MissingPackage, Diverged, NotAsAsked) as error:
        sys.exit(f"finetune: {error}")


if __name__ == "__main__":
    run(sys.argv[1:])
