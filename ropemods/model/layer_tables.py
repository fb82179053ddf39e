"""Rotary tables edited for some layers only.

The model computes one table of cosines and sines for all its layers. Selected layers are handed those of a twin of the
rotary module instead, whose frequencies are the edited ones.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ropemods.model import rope_tables
from ropemods.model.anatomy import Anatomy
from ropemods.model.rope_tables import Table
from ropemods.mods import Mod
from ropemods.mods.base import edited


@dataclasses.dataclass
class Twins:
    """The twins of a model's rotary modules; kept on it as `ropemods_twins`."""

    tables: list[Table]
    active: bool = False


def tables(model: PreTrainedModel) -> list[Table]:
    return model.ropemods_twins.tables


def install(layers: Sequence[nn.Module]) -> list:
    """Hook the selected layers; returns what removes the hooks."""
    return [layer.register_forward_pre_hook(_substitute, with_kwargs=True) for layer in layers]


def build(model: PreTrainedModel, mod: Mod, anatomy: Anatomy) -> None:
    """Make the twins from the rotary modules as they are, and show them to the selected layers."""
    twins: dict[int, nn.Module] = {}
    made = []
    for table in anatomy.tables:
        twin = twins.setdefault(id(table.module), copy.deepcopy(table.module))
        made.append(Table(twin, table.prefix, dict(table.pristine), table.own_init, base=table))
    model.ropemods_twins = Twins(made)
    by_prefix = {table.prefix: table for table in made}
    for layer, site in zip(anatomy.layers, anatomy.sites, strict=True):
        if mod.selects(site.layer, len(anatomy.layers)) and site.table is not None:
            site.table = by_prefix[site.table.prefix]
            layer.ropemods_twins = model.ropemods_twins


def write(model: PreTrainedModel, mod: Mod, alpha: float) -> None:
    """Edit the tables of the selected layers; at 0 these layers are handed the model's own."""
    model.ropemods_twins.active = alpha > 0
    edits = [(mod, alpha)] if alpha > 0 else []
    for table in tables(model):
        table.write(partial(edited, edits=edits) if edits else None)
        if "dynamic" in table.rope_type:  # it makes its frequencies anew as sequences grow, from its config
            config = table.module.config  # the twin's own
            config.rope_parameters = rope_tables.described(config.rope_parameters, table.layer_type, edits)


def _substitute(layer: nn.Module, args: tuple, kwargs: dict[str, Any]):
    twins = getattr(layer, "ropemods_twins", None)
    if twins is None or not twins.active:
        return None
    if kwargs.get("position_embeddings") is None or kwargs.get("position_ids") is None:
        raise ValueError(
            f"{type(layer).__name__} is not handed its rotary tables and positions by the model, so a selection of "
            "layers cannot be given others; change the frequencies of all layers, or leave that modification out"
        )
    hidden = args[0] if args else kwargs["hidden_states"]
    table = layer.ropemods_site.table
    typed = {} if table.layer_type is None else {"layer_type": table.layer_type}
    return args, kwargs | {"position_embeddings": table.module(hidden, kwargs["position_ids"], **typed)}
