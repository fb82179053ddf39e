"""A model put where its attention can be observed, and put back as it was.

Every attention layer of the model, stock or modified, is sent through ropemods for as long as the context is open. What
was put on a stock model for that is taken off again, whatever happened inside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from ropemods.model import attention_function, short_pass, unchanged
from ropemods.model.anatomy import anatomy_of
from ropemods.model.attention_layers import AttentionSite
from ropemods.model.rope_tables import Table
from ropemods.model.wrappers import base_model
from ropemods.mods.base import Layout


@dataclass(frozen=True)
class Observation:
    """A model opened for observation, and what is known of its attention."""

    model: PreTrainedModel
    sites: tuple[AttentionSite, ...]
    """Of the attention layers, in order of depth."""
    names: tuple[str, ...]
    """Of the same layers, as in `named_modules`."""
    backend: str
    """The attention path that runs."""
    layout: Layout | None
    """How rotary channels are paired; None without rotation, or where the pairing is not known."""
    notes: tuple[str, ...]

    @property
    def tables(self) -> tuple[Table | None, ...]:
        """The frequency table of each layer; None for a layer without one."""
        return tuple(site.table for site in self.sites)


@contextlib.contextmanager
def observing(model: nn.Module) -> Iterator[Observation]:
    """Open, `interface.observed` sees every attention layer of the model, which runs in evaluation mode."""
    inner = base_model(model)
    modified = getattr(inner, "ropemods_attached", None) is not None
    if modified:
        unchanged.check(inner)
    known = {id(module): set(vars(module)) for module in inner.modules()}
    anatomy = anatomy_of(inner)
    configs = {id(layer.config): layer.config for layer in anatomy.layers}.values()
    before = [config._attn_implementation_internal for config in configs]
    try:
        sites, asked = anatomy.sites, attention_function.backend_of(inner)
        backend, notes = asked, []
        if asked not in attention_function.BACKENDS:
            backend = "sdpa" if inner._supports_sdpa else "eager"
            notes.append(
                f"the model runs with attn_implementation={asked!r} and was measured on {backend!r}: how attention is "
                "computed does not change which logits a model has"
            )
        for config in configs:
            config._attn_implementation_internal = attention_function.PREFIX + backend
        with short_pass.quietly(inner):
            layout = sites[0].layout or short_pass.layout(inner)
            yield Observation(inner, tuple(sites), anatomy.names, backend, layout, tuple(notes))
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation_internal = implementation
        if not modified:
            _forget(inner, known)


def _forget(model: PreTrainedModel, known: dict[int, set[str]]) -> None:
    """Take off what preparing the sites has put on a stock model (a longrope's second table is made on first use)."""
    for module in model.modules():
        for name in set(vars(module)) - known[id(module)]:
            if name.startswith("ropemods_") or name.endswith("long_inv_freq"):
                delattr(module, name)
