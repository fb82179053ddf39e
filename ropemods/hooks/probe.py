"""Short forward passes that learn something of a model: how it pairs rotary channels, and initial values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ropemods.attention import autocast
from ropemods.attention.rows import Rows
from ropemods.hooks import interface, rotary
from ropemods.hooks.partition import gathered
from ropemods.hooks.sites import AttentionSite, Stages, attention_layers, site_of
from ropemods.mods.base import Call, Layout


class _Reached(Exception):
    """Thrown at the first attention layer; carries its queries."""

    def __init__(self, queries: Tensor) -> None:
        self.queries = queries


@contextlib.contextmanager
def quietly(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, no gradients and no autocast, put back as they were."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), autocast.suspended(model.device):
            yield
    finally:
        for module in training:
            module.training = True


def layout(model: PreTrainedModel) -> Layout | None:
    """How the model pairs the channels it rotates; None if in no known way. See `rotary.find_layout`."""
    name, first = attention_layers(model)[0]
    site = site_of(first)
    if site is None or site.table is None:
        return None
    vocabulary = model.get_input_embeddings().weight.shape[0]
    attached = getattr(model, "ropemods_attached", None)
    # Modifications that are active refuse a sequence without BOS; only the second token is looked at.
    first_token = vocabulary // 3 if attached is None or attached.bos_token_id is None else attached.bos_token_id
    ids = torch.tensor([[first_token, vocabulary // 2]], device=model.device)

    def stop(_: AttentionSite, rows: Rows, __: Call, ___: Tensor | None) -> None:
        raise _Reached(rows.q_BHTD)

    def first_queries() -> Tensor:
        try:
            with interface.observed(stop, want_lse=False):
                model(input_ids=ids, use_cache=False)
        except _Reached as reached:
            return reached.queries
        raise RuntimeError(f"a forward pass of {type(model).__name__} did not reach its attention layer {name}")

    block = model.get_submodule(name.rpartition(".")[0])
    with quietly(model), gathered(model.get_input_embeddings(), block):
        found = rotary.find_layout(site.table, first_queries)
    return None if found is None else found[0]


def calibrate(model: PreTrainedModel, ids_BT: Tensor) -> None:
    """Let every stage choose initial values from what the unmodified model does on a batch."""
    layers = {layer.ropemods_site.layer: layer for _, layer in attention_layers(model)}

    def show(site: AttentionSite, rows: Rows, call: Call, _: Tensor | None) -> None:
        stages = getattr(layers[site.layer], "ropemods", None)
        if isinstance(stages, Stages):
            for _, stage in stages.stages():
                stage.calibrate(rows, call)

    attached = model.ropemods_attached
    before, attached.bos_active = attached.bos_active, attached.bos_token_id is not None
    try:
        with quietly(model), interface.observed(show, want_lse=False):
            model(input_ids=ids_BT, use_cache=False)
    finally:
        attached.bos_active = before
