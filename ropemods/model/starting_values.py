"""Initial values from a calibration batch, and what the modifications cost before any training.

The batch is token ids (B, T): rows of one length, each BOS first, without padding, since every token of it counts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ropemods.attention.rows import Rows
from ropemods.model import attention_function
from ropemods.model.anatomy import anatomy_of
from ropemods.model.attention_layers import AttentionSite, Stages
from ropemods.model.partition import home
from ropemods.model.short_pass import in_full_precision, quietly
from ropemods.mods import Mod
from ropemods.mods.base import Call, Stage


def checked(model: PreTrainedModel, mods: Sequence[Mod], batch: Any) -> Tensor:
    """The calibration batch on the model's device, or what is wrong with it."""
    calibrated = next((mod for mod in mods if mod.calibrates), None)
    if calibrated is None:
        raise ValueError(
            f"calibration would be used by none of {', '.join(map(str, mods))}; leave it out. It is for modifications "
            "that choose initial values from a batch, as LearnedSink(init='calibrated') does"
        )
    wanted = "calibration must be a tensor of token ids (rows, tokens), each row BOS first"
    if not isinstance(batch, Tensor):
        instead = "pass its input_ids" if hasattr(batch, "keys") else "torch.tensor(rows) makes one of lists"
        raise TypeError(f"{wanted}, not {type(batch).__name__}; {instead}")
    if batch.ndim != 2 or batch.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8):
        raise ValueError(f"{wanted}, not one of shape {tuple(batch.shape)} and dtype {batch.dtype}")
    if batch.shape[0] < 1 or batch.shape[1] < 2:
        raise ValueError(
            f"{wanted} and then text: this one has {batch.shape[0]} rows of {batch.shape[1]} tokens, so no token "
            "follows a BOS whose attention could be read"
        )
    ids_BT = batch.to(home(model), torch.int64)
    weight, config = model.get_input_embeddings().weight, model.config.get_text_config()
    size = getattr(weight, "ds_shape", weight.shape)[0]
    if not 0 <= int(ids_BT.min()) <= int(ids_BT.max()) < size:
        raise ValueError(
            f"{wanted}: this one has ids from {int(ids_BT.min())} to {int(ids_BT.max())}, and the model {size} tokens"
        )
    if config.bos_token_id is None:
        raise ValueError(
            f"{calibrated} starts from the attention that BOS had, and this model's config names no BOS token "
            "(bos_token_id is None); set model.config.bos_token_id to the token your sequences begin with, or give it "
            "a number to start from"
        )
    without = (ids_BT[:, 0] != config.bos_token_id).nonzero().flatten()
    if len(without):
        row = int(without[0])
        raise ValueError(
            f"{wanted}: {len(without)} of {len(ids_BT)} rows do not begin with the BOS token ({config.bos_token_id}), "
            f"row {row} begins with {int(ids_BT[row, 0])}. Put BOS in front of each, with no padding before it"
        )
    if (padded := _padded(ids_BT, config)) is not None:
        raise ValueError(
            f"{wanted} and without padding: row {padded[0]} ends in {padded[1]} tokens of padding ({padded[2]}), which "
            f"would be taken for text. Cut the rows to {ids_BT.shape[1] - padded[1]} tokens, or take longer texts"
        )
    return ids_BT


def _padded(ids_BT: Tensor, config: Any) -> tuple[int, int, int] | None:
    """(row, length, token) of the longest padding behind a row; None where no row has any."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    found = None
    for token in {config.pad_token_id, config.bos_token_id, *ends} - {None}:
        behind_B = (ids_BT.flip(1) == token).int().cumprod(1).sum(1)
        row, length = int(behind_B.argmax()), int(behind_B.max())
        # A text ends in one end-of-text; tokenizers without a token for padding pad with more of them.
        if length > (1 if token in ends else 0) and (found is None or length > found[1]):
            found = row, length, token
    return found


def calibrate(model: PreTrainedModel, ids_BT: Tensor) -> None:
    """Let every stage choose initial values from what the unmodified model does on a batch."""
    _show(model, ids_BT, lambda stage, rows, call: stage.calibrate(rows, call))


def read_bos(model: PreTrainedModel) -> None:
    """Let stages take what the unmodified model makes of a sequence that is its BOS token alone."""
    ids_BT = torch.tensor([[model.ropemods_attached.bos_token_id]], device=home(model))
    _show(model, ids_BT, lambda stage, rows, call: stage.read_bos(rows, call))


def _show(model: PreTrainedModel, ids_BT: Tensor, to: Callable[[Stage, Rows, Call], None]) -> None:
    layers = {layer.ropemods_site.layer: layer for layer in anatomy_of(model).layers}

    def show(site: AttentionSite, rows: Rows, call: Call, _: Tensor | None) -> None:
        stages = getattr(layers[site.layer], "ropemods", None)
        if not isinstance(stages, Stages):
            return
        if call.bos_column_BN is None:
            raise ValueError(
                f"{type(model).__name__} does not hand keyword arguments down to its attention layers, so what BOS had "
                "there cannot be read; give the modifications numbers to start from, or leave them out"
            )
        for _, stage in stages.stages():
            to(stage, rows, call)

    attached = model.ropemods_attached
    before, attached.bos_active = attached.bos_active, attached.bos_token_id is not None
    try:
        with quietly(model), in_full_precision(model), attention_function.observed(show, of=model, want_lse=False):
            model(input_ids=ids_BT, use_cache=False)
    finally:
        attached.bos_active = before


def loss(model: PreTrainedModel, ids_BT: Tensor) -> float | None:
    """Mean loss of the batch, a row at a time for the memory's sake; None for a model that computes none."""
    if "labels" not in inspect.signature(type(model).forward).parameters:
        return None
    with quietly(model):
        rows = [model(input_ids=row, labels=row, use_cache=False).loss.item() for row in ids_BT.split(1)]
    return sum(rows) / len(rows)


NOTICEABLE = 0.01
"""A rise of the loss, as a share of it, from which on it is told."""


def remark(stock: float, whole: float, alone: dict[str, float], gentler: dict[str, float]) -> str:
    """What a user should know of a rise: how large, by what, and what was tried that costs less."""

    def rise(value: float) -> str:
        return f"{value / stock - 1:+.1%}"

    text = (
        f"untrained, at strength 1, these modifications raise the loss on the calibration batch from {stock:.3f} to "
        f"{whole:.3f} ({rise(whole)})"
    )
    if len(alone) > 1:
        text += f": {', '.join(f'{name} alone {rise(value)}' for name, value in alone.items())}"
    less = {name: value for name, value in gentler.items() if value < whole}
    if less:
        text += f". It costs less with {', or with '.join(f'{name} ({rise(value)})' for name, value in less.items())}"
    elif gentler:
        text += f". No less with {' or '.join(gentler)}"
    return (
        f"{text}. Training from strength 0 with a StrengthSchedule changes the model by degrees, and fewer layers "
        "(layers=) change less of it"
    )
