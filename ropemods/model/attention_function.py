"""The attention function that modified layers call, registered with transformers under `ropemods+<backend>`.

It is registered with the mask function of the backend under the same name: without that, transformers drops the
padding mask without a word. A layer with nothing active is handed to the stock function, so it is bitwise stock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ropemods.attention import autocast, eager, sdpa
from ropemods.attention.rows import Rows, shown
from ropemods.attention.terms import Slot
from ropemods.model.attention_layers import HIDDEN, AttentionSite, site_of
from ropemods.model.layer_losses import PASS, Pass
from ropemods.model.model_inputs import BOS, SHARED
from ropemods.mods.base import Call

PREFIX = "ropemods+"
BACKENDS = ("eager", "sdpa")


class _Implementation(str):
    """`ropemods+<backend>`, which code that asks whether the backend is this one or that takes for the backend.

    Layers that build their own mask (sparse attention) ask so before they call the interface by the same name.
    """

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or self.removeprefix(PREFIX) == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__  # of the name it is registered under


@dataclasses.dataclass
class Asked:
    """One attention call as a layer made it."""

    backend: str
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    options: dict[str, Any]

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    @property
    def own_options(self) -> dict[str, Any]:
        """What the layer said beside q, k and v, without what ropemods put in."""
        own = {name: value for name, value in self.options.items() if name not in (BOS, SHARED, HIDDEN)}
        mask = self.mask
        if mask is not None and mask.dtype in (torch.float16, torch.bfloat16):
            mask = mask.float()
        return own | {"attention_mask": mask}


Observer = Callable[[AttentionSite, Rows, Call, Tensor | None], Tensor | None]
"""Called with each layer's rows as its kernel sees them, and the log of each row's denominator (B, H, T). What it
returns, if anything, is added to the heads' output (B, H, T, D): an intervention."""


def backend_of(model: PreTrainedModel) -> str:
    """The attention implementation of the model without our prefix."""
    return (model.config._attn_implementation or "eager").removeprefix(PREFIX)


def use_interface(model: PreTrainedModel, layers: Sequence[nn.Module]) -> str:
    """Send the attention layers through ropemods, on the backend the model has; returns that backend."""
    backend = backend_of(model)
    if backend not in BACKENDS:
        raise ValueError(
            f"modifications of attention scores run on {' and '.join(BACKENDS)}, and this model was loaded with "
            f"attn_implementation={backend!r}; load it with attn_implementation='sdpa', which uses the fused kernels "
            "of this machine"
        )
    _name(layers, backend)
    return backend


def _name(layers: Sequence[nn.Module], backend: str) -> None:
    name = PREFIX + backend
    implementation = _Implementation(name) if any(_asks_by_name(type(layer)) for layer in layers) else name
    for config in {id(layer.config): layer.config for layer in layers}.values():
        config._attn_implementation_internal = implementation


def _asks_by_name(cls: type[nn.Module]) -> bool:
    """Whether the code of a layer compares the attention implementation with a backend's name."""
    code = getattr(inspect.unwrap(cls.forward), "__code__", None)
    if code is None or "_attn_implementation" not in code.co_names:
        return False
    return any(c in BACKENDS or (isinstance(c, tuple | frozenset) and set(BACKENDS) & set(c)) for c in code.co_consts)


@contextlib.contextmanager
def passing(layers: Sequence[nn.Module]) -> Iterator[None]:
    """While open, every attention layer calls ropemods' function, also where nothing acts on its scores."""
    configs = list({id(layer.config): layer.config for layer in layers}.values())
    before = [config._attn_implementation_internal for config in configs]
    asked_for = (configs[0]._attn_implementation or "eager").removeprefix(PREFIX)
    _name(layers, asked_for if asked_for in BACKENDS else "eager")
    try:
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation_internal = implementation


@contextlib.contextmanager
def asked(model: nn.Module, listener: Callable[[Asked], None]) -> Iterator[None]:
    """While open, `listener` is shown every attention call of a model (or of one layer) before it is answered."""
    sites = _sites(model)
    for site in sites:
        site.listeners.append(listener)
    try:
        yield
    finally:
        for site in sites:
            site.listeners.remove(listener)


def _sites(model: nn.Module) -> list[AttentionSite]:
    sites = [site for module in model.modules() if (site := site_of(module)) is not None]
    if not sites:
        raise ValueError(
            f"the attention layers of this {type(model).__name__} have not been prepared to be listened to"
        )
    return sites


def use_stock(layers: Sequence[nn.Module]) -> None:
    """Give the attention layers back to transformers."""
    for config in {id(layer.config): layer.config for layer in layers}.values():
        config._attn_implementation_internal = (config._attn_implementation or "eager").removeprefix(PREFIX)


def leave(layers: Sequence[nn.Module]) -> None:
    """Give the attention layers back to transformers, unless modifications of scores still need them."""
    if not any(site_of(layer) is not None and site_of(layer).kinds for layer in layers):  # type: ignore[union-attr]
        use_stock(layers)


@contextlib.contextmanager
def observed(observer: Observer, *, of: nn.Module, want_lse: bool) -> Iterator[None]:
    """While open, `observer` sees every attention call of the model `of` that goes through ropemods."""
    entry, sites = (observer, want_lse), _sites(of)
    for site in sites:
        site.observers.append(entry)
    try:
        yield
    finally:
        for site in sites:
            site.observers.remove(entry)


