"""A short forward pass that learns how a model pairs rotary channels, and quiet for such passes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ropemods.attention import autocast
from ropemods.attention.rows import Rows
from ropemods.model import attention_function, rope_tables
from ropemods.model.anatomy import anatomy_of
from ropemods.model.attention_layers import AttentionSite
from ropemods.model.partition import gathered, home
from ropemods.mods.base import Call, Layout


class _Reached(Exception):
    """Thrown at the first attention layer; carries its queries."""

    def __init__(self, queries: Tensor) -> None:
        self.queries = queries


@contextlib.contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode and no autocast, put back as they were."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with autocast.suspended(model.device):
            yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def quietly(model: PreTrainedModel) -> Iterator[None]:
    """`evaluating`, without gradients."""
    with evaluating(model), torch.no_grad():
        yield


@contextlib.contextmanager
def in_full_precision(model: PreTrainedModel) -> Iterator[None]:
    """Without the autocast that the caller may have entered: what is learned is to hold outside of it too."""
    with torch.autocast(device_type=(home(model) or model.device).type, enabled=False):
        yield


def layout(model: PreTrainedModel) -> Layout | None:
    """How the model pairs the channels it rotates; None if in no known way. See `rotary.find_layout`."""
    anatomy = anatomy_of(model)
    name, site = anatomy.names[0], anatomy.sites[0]
    if site.table is None:
        return None
    vocabulary = model.get_input_embeddings().weight.shape[0]
    attached = getattr(model, "ropemods_attached", None)
    # Modifications that are active refuse a sequence without BOS; only the second token is looked at.
    first_token = vocabulary // 3 if attached is None or attached.bos_token_id is None else attached.bos_token_id
    ids = torch.tensor([[first_token, vocabulary // 2]], device=home(model))

    def stop(_: AttentionSite, rows: Rows, __: Call, ___: Tensor | None) -> None:
        raise _Reached(rows.q_BHTD)

    def first_queries() -> Tensor:
        try:
            with attention_function.observed(stop, of=model, want_lse=False):
                model(input_ids=ids, use_cache=False)
        except _Reached as reached:
            return reached.queries
        raise RuntimeError(f"a forward pass of {type(model).__name__} did not reach its attention layer {name}")

    block = model.get_submodule(name.rpartition(".")[0])
    with quietly(model), in_full_precision(model), gathered(model.get_input_embeddings(), block):
        found = rope_tables.find_layout(site.table, first_queries)
    return None if found is None else found[0]
