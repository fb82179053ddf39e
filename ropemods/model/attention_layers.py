"""The attention layers of a model, found by what their code does rather than by the model's name."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ropemods.model.bos import Bos
from ropemods.model.rope_tables import Table
from ropemods.mods.base import Call, Layout, Stage


class Stages(nn.Module):
    """The stages at one place of the model, as the submodule named `ropemods`, which is what PEFT is asked to save.

    A plain module: PEFT wraps it whole in `modules_to_save`, and the wrapper is called in its stead.
    """

    def add(self, kind: str, stage: Stage) -> None:
        self.add_module(kind, stage)

    def stages(self) -> Iterator[tuple[str, Stage]]:
        for kind, stage in self.named_children():
            assert isinstance(stage, Stage)
            yield kind, stage

    def forward(self, value, *context, place: str = "rows"):
        for stage in self.children():
            if stage.active and stage.place == place:
                value = stage(value, *context)
        return value


@dataclasses.dataclass
class AttentionSite:
    """What the attention function needs to know of the layer that calls it; kept on the layer as `ropemods_site`."""

    layer: int
    table: Table | None
    layout: Layout | None = None
    kinds: tuple[str, ...] = ()
    """The modifications with a stage here."""
    heads: int = 0
    rotated: bool = True
    """Whether a table turns this layer's queries; NoPE layers have none that does."""
    direction: float = 1.0
    """1 where queries turn counterclockwise, -1 where the model's convention is the other one."""
    dropout: float = 0.0
    """Of attention weights, as the layer asks for it in training."""
    untrainable: str | None = None
    """Why the path that would run cannot train the rows that the modifications make here; None where it can."""
    active: bool = False
    """Whether any stage of this layer is at a strength above 0."""
    listeners: list[Callable[[Any], None]] = dataclasses.field(default_factory=list)
    """Shown every attention call of this layer (`interface.asked`)."""
    observers: list[tuple[Callable[..., Any], bool]] = dataclasses.field(default_factory=list)
    """Shown the rows of every call, and whether each wants to know the rows' denominators (`interface.observed`)."""

    def call(
        self, bos: Bos | None, keys: int, shared: dict[str, Tensor] | None, hidden_BTC: Tensor | None = None
    ) -> Call:
        inv_freq = None
        if self.table is not None and self.layout is not None:
            live = self.table.live()
            inv_freq = live if self.direction > 0 else -live
        if bos is None:
            return Call(inv_freq_F=inv_freq, layout=self.layout, shared=shared or {}, hidden_BTC=hidden_BTC)
        # Once a windowed cache has begun to forget, the keys are the last of the tokens seen.
        forgotten = bos.seen - keys
        forgotten = forgotten.clamp(min=0) if isinstance(forgotten, Tensor) else max(forgotten, 0)
        return Call(
            bos_column_BN=bos.column_BN - forgotten,
            bos_distance_BT=bos.distance_BT,
            bos_is_self_BT=bos.is_self_BT,
            position_BT=bos.distance_BT + bos.position_BN,
            inv_freq_F=inv_freq,
            layout=self.layout,
            shared=shared or {},
            hidden_BTC=hidden_BTC,
        )


def attention_layers(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """(name, module) of every layer whose forward calls transformers' attention interface, in order of depth."""
    found = []
    for name, module in model.named_modules():
        if isinstance(getattr(module, "layer_idx", None), int) and _calls_interface(module):
            found.append((name, module))
    return sorted(found, key=lambda pair: pair[1].layer_idx)


def _calls_interface(module: nn.Module) -> bool:
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    if code is None or "ALL_ATTENTION_FUNCTIONS" not in code.co_names:
        return False
    if getattr(module, "is_cross_attention", None) is False:  # one class for both, and this is the other
        return True
    return not OTHER_KEYS & set(inspect.signature(forward).parameters)


OTHER_KEYS = {"cross_attention_states", "encoder_hidden_states", "key_value_states"}
"""Arguments of layers that attend to something else than the sequence itself, where there is no BOS and no RoPE."""


def entrances(model: PreTrainedModel) -> tuple[PreTrainedModel, ...]:
    """The modules that a forward pass is called by: the model, or the decoder inside it."""
    decoder = model.get_decoder()
    # A few models call their output layer the decoder.
    decoder = decoder if isinstance(decoder, PreTrainedModel) else model.base_model
    return tuple(dict.fromkeys((model, decoder)))


def site_of(module: nn.Module) -> AttentionSite | None:
    return getattr(module, "ropemods_site", None)


def heads_of(layer: nn.Module) -> int:
    """Query heads: the layer's own count where it keeps one, since a config's may differ by layer."""
    for name in ("num_heads", "num_attention_heads"):
        if isinstance(getattr(layer, name, None), int):
            return getattr(layer, name)
    return layer.config.num_attention_heads  # type: ignore[union-attr]


def head_dim_of(layer: nn.Module) -> int:
    """Channels of a head's value, and so of its output; what the dry run sees is held against it."""
    for name in ("v_head_dim", "head_dim", "head_size"):
        if isinstance(getattr(layer, name, None), int):
            return getattr(layer, name)
    config = layer.config
    own = getattr(config, "value_dim", None) or getattr(config, "head_dim", None)
    return own or config.hidden_size // heads_of(layer)  # type: ignore[union-attr]


def key_dim_of(layer: nn.Module) -> int:
    """Channels of a head's query and key, which may be other than those of its value."""
    for holder, name in ((layer, "qk_head_dim"), (layer, "head_dim"), (layer.config, "head_dim")):
        if isinstance(getattr(holder, name, None), int):
            return getattr(holder, name)
    return head_dim_of(layer)


def width_of(layer: nn.Module) -> int:
    """Channels of what the layer is given: some are handed more than the model's hidden state."""
    widths = (getattr(module, "in_features", None) for module in layer.modules())
    own = next((width for width in widths if isinstance(width, int)), None)
    return layer.config.hidden_size if own is None else own  # type: ignore[union-attr, return-value]


HIDDEN = "ropemods_hidden"
"""The keyword under which an attention layer hands what it was given down to its attention function."""


def hand_down(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[tuple[Any, ...], dict]:
    """A forward pre-hook of attention layers."""
    hidden_BTC = args[0] if args else keywords["hidden_states"]
    return args, keywords | {HIDDEN: hidden_BTC}
