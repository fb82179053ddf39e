"""Each modification on an architecture, against a naive form of it made of the stock model.

What acts on frequencies or embeddings is compared with a stock model whose tables or rows are edited by hand; what acts
on softmax rows, with `naive_attention` at each of the model's own attention calls.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import ropemods as rm
from evals import naive_attention, tiny_configs, tiny_models
from evals.architecture_subject import Check, Subject, acts, near, run
from ropemods.attention.reference import truncated_frequencies
from ropemods.mods import Mod

SINGLE_CALL = 2e-5

TEMPERATURE: list[Mod] = [rm.AdaptiveTemperature()]
TRUNCATED: list[Mod] = [rm.TruncatedRoPE(0.5)]
REPLACED: list[Mod] = [rm.ReplacedBos(by="zero")]
SINK: list[Mod] = [rm.LearnedSink(init=0.5)]
UNROTATED: list[Mod] = [rm.UnrotatedBos()]


def strength_zero(subject: Subject) -> None:
    ids = tiny_models.tokens()
    model = subject.modified(subject.together(), strength=0.0)
    assert torch.equal(run(model, ids), run(subject(), ids)), "not bitwise stock at strength 0"
    rm.set_strength(model, 1.0)
    rm.remove(model)
    assert torch.equal(run(model, ids), run(subject(), ids)), "not bitwise stock after remove"


def p_rope(subject: Subject) -> None:
    """Against a stock model whose rope tables are cut by hand."""
    ids = tiny_models.tokens()
    stock, model = subject(), subject.modified(TRUNCATED)
    before = run(stock, ids)
    text = stock.config.get_text_config(decoder=True)
    for module in stock.modules():
        if getattr(module, "config", None) is not text and "ision" in type(module).__name__:
            continue
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and buffer.ndim == 1:
                buffer.copy_(truncated_frequencies(buffer, keep=0.5))
        if hasattr(module, "rope_init_fn"):  # called in each pass in place of reading the buffers
            module.rope_init_fn = _cut(module.rope_init_fn)
    near(run(model, ids), run(stock, ids), 1e-6, "p-RoPE against cut tables")
    acts(run(model, ids), before, "TruncatedRoPE")


def _cut(init):
    def frequencies(*args, **kwargs):
        inv_freq, scaling = init(*args, **kwargs)
        return truncated_frequencies(inv_freq, keep=0.5), scaling

    return frequencies


def replaced_bos(subject: Subject) -> None:
    """Against a stock model whose BOS row is zeroed."""
    ids = tiny_models.tokens()
    stock, model = subject(), subject.modified(REPLACED)
    before = run(stock, ids)
    embedding = stock.get_input_embeddings()
    weight = embedding.weight.detach().clone()
    weight[tiny_configs.BOS] = 0
    embedding.weight = nn.Parameter(weight)  # of its own: a tied head keeps the old row
    near(run(model, ids), run(stock, ids), 1e-6, "ReplacedBos against a zeroed row")
    acts(run(model, ids), before, "ReplacedBos")


def on_rows(chosen: list[Mod] | None) -> Check:
    """A check of modifications of softmax rows, at each of the model's own attention calls."""

    def check(subject: Subject) -> None:
        ids = tiny_models.tokens()
        mods = chosen or subject.together()
        if not any(type(mod).stage is not Mod.stage for mod in mods):
            subject.modified(TEMPERATURE)  # for its refusal
        model = subject.modified(mods)
        layers = [m for m in model.modules() if getattr(m, "ropemods_site", None) is not None]
        with naive_attention.recorded(model) as calls, naive_attention.inputs_of(layers) as inputs:
            found = run(model, ids)
        calls = [call for call in calls if getattr(call.module, "ropemods", None) is not None]
        assert calls, "no modified attention layer was reached"
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
            unrotated = None
            if any(mod.kind == "unrotated_bos" for mod in mods):
                unrotated = _unrotated(model, call, args, kwargs)
            wanted = naive_attention.attend(call, mods, unrotated)
            near(call.output, wanted, SINGLE_CALL, f"attention of layer {call.module.layer_idx}")
        acts(found, run(subject(), ids), " and ".join(mod.kind for mod in mods))

    return check


def _unrotated(model: PreTrainedModel, call: naive_attention.Recorded, args: tuple, kwargs: dict) -> Tensor:
    """The BOS column's logits with nothing rotated: the layer run again with every table standing still."""
    saved = []
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq"):
                saved.append((buffer, buffer.clone()))
    rotary = [m for m in model.modules() if any(n.endswith("inv_freq") for n, _ in m.named_buffers(recurse=False))]

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
    for buffer, _ in saved:
        buffer.zero_()
    try:
        with naive_attention.recorded(model) as again, torch.no_grad():
            call.module(*args, **kwargs)
    finally:
        for buffer, value in saved:
            buffer.copy_(value)
    assert rotary
    return naive_attention.logits(again[-1])[..., 0]


def _is_table(value) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(each, Tensor) for each in value)
