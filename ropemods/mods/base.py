"""What a modification is: a frozen description, and the stages that act for it at run time.

A `Mod` is data: validated when made, written to JSON, compared by value. It may act in these places, and implements
the method of each place it acts in:

- `frequencies`     on the rotary frequencies of the model,
- `embedding_stage` on the output of the input embedding,
- `stage`           on one attention layer: its stage adds terms to softmax rows (`ropemods.attention.terms`), or it
                    changes the heads' output.

A `Stage` is a small torch module that owns what trains and a strength from 0 (the stock model) to 1 (the full
modification). At exactly 0 it is inactive and is not called at all.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ropemods.attention.plain_row import PlainRow
from ropemods.attention.rows import Rows
from ropemods.mods.values import held_to


class Layout(NamedTuple):
    """How a model pairs the channels it rotates."""

    interleaved: bool
    """Pairs (2f, 2f + 1) if true, (f, f + F) if false."""
    start: int
    """First rotated channel of the head."""


class Call(NamedTuple):
    """What a stage may know of the attention call beside its rows."""

    bos_column_BN: Tensor | None = None
    """Column, among the keys of this call, of each query's BOS; one a row (N = 1) or one a query (N = T). Negative
    where the BOS has left the cache of a windowed layer, or no sequence has begun."""
    bos_distance_BT: Tensor | None = None
    """Position of the query minus the position of its BOS."""
    bos_is_self_BT: Tensor | None = None
    """True where a query is itself the BOS."""
    position_BT: Tensor | None = None
    """Of each query, as the rotary tables count positions; known where the BOS is."""
    inv_freq_F: Tensor | None = None
    layout: Layout | None = None
    shared: dict[str, Tensor] = {}
    hidden_BTC: Tensor | None = None
    """What the layer was given, where a stage of it `needs_hidden`."""


@dataclasses.dataclass(frozen=True)
class Table:
    """The input embedding, as far as a stage needs it. Not the module itself: what moves a module's inputs to a device,
    as offloading does, would move its weights."""

    tokens: int
    embed: Callable[[Tensor], Tensor]


class Site(NamedTuple):
    """One attention layer, as far as a stage needs to know it."""

    layer: int
    heads: int
    head_dim: int
    """Of values, which is that of the heads' output."""
    hidden: int
    """Channels of what the layer is given."""
    key_dim: int
    """Of queries and keys."""


class Stage(nn.Module):
    """A modification at work in one place. Subclasses define `forward(value, call)`; those of attention layers, what
    they do to one row in `naive` as well, which is what they are tested against."""

    strength: Tensor
    place: ClassVar[Literal["rows", "output"]] = "rows"
    """Of an attention layer's stage: whether `forward` is given rows or the heads' output (B, H, T, D)."""
    since_version: ClassVar[dict[str, int]] = {}
    """Buffers that only checkpoints from some version of the record on have; read from older ones, they are zero."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("strength", torch.zeros((), dtype=torch.float32), persistent=False)
        self.alpha = 0.0
        self.active = False

    def set_strength(self, alpha: float) -> None:
        self.alpha, self.active = alpha, alpha > 0
        if not self.strength.is_meta:
            self.strength.fill_(alpha)

    @torch.no_grad()
    def fill_missing(self, version: int) -> list[str]:
        """Zero in the buffers that a checkpoint of that version does not have; returns their names."""
        missing = [name for name, since in self.since_version.items() if version < since]
        for name in missing:
            getattr(self, name).zero_()
        return missing

    def keep_as_of(self, version: int) -> None:
        """Let state dicts hold what checkpoints of that version have."""
        for name, since in self.since_version.items():
            self.register_buffer(name, getattr(self, name), persistent=version >= since)

    def fill_constants(self) -> None:
        """Give the values that no checkpoint holds; for stages that were built without memory and then loaded."""
        self.set_strength(self.alpha)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        # Half precision would round the strength; it stays what it was set to.
        self.strength = self.strength.to(torch.float32)
        self.set_strength(self.alpha)
        return self

    def naive(self, row: PlainRow, call: Call) -> None:
        """What it does to one row that is written out, its output included."""
        raise NotImplementedError(f"{type(self).__name__}.naive: what it does to one row, by the formula")

    def allocate(self, embedding: nn.Module) -> None:
        """At the input embedding: make room for what it holds of it; values come from `measure` or a checkpoint."""

    def measure(self, embedding: nn.Module) -> None:
        """At the input embedding: take from it what it needs; called once, when the modification is applied."""

    def learned(self) -> str | None:
        """What training or calibration has made of it, in a few words and numbers, for a summary."""
        return None

    def read_bos(self, rows: Rows, call: Call) -> None:
        """Take initial values from the stock model's pass over the BOS token alone, where the modification
        `copies_bos`."""

    def calibrate(self, rows: Rows, call: Call) -> None:
        """Choose initial values from a batch that the stock model has read; most stages have none to choose."""

    def distilled(self) -> list[nn.Parameter]:
        """The numbers that are fitted to the model's own output on a batch, where the modification `distils`."""
        return []

    def settle(self) -> None:
        """Take what was fitted as the start, from which training departs."""


