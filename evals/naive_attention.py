"""Recorded attention calls of a model, and the modifications' formulas applied to them naively in fp64.

Whole score matrices, one modification at a time, the BOS in column 0: nothing here is shared with `ropemods.attention`
but the published polynomial of the temperature.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ropemods.attention.reference import temperature
from ropemods.mods import Mod

HIDDEN = -1e4
"""An additive mask below this hides the key."""


@dataclasses.dataclass
class Recorded:
    """What one attention layer handed to its attention function, and what it got back (B, T, H, D)."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    options: dict[str, Any]
    output: Tensor
    eager: bool


@contextlib.contextmanager
def recorded(model: PreTrainedModel) -> Iterator[list[Recorded]]:
    """Collect every call that goes through ropemods' attention functions while open."""
    calls: list[Recorded] = []
    stock = {name: ALL_ATTENTION_FUNCTIONS[name] for name in ("ropemods+eager", "ropemods+sdpa")}

    def recording(function, eager: bool):
        def record(module, query, key, value, attention_mask, *args, **options):
            output, weights = function(module, query, key, value, attention_mask, *args, **dict(options))
            given = dict(options)
            calls.append(Recorded(module, query, key, value, attention_mask, given, output, eager))
            return output, weights

        return record

    for name, function in stock.items():
        AttentionInterface.register(name, recording(function, name.endswith("eager")))
    try:
        yield calls
    finally:
        for name, function in stock.items():
            AttentionInterface.register(name, function)


@contextlib.contextmanager
def inputs_of(modules: list[nn.Module]) -> Iterator[list[tuple[nn.Module, tuple, dict[str, Any]]]]:
    """Collect what the modules are called with while open."""
    seen: list[tuple[nn.Module, tuple, dict[str, Any]]] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append((module, args, kwargs))

    handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def visible(call: Recorded) -> Tensor:
    """(…, T, S): True where a query may see a key."""
    queries, keys = call.query.shape[2], call.key.shape[2]
    if call.mask is not None:
        return call.mask if call.mask.dtype == torch.bool else call.mask > HIDDEN
    causal = call.options.get("is_causal")
    causal = getattr(call.module, "is_causal", True) if causal is None else causal
    everything = torch.ones(queries, keys, dtype=torch.bool)
    return everything.tril() if causal and queries > 1 else everything


def logits(call: Recorded, query: Tensor | None = None, key: Tensor | None = None) -> Tensor:
    """Scaled and soft-capped (B, H, T, S) in fp64."""
    query, key = (call.query if query is None else query).double(), (call.key if key is None else key).double()
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scale = call.options.get("scaling")
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    softcap = call.options.get("softcap")
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def bias(call: Recorded) -> Tensor | float:
    """What an additive mask adds to keys that are seen; most add nothing."""
    if call.mask is None or call.mask.dtype == torch.bool:
        return 0.0
    return call.mask.double().where(call.mask > HIDDEN, 0.0)


def attend(call: Recorded, mods: list[Mod], unrotated_BHT: Tensor | None = None) -> Tensor:
    """The output (B, T, H, D) of a call with full-strength modifications; BOS is key 0, and query 0 is the BOS.

    `unrotated_BHT` is the logit of the BOS column with nothing rotated, where `UnrotatedBos` is among them.
    """
    by_kind = {mod.kind: mod for mod in mods}
    scores, seen = logits(call), visible(call)
    if "unrotated_bos" in by_kind:
        scores = torch.cat((unrotated_BHT.double().unsqueeze(-1), scores[..., 1:]), -1)
    added = bias(call)
    scores = (scores + added).masked_fill(~seen, float("-inf"))
    native = call.options.get("s_aux")
    if native is None and call.eager:
        native = getattr(call.module, "sinks", None)
    extra = [] if native is None else [native.detach().double()]
    if "learned_sink" in by_kind:
        extra.append(call.module.ropemods.learned_sink.sink_H(torch.float64).detach())
        if not by_kind["learned_sink"].read_bos:
            scores[:, :, 1:, 0] = float("-inf")
    if "adaptive_temperature" in by_kind:
        log_p = torch.log_softmax(scores, -1)
        entropy = -(log_p.exp() * log_p.masked_fill(log_p == float("-inf"), 0)).nan_to_num(0).sum(-1)
        mod = by_kind["adaptive_temperature"]
        coefficients: Any = mod.coefficients
        if mod.trainable:
            unit = 4.412 ** -torch.arange(4, -1, -1, dtype=torch.float64)
            offsets = call.module.ropemods.adaptive_temperature.offsets.detach().double()
            coefficients = (torch.tensor(mod.coefficients, dtype=torch.float64) + offsets * unit).expand(
                scores.shape[1], -1
            )
        beta = temperature(entropy, coefficients=coefficients, beyond=mod.beyond).unsqueeze(-1)
        scores = (beta * (scores - added) + added).masked_fill(~seen, float("-inf"))
        if "learned_sink" in by_kind and not by_kind["learned_sink"].read_bos:
            scores[:, :, 1:, 0] = float("-inf")
    if extra:
        sinks = torch.stack([sink[None, :, None].expand(scores.shape[:3]) for sink in extra], -1)
        weights = torch.softmax(torch.cat((scores, sinks), -1), -1)[..., : scores.shape[-1]]
    else:
        weights = torch.softmax(scores, -1)
    value = call.value.double()
    value = value.repeat_interleave(scores.shape[1] // value.shape[1], dim=1)
    return (weights.nan_to_num(0) @ value).transpose(1, 2)
