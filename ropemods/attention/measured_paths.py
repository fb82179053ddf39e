"""The path that was measured to be the fastest on a card, for a dtype, a head dim and what a call asks for.

    ropemods bench --device cuda --dtype bfloat16 --paths flash triton triton-rows --choices choices.json
    ROPEMODS_KERNEL=choices.json …

A choice is made between paths that were measured side by side, by the mean of their ratios to stock over the lengths of
that run. What the file has not, and what the best path cannot take, runs on the default path.
"""

from __future__ import annotations

import functools
import json
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch

from ropemods.attention import capabilities, paths
from ropemods.attention.rows import Rows

FEW = 16
"""Queries at most of a call that decodes."""


def card(device: torch.device) -> str:
    """What a choice holds for: a GPU's compute capability."""
    return "{}.{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else device.type


def call(dtype: torch.dtype, head_dim: int, kind: str, terms: Iterable[str]) -> str:
    """What is chosen for. `kind` is one of `ropemods.bench.cases.KINDS`, `terms` the names that `Rows.names` has."""
    return "/".join((str(dtype).removeprefix("torch."), str(head_dim), kind, "+".join(sorted(terms)) or "none"))


def for_rows(rows: Rows) -> str:
    """One of `paths.PATHS`, for this call."""
    path = paths.chosen(rows.q_BHTD.device)
    return best(rows) if path == paths.MEASURED else path


def best(rows: Rows) -> str:
    """The path for these rows, by the file that ROPEMODS_KERNEL names."""
    q = rows.q_BHTD
    training = torch.is_grad_enabled() and any(x.requires_grad for x in rows[:3])
    kind = "training" if training else "decode" if q.shape[2] <= FEW else "forward"
    path = choice(q.device, call(q.dtype, q.shape[3], kind, rows.names()))
    return path if capabilities.limit(path, rows, q.device.type) is None else paths.DEFAULT


@torch.compiler.assume_constant_result
def choice(device: torch.device, key: str) -> str:
    file = paths.asked()
    choices = read(Path(file))
    of_card = choices.get(card(device))
    if of_card is None:
        raise ValueError(
            f"{paths.VARIABLE}: {file} has choices for {', '.join(choices)}, and this device is {card(device)}; "
            f"measure here with `ropemods bench --device cuda --paths flash triton triton-rows --choices {file}`"
        )
    return of_card.get(key, paths.DEFAULT)


@functools.cache
def read(file: Path) -> dict[str, dict[str, str]]:
    mend = f"`ropemods bench --device cuda --paths flash triton --choices {file}` writes one"
    try:
        choices = json.loads(file.read_text(encoding="utf-8"))["choices"]
        wrong = {path for each in choices.values() for path in each.values()} - set(paths.PATHS)
    except OSError as error:
        raise ValueError(f"{paths.VARIABLE}: {file} cannot be read ({error.strerror}); {mend}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{paths.VARIABLE}: {file} holds no choices of paths; {mend}") from error
    if wrong:
        raise ValueError(f"{paths.VARIABLE}: {file} names {', '.join(sorted(wrong))}, which is no path; {mend}")
    return choices


def fastest(ratios: Iterable[tuple[str, str, float]]) -> dict[str, str]:
    """The best path of each call, from (call, path, ratio to stock) of every length."""
    logs: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for key, path, ratio in ratios:
        if path in paths.PATHS:
            logs[key][path].append(math.log(ratio))
    means = {key: {path: sum(x) / len(x) for path, x in of.items()} for key, of in logs.items()}
    return {key: min(of, key=lambda path: of[path]) for key, of in sorted(means.items()) if len(of) > 1}
