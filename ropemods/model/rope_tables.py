"""Rotary frequency tables: finding them, editing them, and learning how a model pairs the channels it rotates.

Every model on transformers' shared RoPE initialisation keeps its frequencies in buffers of a `…RotaryEmbedding`
module: `inv_freq`, a pristine `original_inv_freq`, and for longrope a `long_inv_freq` it swaps in. Models with several
kinds of layer prefix them with the layer type.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ropemods.mods import Mod, mod_from_json
from ropemods.mods.base import Edits, Layout, edited
from ropemods.mods.bos_column import turned_back

KEPT = "ropemods_stock_"
BUFFERS = ("inv_freq", "original_inv_freq", "long_inv_freq")
SENTINEL = "ropemods"
"""The rope type of a checkpoint that stock transformers must refuse to load."""
DYNAMIC = "ropemods_dynamic"
"""The rope type of an edited table over a dynamic base. Dynamic tables recompute themselves as sequences grow, through
the init function of their type; the word "dynamic" in the name is what makes transformers do so."""

Edit = Callable[[Tensor], Tensor]


@dataclasses.dataclass
class Table:
    """One frequency table of one rotary module. `pristine` holds its buffers as they were found on the stock model."""

    module: nn.Module
    prefix: str
    pristine: dict[str, Tensor]
    own_init: Callable | None = None
    """The module's init function, where its forward calls it anew in each pass and so never reads the buffers."""
    base: Table | None = None
    """The table of the model that this one is a twin of."""

    @property
    def layer_type(self) -> str | None:
        return self.prefix.removesuffix("_") or None

    def live(self) -> Tensor:
        return getattr(self.module, f"{self.prefix}inv_freq")

    def keep(self) -> None:
        """Let copies of the pristine buffers stand beside them, so that a cast of the model rounds both alike."""
        for name, value in self.pristine.items():
            if name in self.module._buffers:
                self.module.register_buffer(KEPT + name, value.clone(), persistent=False)

    def stock(self) -> dict[str, Tensor]:
        """The buffers as the stock model has them now: `half().float()` leaves a table rounded."""
        module = self.module if self.base is None else self.base.module
        return {name: getattr(module, KEPT + name, value) for name, value in self.pristine.items()}

    def release(self) -> None:
        for name in [name for name in self.module._buffers if name.startswith(KEPT)]:
            delattr(self.module, name)

    @property
    def rope_type(self) -> str:
        kind = getattr(self.module, "rope_type", "default")
        return kind[self.layer_type] if isinstance(kind, dict) else kind

    @rope_type.setter
    def rope_type(self, kind: str) -> None:
        if isinstance(self.module.rope_type, dict):
            self.module.rope_type[self.layer_type] = kind
        else:
            self.module.rope_type = kind

    @torch.no_grad()
    def write(self, edit: Edit | None) -> None:
        """Set every buffer to the edited pristine one; None restores them."""
        for name, stock in self.stock().items():
            buffer = getattr(self.module, name)
            value = stock if edit is None else edit(stock)
            if buffer.shape == value.shape:
                buffer.copy_(value)
            else:  # a dynamic table may have been replaced
                setattr(self.module, name, value.to(buffer.device))
        if self.own_init is not None:
            self.module.rope_init_fn = self.own_init if edit is None else partial(_init_edited, self.own_init, edit)
        if "dynamic" in self.rope_type:
            self.rope_type = "dynamic" if edit is None else DYNAMIC
            # The buffers are again those of short sequences; a long one must make them anew, as if it were the first.
            setattr(self.module, f"{self.prefix}max_seq_len_cached", self.module.original_max_seq_len)


def _init_edited(init: Callable, edit: Edit, *args: Any, **kwargs: Any) -> tuple[Tensor, float]:
    inv_freq, scaling = init(*args, **kwargs)
    return edit(inv_freq), scaling


def sentinel(stock: dict[str, Any], edits: Edits) -> dict[str, Any]:
    """Rope parameters that stock transformers refuses, with everything needed to undo and redo them inside."""
    inside: dict[str, Any] = {"rope_type": stock.get("rope_type", "default")}
    if edits:
        inside["frequencies"] = [{"mod": mod.to_json(), "strength": alpha} for mod, alpha in edits]
    return stock | {"rope_type": SENTINEL, "ropemods": inside}


def edits_inside(inside: dict[str, Any]) -> list[tuple[Mod, float]]:
    """The changes of frequencies that a sentinel describes."""
    described = inside.get("frequencies", [])
    if isinstance(described, dict):  # as version 0.1.0 wrote it, for one change
        described = [{"mod": described, "strength": inside["strength"]}]
    return [(mod_from_json(each["mod"]), each["strength"]) for each in described]


def without_sentinel(parameters: dict[str, Any]) -> dict[str, Any]:
    """Rope parameters with the stock type where the sentinel stands."""
    if "ropemods" in parameters:
        stock = {k: v for k, v in parameters.items() if k != "ropemods"}
        return stock | {"rope_type": parameters["ropemods"]["rope_type"]}
    return {k: without_sentinel(v) if isinstance(v, dict) else v for k, v in parameters.items()}


def described(parameters: dict[str, Any], layer_type: str | None, edits: Edits) -> dict[str, Any]:
    """Rope parameters, with or without a sentinel, with one that describes these edits of one table."""
    part = without_sentinel(parameters if layer_type is None else parameters[layer_type])
    part = sentinel(part, edits) if edits else part
    return part if layer_type is None else parameters | {layer_type: part}


