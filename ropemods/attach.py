"""`apply`, `remove`, `set_strength`, `summary`: putting modifications on a model in place, and taking them off.

What they put on a model:

- on every attention layer that a modification acts on, a submodule `ropemods` with one stage a modification,
- the same on the input embedding, or on the model itself for what all layers share,
- edited rotary frequency tables,
- `config.ropemods`, and the attention implementation `ropemods+<backend>`.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ropemods.attention.paths import chosen
from ropemods.hooks import (
    adapters,
    gguf,
    inputs,
    interface,
    partition,
    probe,
    record,
    rehearsal,
    rotary,
    selective,
    zero_states,
)
from ropemods.hooks.sites import Stages, attention_layers, base_model, prepare_sites, site_of
from ropemods.mods import Mod
from ropemods.mods.base import Site, Stage


@dataclasses.dataclass
class Attached:
    """What is on a model; kept on it as `ropemods_attached`."""

    mods: list[Mod]
    strength: dict[str, float]
    rope_parameters: dict[str, Any]
    """The stock ones."""
    backend: str
    bos_token_id: int | None
    handles: list
    wants_bos: bool = False
    """Whether layers or the embedding must be told where the BOS is, once strengths are above 0."""
    wants_shared: bool = False
    bos_active: bool = False
    zeros_active: bool = False
    """Whether a position may be exactly zero in every layer."""
    shared_active: bool = False


def apply(
    model: nn.Module,
    *mods: Mod,
    strength: float = 1.0,
    calibration: Tensor | None = None,
) -> nn.Module:
    """Put modifications on a model, in place, and return it.

    `calibration` is a batch of token ids (B, T), each row BOS first, from which modifications choose initial values
    (`LearnedSink(init="calibrated")`). A modification that would act on nothing is an error.
    """
    inner = base_model(model)
    _check_alpha(strength)
    if model is not inner and any(mod.trains for mod in mods):
        raise ValueError(
            "these modifications train parameters, and a PEFT model trains and saves only what its config names; "
            "apply them first, then get_peft_model(model, LoraConfig(..., modules_to_save=['ropemods']))"
        )
    if getattr(inner, "ropemods_attached", None) is not None:
        raise ValueError("this model is already modified; ropemods.remove(model) first, then apply all you want")
    if getattr(inner.config, "ropemods", None) is not None:
        raise ValueError(
            "this model's checkpoint records modifications, and transformers' own loading has not put them on; load it "
            "with ropemods.from_pretrained(path), and ropemods.remove(model) first if you want others"
        )
    if not mods:
        raise ValueError("no modification was given, so nothing would change; pass for example TruncatedRoPE(0.75)")
    said = gguf.settle(inner)
    if said is not None:
        warnings.warn(said, stacklevel=2)
    try:
        attach(inner, list(mods))
        finish(inner)
        rehearsal.check_dropout(inner)
        embedding = inner.get_input_embeddings()
        with partition.gathered(embedding):
            for _, stage in _stages_of(embedding):
                stage.measure(embedding)
        if calibration is not None:
            probe.calibrate(inner, calibration.to(inner.device))
        set_strength(inner, strength)
    except BaseException:
        _detach(inner)
        raise
    return model


def attach(model: PreTrainedModel, mods: list[Mod]) -> None:
    """Everything about `apply` that needs no weights: stages, hooks and tables, all at strength 0."""
    layers = _checked(model, mods)
    adapters.watch_saving()
    bos_token_id = model.config.get_text_config().bos_token_id if any(m.needs_bos for m in mods) else None
    model.ropemods_attached = Attached(
        mods=mods,
        strength={mod.kind: 0.0 for mod in mods},
        rope_parameters=copy.deepcopy(record.rope_config(model.config).rope_parameters),
        backend=interface.backend_of(model),
        bos_token_id=bos_token_id,
        handles=[],
    )
    attached = model.ropemods_attached
    scored = False
    for _, layer in layers:
        stages = _stages(mods, lambda mod, layer=layer: _layer_stage(mod, layer, len(layers)))
        if stages is not None:
            layer.ropemods, scored = _placed(stages, layer, model.dtype), True
            layer.ropemods_site.kinds = tuple(kind for kind, _ in stages.stages())
    shared = _stages(mods, lambda mod: mod.shared_stage())
    if shared is not None:
        model.ropemods = _placed(shared, model, model.dtype)
    embedding = model.get_input_embeddings()
    stages = _stages(mods, lambda mod: mod.embedding_stage(bos_token_id) if bos_token_id is not None else None)
    if stages is not None:
        for _, stage in stages.stages():
            stage.allocate(embedding)
        embedding.ropemods = _placed(stages, embedding, model.dtype)
        attached.handles.append(inputs.install_embedding(embedding))
    if any(mod.zeroes_states for mod in mods):
        attached.handles += zero_states.install(model)
    if scored:
        attached.backend = interface.use_interface(model, [layer for _, layer in layers])
    attached.wants_bos, attached.wants_shared = bos_token_id is not None and scored, shared is not None
    if bos_token_id is not None or shared is not None:
        attached.handles += inputs.install(model)
    for mod in (mod for mod in mods if mod.edits_frequencies):
        if mod.layers is not None:
            attached.handles += selective.install([layer for _, layer in layers])


def _checked(model: PreTrainedModel, mods: list[Mod]) -> list[tuple[str, nn.Module]]:
    """The attention layers, or the reason why these modifications cannot stand on this model."""
    for mod in mods:
        if not isinstance(mod, Mod):
            raise TypeError(f"expected modifications such as TruncatedRoPE(0.75), got {mod!r}")
    for mod in mods:
        for other in mods:
            reason = mod.conflict(other)
            if reason is not None:
                raise ValueError(reason)
    reason = rotary.lacking(model)
    if reason is not None:
        raise ValueError(reason)
    layers = prepare_sites(model)
    for mod in mods:
        count = len(layers)
        outside = [i for i in mod.layers or () if not -count <= i < count]
        if outside:
            raise ValueError(
                f"{mod.kind}: layers {outside} do not exist; this model has {count}, from 0 to {count - 1}"
            )
        if mod.needs_bos and model.config.get_text_config().bos_token_id is None:
            raise ValueError(
                f"{mod.kind} needs a BOS token and this model's config has none (bos_token_id is None); set "
                "model.config.bos_token_id to the token your sequences begin with, and put it in front of each"
            )
    _check_one_of_a_kind(mods, len(layers))
    return layers


def _check_one_of_a_kind(mods: list[Mod], layer_count: int) -> None:
    """In a layer. Twice in a model stands only what acts in its layers alone, with layers of its own each time."""
    for n, mod in enumerate(mods):
        for other in (other for other in mods[:n] if other.kind == mod.kind):
            beyond = mod.layers is None or other.layers is None or mod.edits_frequencies or mod.shared_stage()
            if beyond or any(mod.selects(i, layer_count) and other.selects(i, layer_count) for i in range(layer_count)):
                raise ValueError(
                    f"{mod.kind} was given twice, as {other} and as {mod}; one of a kind, or each with `layers` that "
                    "the others do not have (and nothing that all layers share)"
                )


def _stages(mods: list[Mod], stage_of) -> Stages | None:
    stages = Stages()
    for mod in mods:
        stage = stage_of(mod)
        if stage is not None:
            stages.add(mod.kind, stage)
    return stages if len(list(stages.children())) else None


def _layer_stage(mod: Mod, layer: nn.Module, count: int) -> Stage | None:
    site = site_of(layer)
    assert site is not None
    if not mod.selects(site.layer, count):
        return None
    return mod.stage(Site(site.layer, site.heads))


def _placed(stages: Stages, beside: nn.Module, dtype: torch.dtype) -> Stages:
    """On the device of its neighbours and in the model's dtype, which sharding needs to be uniform."""
    tensor = next(beside.parameters(), None)
    device = None if tensor is None else tensor.device
    if any(t.is_meta for t in (*stages.parameters(), *stages.buffers())):
        device = None  # a load is under way, and gives memory to everything
    return stages.to(device=device, dtype=dtype).train(beside.training)