class SharedParameter(Stage):
    """One parameter for the whole model, handed to its layers with each call under the modification's kind."""

    def __init__(self, kind: str, name: str, *shape: int) -> None:
        super().__init__()
        self.kind, self.name = kind, name
        self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def forward(self, shared: dict[str, Tensor], _: Call) -> dict[str, Tensor]:
        # A copy, because a partitioned parameter is gone once this module returns.
        return shared | {self.kind: self.get_parameter(self.name).clone()}


@dataclasses.dataclass(frozen=True)
class Mod:
    """A modification, described. `layers` selects attention layers by index (negative from the end); None means all."""

    kind: ClassVar[str]
    always_shown: ClassVar[tuple[str, ...]] = ()
    """Options that are named even at their defaults."""

    layers: tuple[int, ...] | None = dataclasses.field(
        default=None, kw_only=True, metadata={"words": "a list of layer indices"}
    )

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            name, words = f"{self.kind}: {field.name}", field.metadata.get("words")
            value = held_to(hints[field.name], getattr(self, field.name), name, words=words)
            object.__setattr__(self, field.name, value)
        if self.layers == ():
            raise ValueError(f"{self.kind}: layers is empty, so nothing would change; leave it out for all layers")

    @property
    def needs_bos(self) -> bool:
        """Whether sequences without a BOS token must be refused."""
        return False

    @property
    def has_parameters(self) -> bool:
        """Whether it has parameters of its own."""
        return False

    @property
    def calibrates(self) -> bool:
        """Whether it chooses initial values from a calibration batch."""
        return False

    @property
    def distils(self) -> bool:
        """Whether it fits initial values to the model's own output on that batch."""
        return False

    @property
    def copies_bos(self) -> bool:
        """Whether it takes initial values from what the model makes of the BOS token, which needs no text."""
        return False

    @property
    def must_be_saved(self) -> bool:
        """Whether it holds what putting it on the base model again would not bring back."""
        return self.has_parameters or self.calibrates or self.copies_bos

    def gentler(self) -> tuple[Mod, ...]:
        """Forms of it that may cost an untrained model less, for `apply` to try on a calibration batch."""
        return ()

    @classmethod
    def worth_trying(cls) -> tuple[Mod, ...]:
        """Settings that `suggest(..., trying=True)` tries on a model; the defaults, where they make a modification."""
        try:
            return (cls(),)
        except (TypeError, ValueError):
            return ()

    @classmethod
    def timed(cls) -> dict[str, tuple[Mod, ...]]:
        """Settings that `ropemods bench` times, by the name they go under there; the first that is worth trying, or the
        defaults. It leaves out what does not act on an attention call."""
        try:
            return {cls.kind.replace("_", " ").replace("bos", "BOS"): cls.worth_trying()[:1] or (cls(),)}
        except (TypeError, ValueError):
            return {}

    @property
    def needs_layout(self) -> bool:
        """Whether the stage rotates queries itself and so must know how the model pairs channels."""
        return False

    @property
    def needs_hidden(self) -> bool:
        """Whether its stage reads what its attention layer is given."""
        return False

    @property
    def zeroes_states(self) -> bool:
        """Whether a position may be exactly zero in every layer, where backpropagation multiplies zero by infinity."""
        return False

    @property
    def closes_bos(self) -> bool:
        """Whether later queries, at strength 1, no longer read the BOS column in the layers it acts on."""
        return False

    def conflict(self, others: Sequence[Mod], layer_count: int) -> str | None:
        """Why this modification cannot stand beside these others; None when it can."""
        return None

    def export_obstacle(self) -> str | None:
        """Why no stock checkpoint can hold it; None when one may."""
        if type(self).stage is not Mod.stage:
            return "it acts on attention scores, which a stock model computes as it always has"
        if type(self).embedding_stage is not Mod.embedding_stage:
            return "it acts on what the input embedding gives, by a rule that no row of a stock embedding holds"
        if self.for_some_layers:
            return "it acts on some layers only, and a stock config has one set of frequencies for all"
        return None

    def stock_entries(self, config: Any, layer_count: int) -> dict[str, Any]:
        """Entries of a stock config by which a stock model does the same at strength 1; none where there are none. What
        they give is compared with this model before it is written."""
        return {}

    @property
    def for_some_layers(self) -> bool:
        """Whether it chooses among the attention layers, by `layers` or in a way of its own (`selects`)."""
        return self.layers is not None

    def selects(self, layer: int, layer_count: int) -> bool:
        return self.layers is None or layer in {index % layer_count for index in self.layers}

    def acts_on(self, layer_count: int) -> set[int]:
        """The layers it selects of a model that has so many."""
        return {layer for layer in range(layer_count) if self.selects(layer, layer_count)}

    @property
    def edits_frequencies(self) -> bool:
        return type(self).frequencies is not Mod.frequencies

    @property
    def share_kept(self) -> float | None:
        """The share of the frequencies, from the highest down, beside which all stop turning at strength 1, where that
        is what it does: transformers has a word for it."""
        return None

    def to_json(self) -> dict[str, Any]:
        """The kind and every option, defaults too: a checkpoint must not change when a default does.

        Of a class from outside the package also its place, so that who cannot read the record is told what to import.
        """
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        own = type(self)
        place = {} if own.__module__.startswith("ropemods.") else {"class": f"{own.__module__}:{own.__qualname__}"}
        return {"kind": self.kind} | place | {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}

    def __str__(self) -> str:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        shown = [f"{k}={v!r}" for k, v in values.items() if k in self.always_shown or v != defaults[k]]
        return f"{type(self).__name__}({', '.join(shown)})"

    # The places. A modification overrides those it acts in.

    def frequencies(self, inv_freq_F: Tensor, alpha: float) -> Tensor:
        """The rotary frequencies at strength alpha."""
        return inv_freq_F

    def stage(self, site: Site) -> Stage | None:
        """The stage for one attention layer; None when the modification does not act there."""
        return None

    def shared_stage(self) -> Stage | None:
        """A stage owned by the whole model, called once a forward pass to put a value in `Call.shared`."""
        return None

    def embedding_stage(self, bos_token_id: int | None) -> Stage | None:
        """The stage for the input embedding, None when the modification leaves it alone: `forward` is given what the
        embedding gives, the token ids and a `Table`. A token is given where a modification `needs_bos`."""
        return None


Edits = Sequence[tuple[Mod, float]]
"""Changes of the rotary frequencies, each with its strength; each acts on what the one before it gives."""


def edited(inv_freq_F: Tensor, edits: Edits) -> Tensor:
    """The frequencies after all of these changes."""
    for mod, alpha in edits:
        inv_freq_F = mod.frequencies(inv_freq_F, alpha)
    return inv_freq_F