def _refuse(config, *args, **kwargs):
    """The init function under the sentinel's name, for stock loading in a process that has imported ropemods."""
    raise ValueError(
        "this checkpoint holds modifications that stock transformers cannot run, so loading it here would give the "
        "unmodified model; load it with ropemods.from_pretrained(path)"
    )


def _dynamic(config, device=None, seq_len=None, layer_type=None, **kwargs):
    """The stock dynamic frequencies for this length, edited as the config says."""
    parameters = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
    inv_freq, scaling = ROPE_INIT_FUNCTIONS["dynamic"](config, device, seq_len=seq_len, layer_type=layer_type, **kwargs)
    return edited(inv_freq, edits_inside(parameters["ropemods"])), scaling


ROPE_INIT_FUNCTIONS[SENTINEL] = _refuse
ROPE_INIT_FUNCTIONS[DYNAMIC] = _dynamic


def find(model: PreTrainedModel) -> list[Table]:
    """Every frequency table of the model, with its buffers as they are."""
    text = model.config.get_text_config(decoder=True)
    # Of the text part's kind: some models keep one module a base, each with a config of its own.
    return [
        Table(module, prefix, _pristine(module, prefix), _own_init(module))
        for module, prefix in _rotary_buffers(model)
        if type(getattr(module, "config", None)) is type(text)
    ]


def _rotary_buffers(model: PreTrainedModel) -> Iterator[tuple[Any, str]]:
    """Every rotary module, with the prefix of each frequency buffer it has."""
    for module in model.modules():
        if "RotaryEmbedding" not in type(module).__name__:
            continue
        for name, _ in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and not name.endswith("original_inv_freq") and not name.startswith(KEPT):
                yield module, name.removesuffix("inv_freq")


def _own_init(module: Any) -> Callable | None:
    """The init function that the module's forward calls in place of reading its buffer, if it does."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return module.rope_init_fn if code is not None and "rope_init_fn" in code.co_names else None


def lacking(model: PreTrainedModel) -> str:
    """Why there is no frequency table to modify, of a model in which none was found."""
    name, others = type(model).__name__, {type(module.config).__name__ for module, _ in _rotary_buffers(model)}
    if others:
        return (
            f"{name} has its rotary tables in parts with configs of their own ({', '.join(sorted(others))}), and a "
            "modification is recorded in one config's rope parameters; models made of several transformers are not "
            "supported"
        )
    return (
        f"{name} has no rotary frequency table (a …RotaryEmbedding module with inv_freq): it has no RoPE, or computes "
        "it by code of its own, so there is nothing to modify, and a checkpoint could not be told from a stock one"
    )


def _pristine(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    table = Table(module, prefix, {})
    loaded = not table.live().is_meta
    if loaded and table.rope_type == "longrope" and not hasattr(module, f"{prefix}long_inv_freq"):
        # longrope computes its long table on first use; computed now, it can be edited like the others.
        parameters = module.config.rope_parameters
        parameters = parameters if table.layer_type is None else parameters[table.layer_type]
        length = parameters["original_max_position_embeddings"] + 1
        long, _ = ROPE_INIT_FUNCTIONS["longrope"](
            module.config, table.live().device, seq_len=length, layer_type=table.layer_type
        )
        setattr(module, f"{prefix}long_inv_freq", long)
    names = [prefix + name for name in BUFFERS if isinstance(getattr(module, prefix + name, None), Tensor)]
    return {name: getattr(module, name).detach().clone() for name in names}


def by_layer(tables: Sequence[Table], layers: Sequence[nn.Module]) -> list[Table | None]:
    """The table each attention layer is rotated by; None for a layer without one."""
    by_prefix = {table.prefix: table for table in tables}
    if not by_prefix:
        return [None] * len(layers)
    if set(by_prefix) == {""}:
        return [by_prefix[""]] * len(layers)
    types = getattr(layers[0].config, "layer_types", None) or [""] * len(layers)
    return [by_prefix.get(f"{types[module.layer_idx]}_") for module in layers]


def find_layout(table: Table, first_queries: Callable[[], Tensor]) -> tuple[Layout, float] | None:
    """How a layer pairs channels and in which direction it turns them (1 or -1), found by turning known angles.

    `first_queries()` runs the layer and returns the queries (B, H, T, D) that it hands to its attention.
    """
    with frequencies(table, torch.zeros_like(table.live())):
        still = first_queries().double()
    count = table.live().shape[-1]
    angle = torch.linspace(0.3, 1.2, count, dtype=torch.float64, device=still.device)
    with frequencies(table, angle):
        turned = first_queries().double()
    dim = still.shape[-1]
    for interleaved in (False, True):
        for start in dict.fromkeys((0, dim - 2 * count)):
            layout = Layout(interleaved, start)
            for direction in (1.0, -1.0):
                # The second token stands at position 1, so it was turned by the frequencies themselves.
                back = turned_back(turned[:, :, 1], direction * angle, layout)
                error = (back - still[:, :, 1]).norm() / still[:, :, 1].norm()
                # Far above what bf16 rounds and far below what a wrong pairing gives (about 1).
                if error < 0.03:
                    return layout, direction
    return None


@contextlib.contextmanager
def frequencies(table: Table, value: Tensor) -> Iterator[None]:
    saved = {name: getattr(table.module, name).clone() for name in table.pristine}
    before = getattr(table.module, "rope_init_fn", None)
    try:
        for name in saved:
            getattr(table.module, name).copy_(value)
        if table.own_init is not None:
            table.module.rope_init_fn = partial(_init_edited, table.own_init, lambda _: value)
        yield
    finally:
        for name, tensor in saved.items():
            getattr(table.module, name).copy_(tensor)
        if table.own_init is not None:
            table.module.rope_init_fn = before