def _stages_of(module: nn.Module) -> list[tuple[str, Stage]]:
    stages = getattr(module, "ropemods", None)
    return list(stages.stages()) if isinstance(stages, Stages) else []


def finish(model: PreTrainedModel) -> None:
    """What needs a loaded model: pristine tables, constants no checkpoint holds, how rotary channels are paired."""
    rotary.forget(model)
    found = prepare_sites(model)
    layers = [layer for _, layer in found]
    for module in model.modules():
        if isinstance(module, Stage):
            module.fill_constants()
    rehearsal.rehearse(model, found)
    for mod in (mod for mod in model.ropemods_attached.mods if mod.edits_frequencies):
        if mod.layers is not None:
            selective.build(model, mod, layers)
    for table in rotary.tables(model):
        table.keep()


def set_strength(model: nn.Module, strength: float, kind: str | None = None) -> None:
    """Set the strength of every modification, or of the one of that kind: 0 is stock, 1 the full modification."""
    attached = _attached(base_model(model))
    _check_alpha(strength)
    if kind is not None and kind not in attached.strength:
        raise ValueError(f"this model has no {kind!r}; it has {', '.join(attached.strength)}")
    for each in attached.strength if kind is None else (kind,):
        attached.strength[each] = float(strength)
    refresh(base_model(model))


