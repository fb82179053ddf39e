"""Attention calls of a modified model, recomputed by the naive formulas of `ropemods.attention.reference`."""

from __future__ import annotations

import contextlib
import dataclasses

import torch
from torch import Tensor

from ropemods.attention import reference
from ropemods.model import attention_function
from ropemods.mods import Mod


@dataclasses.dataclass
class RecordedCall:
    """What one layer was given and what it gave."""

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    options: dict
    module: torch.nn.Module
    output: Tensor


@contextlib.contextmanager
def recorded(model):
    """Collect every attention call of the model while open."""
    calls: list[RecordedCall] = []
    backend = attention_function.backend_of(model)
    name = f"ropemods+{backend}"
    stock = attention_function.ALL_ATTENTION_FUNCTIONS[name]

    def record(module, query, key, value, attention_mask, **options):
        output, weights = stock(module, query, key, value, attention_mask, **dict(options))
        calls.append(RecordedCall(module.layer_idx, query, key, value, attention_mask, dict(options), module, output))
        return output, weights

    attention_function.AttentionInterface.register(name, record)
    try:
        yield calls
    finally:
        attention_function.AttentionInterface.register(name, stock)


def visible(call: RecordedCall) -> Tensor:
    """(B, T, S): what each query may see, from the mask the layer was given."""
    batch, _, queries, _ = call.query.shape
    keys = call.key.shape[2]
    if call.mask is None:
        seen = torch.ones(queries, keys, dtype=torch.bool)
        return (seen.tril() if queries > 1 else seen).expand(batch, queries, keys)
    mask = call.mask[:, 0]
    return (mask if mask.dtype == torch.bool else mask > -1e30).expand(batch, queries, keys)


def recompute(
    call: RecordedCall,
    mods: list[Mod],
    strength: float,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    layers: int,
    bos_BT: Tensor,
    rotary: tuple[Tensor, bool, int] | None,
) -> Tensor:
    """The layer's output (B, T, H, D) by the formulas, from fp64 query, key and value.

    `bos_BT` is the column of each query's BOS; `rotary` the frequencies, pairing and first channel of this layer.
    """
    by_kind = {mod.kind: mod for mod in mods if mod.selects(call.layer, layers)}
    options: dict = {}
    batch, heads, queries, _ = query.shape
    scale = call.options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    softcap = call.options.get("softcap")
    if "unrotated_bos" in by_kind:
        inv_freq, interleaved, start = rotary
        offset = torch.arange(queries) + (key.shape[2] - queries) - bos_BT
        logits = []
        for b in range(batch):
            for h in range(heads):
                group = h * key.shape[1] // heads
                for t in range(queries):
                    angle = -strength * offset[b, t].double() * inv_freq.double()
                    turned = reference.rotate(query[b, h, t], angle, interleaved=interleaved, start=start)
                    logit = scale * (turned * key[b, group, int(bos_BT[b, t])]).sum()
                    logits.append(logit if softcap is None else softcap * torch.tanh(logit / softcap))
        options["bos_logit_BHT"] = torch.stack(logits).view(batch, heads, queries)
    if "learned_sink" in by_kind:
        stage = call.module.ropemods.learned_sink
        options["sink_H"] = stage.sink_H(torch.float64)
        options["sink_weight"] = strength
        if not by_kind["learned_sink"].read_bos:
            index = torch.arange(queries) + (key.shape[2] - queries)
            options["bos_weight_BT"] = torch.where(index == bos_BT, 1.0, 1.0 - strength)
    if "adaptive_temperature" in by_kind:
        mod = by_kind["adaptive_temperature"]
        coefficients = torch.tensor(mod.coefficients, dtype=torch.float64)
        stage = call.module.ropemods.adaptive_temperature
        if mod.trainable == "shared":
            offsets = call.options["ropemods_shared"][mod.kind].double()
        else:
            offsets = stage.offsets.double() if mod.trainable else torch.zeros(1, 5, dtype=torch.float64)
        unit = 4.412 ** -torch.arange(4, -1, -1, dtype=torch.float64)
        trained = (coefficients + offsets * unit).expand(heads, -1)

        hold_from = round(reference.peak(mod.coefficients), 3) if mod.beyond == "hold" else torch.inf

        def rule(entropy: Tensor) -> Tensor:
            h = entropy.clamp(max=hold_from)
            a4, a3, a2, a1, a0 = (c[None, :, None] for c in trained.unbind(-1))
            p = a4 * h**4 + a3 * h**3 + a2 * h**2 + a1 * h + a0
            beta = torch.where(entropy > 0.5, p.clamp(min=1), torch.ones_like(p))
            return 1 + strength * (beta - 1)

        options["temperature_rule"] = rule
        options["spare_bos"] = mod.spare_bos
    out = reference.attention(
        query, key, value, visible_BTS=visible(call), scale=scale, softcap=softcap, bos_BT=bos_BT, **options
    )
    return out.transpose(1, 2)
