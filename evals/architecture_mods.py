"""Modifications on an architecture, against a naive form made of the stock model.

What acts on frequencies or on the embedding is compared with a stock model whose tables or row are edited by hand; what
acts in attention layers, with `naive_attention` at each of the model's own calls; and how a layer rotates, which some
of them read off it, with the layer run again standing still.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import ropemods as rm
from evals import naive_attention, tiny_configs, tiny_models
from evals.architecture_subject import Check, Subject, acts, example, near, run, runs_fused
from evals.naive_attention import RecordedCall
from ropemods.mods import MODS, Mod
from ropemods.mods.bos_column import turned_back

SINGLE_CALL = 2e-5


def strength_zero(subject: Subject) -> None:
    ids = tiny_models.tokens()
    model = subject.modified(subject.together(), strength=0.0)
    assert torch.equal(run(model, ids), run(subject(), ids)), "not bitwise stock at strength 0"
    rm.set_strength(model, 1.0)
    rm.remove(model)
    assert torch.equal(run(model, ids), run(subject(), ids)), "not bitwise stock after remove"


def alone(kind: type[Mod]) -> Check:
    """A check of one modification in every place it acts in."""

    def check(subject: Subject) -> None:
        mod = example(kind)
        subject = subject if runs_fused(mod) else subject.written_out()
        ids = tiny_models.tokens()
        stock, model = subject(), subject.modified([mod])
        before, found = run(stock, ids), run(model, ids)
        acts(found, before, str(mod))
        if type(mod).stage is not Mod.stage:
            hold_calls(model, ids)
            return
        if mod.edits_frequencies:
            _edit_tables(stock, mod)
        else:
            _edit_row(stock, model)
        near(found, run(stock, ids), 1e-6, f"{mod} against a stock model edited by hand")

    return check


BY_KIND = {kind.kind.replace("_", " "): alone(kind) for kind in MODS}


def together(subject: Subject) -> None:
    """All that the model takes at once."""
    ids, mods = tiny_models.tokens(), subject.together()
    model = subject.modified(mods)
    hold_calls(model, ids)
    acts(run(model, ids), run(subject(), ids), " and ".join(mod.kind for mod in mods))


def hold_calls(model: PreTrainedModel, ids: Tensor) -> None:
    """Every modified attention call of a pass is what its stages' naive forms make of it."""
    with naive_attention.recorded(model) as calls:
        run(model, ids)
    calls = [call for call in calls if getattr(call.module, "ropemods", None) is not None]
    assert calls, "no modified attention layer was reached"
    bos = torch.zeros(ids.shape, dtype=torch.long)
    for call in calls:
        site = call.module.ropemods_site
        rotary = None if site.layout is None else (site.direction * site.table.live(), *site.layout)
        wide = [x.double() for x in (call.query, call.key, call.value)]
        with torch.no_grad():
            wanted = naive_attention.recompute(call, *wide, backend=_backend(model), bos_BT=bos, rotary=rotary)
        near(call.output, wanted, SINGLE_CALL, f"attention of layer {call.module.layer_idx}")


def _backend(model: PreTrainedModel) -> str:
    return str(model.config._attn_implementation).removeprefix("ropemods+")


def _edit_tables(stock: PreTrainedModel, mod: Mod) -> None:
    text = stock.config.get_text_config(decoder=True)
    for module in stock.modules():
        if getattr(module, "config", None) is not text and "ision" in type(module).__name__:
            continue
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and buffer.ndim == 1:
                buffer.copy_(mod.frequencies(buffer.clone(), 1.0))
        if hasattr(module, "rope_init_fn"):  # called in each pass in place of reading the buffers
            module.rope_init_fn = _edited(module.rope_init_fn, mod)


def _edited(init, mod: Mod):
    def frequencies(*args, **kwargs):
        inv_freq, scaling = init(*args, **kwargs)
        return mod.frequencies(inv_freq, 1.0), scaling

    return frequencies


def _edit_row(stock: PreTrainedModel, model: PreTrainedModel) -> None:
    """Let the stock model's BOS row be what the modified model's embedding gives for it."""
    embedding, token = stock.get_input_embeddings(), torch.tensor([[tiny_configs.BOS]])
    weight = embedding.weight.detach().clone()
    with torch.no_grad():
        scale = embedding(token)[0, 0].norm() / weight[tiny_configs.BOS].norm()
        weight[tiny_configs.BOS] = model.get_input_embeddings()(token)[0, 0] / scale
    embedding.weight = nn.Parameter(weight)  # of its own: a tied head keeps the old row


def rotation(subject: Subject) -> None:
    """Queries that are turned back, by what was found of a layer's rotation, are those of the layer standing still."""
    ids = tiny_models.tokens()
    model = subject.modified(subject.together(), strength=0.0)
    layers = [module for module in model.modules() if getattr(module, "ropemods_site", None) is not None]
    with naive_attention.recorded(model) as calls, naive_attention.inputs_of(layers) as inputs:
        run(model, ids)
    for call, still in _standing_still(model, calls, inputs):
        site = call.module.ropemods_site
        if site.layout is None or not site.rotated:
            continue
        table, query = site.direction * site.table.live().double(), call.query.double()
        back = torch.stack([turned_back(query[:, :, t], t * table, site.layout) for t in range(query.shape[2])], 2)
        near(back, still.query, 1e-5, f"queries of layer {call.module.layer_idx}, turned back,")


def _standing_still(
    model: PreTrainedModel, calls: list[RecordedCall], inputs: list
) -> Iterator[tuple[RecordedCall, RecordedCall]]:
    """Each call, and the one that its layer makes from the same input with nothing rotated."""
    taken: dict[int, list] = {}
    for module, args, kwargs in inputs:
        taken.setdefault(id(module), []).append((args, kwargs))
    made: dict[int, int] = {}
    for call in calls:
        # A layer may be called several times, and may call its attention several times a call.
        key = id(call.module)
        attended = sum(1 for each in calls if each.module is call.module) // len(taken[key])
        args, kwargs = taken[key][made.get(key, 0) // attended]
        made[key] = made.get(key, 0) + 1
        if attended == 1:
            yield call, _run_still(model, call.module, args, kwargs)


def _run_still(model: PreTrainedModel, layer: nn.Module, args: tuple, kwargs: dict) -> RecordedCall:
    def still(value):
        """Every position's table is that of position 0."""
        if isinstance(value, Tensor):
            return value[:, :1].expand_as(value) if value.ndim == 3 else value[:1].expand_as(value)
        if isinstance(value, dict):
            return {key: still(each) for key, each in value.items()}
        return type(value)(still(each) for each in value)

    names = [name for name in kwargs if "position_embeddings" in name or name in ("freqs_cis",)]
    args = tuple(still(a) if _is_table(a) else a for a in args)
    kwargs = kwargs | {name: still(kwargs[name]) for name in names if kwargs[name] is not None}
    buffers = [b for m in model.modules() for n, b in m.named_buffers(recurse=False) if n.endswith("inv_freq")]
    assert buffers
    saved = [buffer.clone() for buffer in buffers]
    for buffer in buffers:
        buffer.zero_()
    try:
        with naive_attention.recorded(model) as again, torch.no_grad():
            layer(*args, **kwargs)
    finally:
        for buffer, value in zip(buffers, saved, strict=True):
            buffer.copy_(value)
    return again[-1]


def _is_table(value) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(each, Tensor) for each in value)