def refresh(model: PreTrainedModel) -> None:
    """Make stages, tables and config agree with the strengths in `ropemods_attached`."""
    attached = model.ropemods_attached
    alpha = attached.strength
    for module in model.modules():  # under PEFT every place has several copies of its stages
        if isinstance(module, Stages):
            for kind, stage in module.stages():
                stage.set_strength(alpha[kind])
    record.show_stock(model, attached.rope_parameters)
    for _, layer in attention_layers(model):
        if (site := site_of(layer)) is not None:
            site.active = any(alpha[kind] > 0 for kind in site.kinds)
    attached.bos_active = any(mod.needs_bos and alpha[mod.kind] > 0 for mod in attached.mods)
    attached.zeros_active = any(mod.zeroes_states and alpha[mod.kind] > 0 for mod in attached.mods)
    attached.shared_active = any(mod.shared_stage() is not None and alpha[mod.kind] > 0 for mod in attached.mods)
    for mod in (mod for mod in attached.mods if mod.edits_frequencies):
        edit = None if alpha[mod.kind] == 0 else partial(mod.frequencies, alpha=alpha[mod.kind])
        for table in rotary.tables(model) if mod.layers is None else selective.tables(model):
            table.write(edit)
        if mod.layers is not None:
            model.ropemods_twins.active = edit is not None
    record.write(model, attached.mods, alpha, attached.rope_parameters)


def remove(model: nn.Module) -> nn.Module:
    """Take every modification off a model, in place, and return it: exactly the stock model again."""
    inner = base_model(model)
    _attached(inner)
    _detach(inner)
    return model


def _detach(model: PreTrainedModel) -> None:
    """Undo `attach`, also one that stopped half-way."""
    attached = getattr(model, "ropemods_attached", None)
    if attached is not None:
        for handle in attached.handles:
            handle.remove()
        for table in rotary.tables(model):
            table.write(None)
            table.release()
        layers = [layer for _, layer in attention_layers(model)]
        interface.use_stock(layers)
        if getattr(model, "penalized", None) is not None:  # a penalty stays until it is removed itself
            interface.use_interface(model, layers)
        record.show_own(model)
        record.erase(model, attached.rope_parameters)
    for module in list(model.modules()):
        for name in [n for n in vars(module) if n.startswith("ropemods_")]:
            delattr(module, name)
        if "ropemods" in module._modules:
            del module.ropemods


def summary(model: nn.Module) -> str:
    """One line a modification: where it acts, its strength, what trains; then backend, portability and totals."""
    inner = base_model(model)
    attached = _attached(inner)
    count = len(attention_layers(inner))
    lines = []
    for mod in attached.mods:
        trainable = sum(
            p.numel() for stage in _stages_for(mod, inner, count) for p in stage.parameters() if p.requires_grad
        )
        where = f"{count} layers" if mod.layers is None else f"layers {','.join(map(str, mod.layers))} of {count}"
        lines.append(f"{mod} · {where} · strength {attached.strength[mod.kind]:g} · trainable params: {trainable:,}")
    portable = "yes" if record.is_portable(inner) else "no (reload with ropemods.from_pretrained)"
    total = sum(getattr(p, "ds_numel", p.numel()) for p in inner.parameters())
    kernels = ""
    if attached.backend == "sdpa" and any(type(mod).stage is not Mod.stage for mod in attached.mods):
        kernels = f", kernels: {chosen(inner.device)}"
    lines.append(
        f"attention: {attached.backend}{kernels} · loads in stock transformers: {portable} · all params: {total:,}"
    )
    return "\n".join(lines)


def _stages_for(mod: Mod, model: PreTrainedModel, layer_count: int) -> Iterator[Stage]:
    """The stages that one modification has put on, under PEFT with their copies."""
    for module in model.modules():
        site = site_of(module)
        if site is None or mod.selects(site.layer, layer_count):
            yield from (stage for kind, stage in _stages_of(module) if kind == mod.kind)


def _attached(model: PreTrainedModel) -> Attached:
    attached = getattr(model, "ropemods_attached", None)
    if attached is None:
        raise ValueError("this model has no modifications; put them on with ropemods.apply(model, ...)")
    return attached


def _check_alpha(strength: float) -> None:
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength <= 1:
        raise ValueError(f"strength must be a number from 0 (stock) to 1 (the full modification), not {strength!r}")
