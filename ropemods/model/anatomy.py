"""What a model is made of, as far as modifications go: looked at once, kept on the model, and read by all that follows.

What cannot be seen from outside, a forward pass shows (`dry_run`), and it is written on the layers' sites.
"""

from __future__ import annotations

import dataclasses

from torch import nn
from transformers import PreTrainedModel

from ropemods.model import rope_tables
from ropemods.model.attention_layers import AttentionSite, attention_layers, entrances, heads_of, site_of
from ropemods.model.rope_tables import Table


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """Kept on a model as `ropemods_anatomy`, for as long as it is modified or measured."""

    names: tuple[str, ...]
    """Of the attention layers, in order of depth."""
    layers: tuple[nn.Module, ...]
    """The attention layers, each with its site."""
    tables: tuple[Table, ...]
    """Every rotary frequency table."""
    entrances: tuple[PreTrainedModel, ...]
    """The modules that a forward pass is called by."""

    @property
    def sites(self) -> list[AttentionSite]:
        return [layer.ropemods_site for layer in self.layers]  # type: ignore[misc]


def survey(model: PreTrainedModel) -> Anatomy:
    """Look at a model as it is now; an error when it has no attention layer that can be reached."""
    found = attention_layers(model)
    if not found:
        raise ValueError(
            f"no attention layer of {type(model).__name__} goes through transformers' attention interface, so there is "
            "nothing to modify; models with their own attention code are not supported, nor frameworks that put theirs "
            "in its place, as unsloth does: load the model with transformers in a process without them"
        )
    names, layers = zip(*found, strict=True)
    tables = rope_tables.find(model)
    for layer, table in zip(layers, rope_tables.by_layer(tables, layers), strict=True):
        if (site := site_of(layer)) is None:
            layer.ropemods_site = AttentionSite(int(layer.layer_idx), table, heads=heads_of(layer))
        else:
            site.table = table
    model.ropemods_anatomy = Anatomy(names, layers, tuple(tables), entrances(model))
    return model.ropemods_anatomy


def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """What was seen of a model, or is seen now."""
    return getattr(model, "ropemods_anatomy", None) or survey(model)
