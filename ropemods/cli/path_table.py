"""Which attention paths can train a model with its modifications, on this machine: `ropemods show MODEL --paths`."""

from __future__ import annotations

from typing import Any

import torch

from ropemods.attention import capabilities, paths
from ropemods.cli.stock_checkpoints import check_name, load_config
from ropemods.mods import Mod, kinds
from ropemods.mods.probe import rows_with

CUDA = "on CUDA"


def paths_of(name: str, *, trust_remote_code: bool) -> dict[str, Any]:
    """As plain JSON values: of each path why it cannot run here, and of each modification why a path cannot train it.
    Null is a path that can.
    """
    check_name(name)
    config, found = load_config(name, trust_remote_code=trust_remote_code)
    text = config.get_text_config(decoder=True)
    softcap, dropout = getattr(text, "attn_logit_softcapping", None), getattr(text, "attention_dropout", None) or 0.0
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mods = found.mods if found is not None else [mod for kind in kinds().values() for mod in _example(kind)]
    together = [tuple(mods)] if found is not None and len(mods) > 1 else []
    machine = {path: paths.obstacle(path, device) for path in paths.PATHS}

    def reasons(mods: tuple[Mod, ...]) -> dict[str, str | None]:
        rows = rows_with(mods, head_dim=head_dim, dtype=dtype, softcap=softcap, dropout=dropout)
        found = {}
        for path in capabilities.PATHS:
            limit = capabilities.limit(path, rows, "cuda" if machine.get(path) else device.type)
            found[path] = None if limit is None else capabilities.refusal(path, limit, rows, device)
        return found

    return {
        "device": device.type,
        "model": {"head_dim": head_dim, "dtype": str(dtype), "softcap": softcap, "dropout": dropout},
        "paths": {capabilities.EAGER: None} | machine,
        "mods": {" + ".join(map(str, each)): reasons(each) for each in [*((mod,) for mod in mods), *together]},
    }


def _example(kind: type[Mod]) -> tuple[Mod, ...]:
    """One of a kind: the first setting that is worth trying, or the default."""
    try:
        return kind.worth_trying()[:1] or (kind(),)
    except (TypeError, ValueError):  # it has none
        return ()


def paths_in_text(able: dict[str, Any]) -> str:
    model, machine = able["model"], able["paths"]
    asks = [f"heads of {model['head_dim']}", model["dtype"].removeprefix("torch.")]
    asks += [f"a soft cap of {model['softcap']:g}"] if model["softcap"] else []
    asks += [f"attention dropout of {model['dropout']:g}"] if model["dropout"] else []
    rows = [[f"training on {able['device']}, {', '.join(asks)}", *machine]]
    for mod, reasons in able["mods"].items():
        rows.append([mod, *("no" if reasons[p] else CUDA if machine[p] else "yes" for p in machine)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [f"{path}: {why}" for path, why in machine.items() if why]
    lines += dict.fromkeys(why for reasons in able["mods"].values() for why in reasons.values() if why)
    return "\n".join(lines)
