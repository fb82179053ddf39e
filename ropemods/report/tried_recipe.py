"""The recipe that a menu of tries ends in: a fine-tune with what helped, a penalty, and a control beside it.

It trains on the text that was tried on, a fifth of the documents held out (more of a short text), in as many steps of
as many rows as the penalty was measured with (evals/penalty.py).
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import Any, Final

import yaml

from ropemods.report.tries import Tries

STEPS, BATCH = 96, 8
WEIGHT, WARMUP = 3.0, 10
GROUPS: Final = 8
HELD_OUT: Final = (0.2, 0.35, 0.5)
SPARE: Final = 3
"""Times the tokens of the crops that held-out documents should have, since crops use them unevenly."""


def recipe(tries: Tries, given: Mapping[str, Any]) -> str:
    """The YAML text; `given` names model and data at least, and wins over what is here."""
    protocol, length = tries.protocol, int(tries.protocol["length"])
    chosen = tries.chosen if tries.chosen is not None and tries.chosen.in_recipes else None
    held_out, sequences = _held_out(tries.text_tokens, length, int(protocol["sequences"]))
    # Stationary rows leave half of a short text unused.
    rounds = math.ceil(2 * STEPS * BATCH * length / ((1 - held_out) * max(1, tries.text_tokens)))
    values: dict[str, Any] = {
        "output_dir": "runs/suggested",
        "bos_token_id": tries.bos_token_id,
        "arms": ["base", *(["untrained"] if chosen else []), "control", "modified"],
    }
    if chosen is not None:
        values |= {"mods": [_plain(chosen.mod)], "schedule": {"steps": STEPS // 3}}
    values |= {
        "penalty": {"weight": WEIGHT, "warmup_steps": WARMUP, "early": list(protocol["early"])},
        "held_out": held_out,
        "text": "stationary",
        "length": length,
        "protocol": {
            "sequences": sequences,
            "length": length,
            "groups": GROUPS,
            "early": list(protocol["early"]),
            "window": protocol["window"],
        },
        "max_steps": STEPS,
        "num_train_epochs": rounds,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 5e-5,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "logging_steps": 8,
        "save_strategy": "no",
    }
    order = {"model_name_or_path": None, "data": None}
    merged = {**order, **values, **given}
    written = yaml.safe_dump(merged, sort_keys=False, allow_unicode=True, default_flow_style=None, width=118)
    return _heading(tries) + written


def _held_out(tokens: int, length: int, wanted: int) -> tuple[float, int]:
    """The share of the documents that never trains, and how many crops it holds."""
    for share in HELD_OUT:
        crops = min(wanted, int(share * tokens / (SPARE * length))) // GROUPS * GROUPS
        if crops:
            break
    return share, max(crops, GROUPS)


def _heading(tries: Tries) -> str:
    told = f"What `ropemods suggest --try` found on {tries.text.source}: {tries.reason}. {tries.remedy()}"
    if tries.chosen is not None and not tries.chosen.in_recipes:
        told += (
            f" {tries.chosen.name} is in a program of yours, and a recipe cannot import it: put its class into a "
            "module of its own, or both on in that program, with rm.apply and rm.penalize."
        )
    lines = textwrap.wrap(told, 116, break_long_words=False, break_on_hyphens=False)
    return "".join(f"# {line}\n" for line in (*lines, "  ropemods train THIS_FILE"))


def _plain(mod: Mapping[str, Any]) -> dict[str, Any]:
    """Without options that are left out."""
    return {name: value for name, value in mod.items() if value is not None}