def stock(backend: str, layer: nn.Module) -> Callable:
    """The attention function that the layer would call without ropemods."""
    if backend == "eager":
        # Eager attention is each modeling file's own function; subclasses made on the fly (FSDP) live elsewhere.
        for cls in type(layer).__mro__:
            function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
            if function is not None:
                return function
        raise ValueError(f"{type(layer).__name__} has no eager attention in its module")
    return ALL_ATTENTION_FUNCTIONS[backend]


def _attention(
    backend: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    this: Pass | None = kwargs.pop(PASS, None)
    site = site_of(module)
    for listener in () if site is None else site.listeners:
        options = {"scaling": scaling, "dropout": dropout} | kwargs
        listener(Asked(backend, module, query, key, value, attention_mask, options))
    bos, shared, hidden = kwargs.pop(BOS, None), kwargs.pop(SHARED, None), kwargs.pop(HIDDEN, None)
    if site is None or not (site.active or site.observers):
        own = stock(backend, module)
        if this is not None:
            query, key = _through(
                this, backend, module, query, key, value, attention_mask=attention_mask, scaling=scaling, **kwargs
            )
        return own(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)

    query, key, value = autocast.cast(query, key, value)
    with autocast.suspended(query.device):
        rows = rows_of(
            backend,
            module,
            query,
            key,
            value,
            attention_mask=attention_mask,
            scaling=scaling,
            dropout=dropout,
            **kwargs,
        )
        call = site.call(bos, rows.k_BGSD.shape[2], shared, hidden)
        if site.active:
            rows = module.ropemods(rows, call)
        if this is not None:
            attend = eager if backend == "eager" else sdpa
            rows = this.through(module, attend.tempered(rows))
        return _attend(backend, module, rows, call)


@torch.compiler.disable
def _through(
    this: Pass, backend: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """Queries and keys of a layer without modifications, with the node that brings a penalty's gradient."""
    rows = this.through(module, rows_of(backend, module, query, key, value, **options))
    return rows.q_BHTD, rows.k_BGSD


def rows_of(
    backend: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> Rows:
    """What the layer asks for, with nothing added."""
    if kwargs.get("position_bias") is not None:
        raise ValueError(
            f"{type(module).__name__} adds a position bias to its logits, which the modifications would drop; "
            "models with additive position biases are not supported"
        )
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    # As in transformers: without a mask, more than one query means the causal pattern, except on the eager path.
    causal = backend != "eager" and query.shape[2] > 1 and attention_mask is None and causal
    if causal and key.shape[2] > query.shape[2]:  # prefill of an empty static cache
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    return Rows(
        query,
        key,
        value,
        mask=attention_mask,
        causal=causal,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=kwargs.get("softcap"),
        dropout=dropout,
        slots=_native_slots(backend, module, kwargs),
    )


def _native_slots(backend: str, module: nn.Module, options: dict[str, Any]) -> tuple[Slot, ...]:
    """The model's own sinks, one a head: handed over, or read from the layer by its eager function."""
    sinks = options.get("s_aux")
    if sinks is None and backend == "eager":
        sinks = getattr(module, "sinks", None)
    return () if sinks is None else (Slot(sinks),)


def _attend(backend: str, module: nn.Module, rows: Rows, call: Call) -> tuple[Tensor, Tensor | None]:
    site = site_of(module)
    assert site is not None
    attend = eager if backend == "eager" else sdpa
    if backend != "eager" and rows.entropy_scale is not None and _weighs(rows.mask):
        # The fused entropy knows a mask that hides keys, not one that adds to their logits.
        rows = eager.tempered(rows)
    if site.observers:
        rows = attend.tempered(rows)
    want_lse = any(wanted for _, wanted in site.observers)
    weights = None
    if backend == "eager":
        out, weights, lse = eager.attend(rows, training=module.training)
    else:
        out, lse = sdpa.attend(rows, want_lse=want_lse)
    for observer, _ in site.observers:
        change = observer(site, rows, call, lse)
        out = out if change is None else out + change
    if site.active:
        out = module.ropemods(out, call, place="output")
    return out.transpose(1, 2).contiguous(), weights


def _weighs(mask: Tensor | None) -> bool:
    """Whether an additive mask does more than hide keys."""
    if mask is None or mask.dtype == torch.bool:
        return False
    if is_compiling() or mask.is_inference():  # neither can be remembered by its version
        return is_compiling() or _adds(mask)
    # The answer waits for the device, so it is asked once for the mask that all layers of a pass share.
    known: tuple[int, bool] | None = getattr(mask, "ropemods_weighs", None)
    if known is None or known[0] != mask._version:
        known = mask._version, _adds(mask)
        mask.ropemods_weighs = known  # type: ignore[attr-defined]
    return known[1]


def _adds(mask: Tensor) -> bool:
    return bool(((mask != 0) & shown(mask)).any())


MASKS = {"eager": eager_mask, "sdpa": sdpa_mask}
for _backend in BACKENDS:
    AttentionInterface.register(PREFIX + _backend, functools.partial(_attention, _backend))
    AttentionMaskInterface.register(PREFIX + _backend, MASKS[_backend])
