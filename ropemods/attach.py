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
import html
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ropemods import admission
from ropemods.attention.paths import chosen
from ropemods.model import (
    adapters,
    attention_function,
    config_record,
    distillation,
    dry_run,
    gguf,
    input_embedding,
    layer_tables,
    model_inputs,
    origin,
    other_engines,
    partition,
    starting_values,
    unchanged,
    zero_states,
)
from ropemods.model.anatomy import Anatomy, anatomy_of
from ropemods.model.attention_layers import (
    Stages,
    hand_down,
    head_dim_of,
    key_dim_of,
    site_of,
    width_of,
)
from ropemods.model.wrappers import base_model, uncompiled
from ropemods.mods import Mod
from ropemods.mods.base import Site, Stage, edited

AnyModel = TypeVar("AnyModel", bound=nn.Module)


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
    at_path: dict[str, float]
    """The strengths in the checkpoint that the model was loaded from."""
    load: Callable[..., nn.Module] | None = None
    """Loads the model from that checkpoint, where it is a modified one."""
    wants_bos: bool = False
    """Whether layers or the embedding must be told where the BOS is, once strengths are above 0."""
    wants_shared: bool = False
    bos_active: bool = False
    rows_active: bool = False
    """Whether any layer's softmax rows are modified."""
    turns_active: bool = False
    """Whether queries are turned by their distance to the BOS."""
    zeros_active: bool = False
    """Whether a position may be exactly zero in every layer."""
    shared_active: bool = False


def apply(
    model: AnyModel,
    *mods: Mod,
    strength: float = 1.0,
    calibration: Tensor | None = None,
) -> AnyModel:
    """Put modifications on a model, in place, and return it.

    `calibration` is a batch of token ids (B, T), each row BOS first, from which modifications choose initial values
    (`LearnedSink(init="calibrated")`); where they raise the loss on it noticeably, a warning says by how much and what
    would cost less. A modification that would act on nothing is an error.
    """
    inner = base_model(model)
    config_record.check_strength(strength)
    admission.check_mods(mods)
    if uncompiled(model) is not inner and any(mod.must_be_saved for mod in mods):
        raise ValueError(
            "these modifications have values of their own, and a PEFT model trains and saves only what its config "
            "names; apply them first, then get_peft_model(model, LoraConfig(..., modules_to_save=['ropemods']))"
        )
    if getattr(inner, "ropemods_attached", None) is not None:
        raise ValueError("this model is already modified; ropemods.remove(model) first, then apply all you want")
    if getattr(inner.config, "ropemods", None) is not None:
        raise ValueError(
            "this model's checkpoint records modifications, and transformers' own loading has not put them on; load it "
            "with ropemods.from_pretrained(path), and ropemods.remove(model) first if you want others"
        )
    unloaded = partition.without_memory(inner)
    if unloaded:
        raise ValueError(
            f"this model has no weights yet ({unloaded[0]} and {len(unloaded) - 1} more are on the meta device), and "
            "apply runs it once to see what its attention does; load the weights first, or use "
            "ropemods.from_pretrained for a checkpoint that is modified already"
        )
    if not mods:
        raise ValueError("no modification was given, so nothing would change; pass for example TruncatedRoPE(0.75)")
    said = gguf.settle(inner)
    if said is not None:
        warnings.warn(said, stacklevel=2)
    _forget_compiled()
    if calibration is None and (fitted := next((mod for mod in mods if mod.distils), None)) is not None:
        raise ValueError(
            f"{fitted} is fitted to what the model says of a text: give calibration=, a batch of token ids "
            "(--calibration_text FILE on the command line)"
        )
    ids_BT = None if calibration is None else starting_values.checked(inner, mods, calibration)
    try:
        if ids_BT is None:
            put_on(inner, list(mods))
        elif (costly := _put_on_calibrated(inner, list(mods), ids_BT)) is not None:
            warnings.warn(costly, stacklevel=2)
        set_strength(inner, strength)
    except BaseException:
        _detach(inner)
        raise
    if (elsewhere := admission.bos_elsewhere(inner, mods)) is not None:
        warnings.warn(elsewhere, stacklevel=2)
    return model


def _forget_compiled() -> None:
    """Have torch.compile trace anew whatever it has compiled: its graphs do not notice hooks that come and go."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def put_on(model: PreTrainedModel, mods: list[Mod], *, recorded: config_record.Record | None = None) -> None:
    """Modifications on a model that has its weights, at strength 0, with what they take from the embedding."""
    attach(model, mods, recorded=recorded)
    finish(model, anatomy_of(model))
    dry_run.check_training(model)
    embeds = model.get_input_embeddings()
    # Of the model's own table: an adapter's part is trained, and reloading takes the same from the base alone.
    own = input_embedding.without_adapters(embeds)
    with partition.gathered(own):
        for _, stage in _stages_of(embeds):
            stage.measure(own)
    if any(mod.copies_bos for mod in mods):
        starting_values.read_bos(model)


def _put_on_calibrated(model: PreTrainedModel, mods: list[Mod], ids_BT: Tensor) -> str | None:
    """`put_on`, with initial values from a batch; returns what is to be said of the loss on it, if it rises much."""

    def put_on_and_read(mods: list[Mod]) -> float | None:
        put_on(model, mods)
        if any(mod.calibrates for mod in mods):
            starting_values.calibrate(model, ids_BT)
        if any(mod.distils for mod in mods):
            distillation.distil(model, _stages_in_layers(model), ids_BT, partial(set_strength, model))
        set_strength(model, 1.0)
        return starting_values.loss(model, ids_BT)

    stock = starting_values.loss(model, ids_BT)
    whole = put_on_and_read(mods)
    if stock is None or whole is None or whole <= stock * (1 + starting_values.NOTICEABLE):
        return None
    alone = {}
    for mod in mods:
        set_strength(model, 0.0)
        set_strength(model, 1.0, kind=mod.kind)
        alone[str(mod)] = starting_values.loss(model, ids_BT) or 0.0
    gentler, chosen = {}, [copy.deepcopy(stage.state_dict()) for stage in _stages_in_layers(model)]
    for mod in mods:
        for other in mod.gentler():
            _detach(model)
            gentler[str(other)] = put_on_and_read([other if each is mod else each for each in mods]) or 0.0
    if gentler:
        _detach(model)
        put_on(model, mods)
        for stage, values in zip(_stages_in_layers(model), chosen, strict=True):
            stage.load_state_dict(values)
    return starting_values.remark(stock, whole, alone, gentler)


def attach(model: PreTrainedModel, mods: list[Mod], *, recorded: config_record.Record | None = None) -> None:
    """Everything about `apply` that needs no weights: stages, hooks and tables, all at strength 0.

    `recorded` is the record that the modifications are from when a checkpoint is read.
    """
    anatomy = admission.admitted(model, mods, recorded)
    layers = anatomy.layers
    adapters.watch_saving()
    other_engines.watch_engines()
    bos_token_id = admission.bos_token(model, mods, recorded)
    model.ropemods_attached = Attached(
        mods=mods,
        strength={mod.kind: 0.0 for mod in mods},
        rope_parameters=copy.deepcopy(config_record.rope_config(model.config).rope_parameters),
        backend=attention_function.backend_of(model),
        bos_token_id=bos_token_id,
        handles=[],
        at_path={mod.kind: 0.0 for mod in mods},
    )
    attached = model.ropemods_attached
    scored = False
    for layer in layers:
        stages = _stages(mods, lambda mod, layer=layer: _layer_stage(mod, layer, len(layers)))
        if stages is not None:
            layer.ropemods, scored = _placed(stages, layer, model.dtype), True
            layer.ropemods_site.kinds = tuple(kind for kind, _ in stages.stages())
            if any(mod.needs_hidden and mod.kind in layer.ropemods_site.kinds for mod in mods):
                attached.handles.append(layer.register_forward_pre_hook(hand_down, with_kwargs=True))
    shared = _stages(mods, lambda mod: mod.shared_stage())
    if shared is not None:
        model.ropemods = _placed(shared, model, model.dtype)
    embeds = model.get_input_embeddings()
    stages = _stages(mods, lambda mod: mod.embedding_stage(bos_token_id))
    if stages is not None:
        for _, stage in stages.stages():
            stage.allocate(embeds)
        embeds.ropemods = _placed(stages, embeds, model.dtype)
        input_embedding.install(model)
    if any(mod.zeroes_states for mod in mods):
        attached.handles += zero_states.install(model)
    attached.handles += unchanged.watch(model, layers if scored else ())
    if scored:
        attached.backend = attention_function.use_interface(model, layers)
    attached.wants_bos, attached.wants_shared = scored and any(mod.needs_bos for mod in mods), shared is not None
    if bos_token_id is not None or shared is not None or scored:
        attached.handles += model_inputs.install(model)
    for mod in (mod for mod in mods if mod.edits_frequencies):
        if mod.for_some_layers:
            attached.handles += layer_tables.install(layers)


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
    return mod.stage(Site(site.layer, site.heads, head_dim_of(layer), width_of(layer), key_dim_of(layer)))


def _placed(stages: Stages, beside: nn.Module, dtype: torch.dtype) -> Stages:
    """On the device that its neighbours compute on and in the model's dtype, which sharding needs to be uniform."""
    device = partition.home(beside)
    if device is not None and device.type == "meta":
        device = None  # a load is under way, and gives memory to everything
    elif device is not None:  # beside offloaded weights what was made like them has no memory yet
        stages._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    return stages.to(device=device, dtype=dtype).train(beside.training)


def _stages_in_layers(model: PreTrainedModel) -> list[Stage]:
    return [stage for layer in anatomy_of(model).layers for _, stage in _stages_of(layer)]


def _stages_of(module: nn.Module) -> list[tuple[str, Stage]]:
    stages = getattr(module, "ropemods", None)
    return list(stages.stages()) if isinstance(stages, Stages) else []


def finish(model: PreTrainedModel, anatomy: Anatomy) -> None:
    """What needs a loaded model: pristine tables, constants no checkpoint holds, how rotary channels are paired."""
    if (stages := input_embedding.stages_of(model.get_input_embeddings())) is not None:
        partition.keep_here(stages)
    for module in model.modules():
        if isinstance(module, Stage):
            module.fill_constants()
    dry_run.examine(model, anatomy)
    for mod in (mod for mod in model.ropemods_attached.mods if mod.edits_frequencies):
        if mod.for_some_layers:
            layer_tables.build(model, mod, anatomy)
    for table in anatomy.tables:
        table.keep()


def set_strength(model: nn.Module, strength: float, kind: str | None = None) -> None:
    """Set the strength of every modification, or of the one of that kind: 0 is stock, 1 the full modification."""
    attached = _attached(base_model(model))
    config_record.check_strength(strength)
    if kind is not None and kind not in attached.strength:
        raise ValueError(f"this model has no {kind!r}; it has {', '.join(attached.strength)}")
    for each in attached.strength if kind is None else (kind,):
        attached.strength[each] = float(strength)
    refresh(base_model(model))


def refresh(model: PreTrainedModel) -> None:
    """Make stages, tables and config agree with the strengths in `ropemods_attached`."""
    attached, anatomy = model.ropemods_attached, anatomy_of(model)
    alpha = attached.strength
    for module in model.modules():  # under PEFT every place has several copies of its stages
        if isinstance(module, Stages):
            for kind, stage in module.stages():
                stage.set_strength(alpha[kind])
    config_record.show_stock(model, attached.rope_parameters)
    for site in anatomy.sites:
        site.active = any(alpha[kind] > 0 for kind in site.kinds)
    attached.rows_active = any(site.active for site in anatomy.sites)
    attached.turns_active = any(mod.needs_layout and alpha[mod.kind] > 0 for mod in attached.mods)
    attached.bos_active = any(mod.needs_bos and alpha[mod.kind] > 0 for mod in attached.mods)
    attached.zeros_active = any(mod.zeroes_states and alpha[mod.kind] > 0 for mod in attached.mods)
    attached.shared_active = any(mod.shared_stage() is not None and alpha[mod.kind] > 0 for mod in attached.mods)
    if any(mod.edits_frequencies and not mod.for_some_layers for mod in attached.mods):
        edits = config_record.edits_of(attached.mods, alpha)
        for table in anatomy.tables:
            table.write(partial(edited, edits=edits) if edits else None)
    for mod in (mod for mod in attached.mods if mod.edits_frequencies and mod.for_some_layers):
        layer_tables.write(model, mod, alpha[mod.kind])
    config_record.write(model, attached.mods, alpha, attached.rope_parameters, attached.bos_token_id)
    moved = alpha != attached.at_path
    origin.mark(model, differs=moved or any(alpha.values()), load=None if moved else attached.load)


def remove(model: AnyModel) -> AnyModel:
    """Take every modification off a model, in place, and return it: exactly the stock model again."""
    inner = base_model(model)
    _attached(inner)
    _forget_compiled()
    _detach(inner)
    return model


def _detach(model: PreTrainedModel) -> None:
    """Undo `attach`, also one that stopped half-way."""
    attached = getattr(model, "ropemods_attached", None)
    if attached is not None:
        for handle in attached.handles:
            handle.remove()
        input_embedding.uninstall(model)
        anatomy = anatomy_of(model)
        for table in anatomy.tables:
            table.write(None)
            table.release()
        attention_function.use_stock(anatomy.layers)
        if getattr(model, "penalized", None) is not None:  # a penalty stays until it is removed itself
            attention_function.use_interface(model, anatomy.layers)
        config_record.show_own(model)
        config_record.erase(model, attached.rope_parameters)
        origin.mark(model, differs=False)
    for module in list(model.modules()):
        for name in [n for n in vars(module) if n.startswith("ropemods_")]:
            delattr(module, name)
        if "ropemods" in module._modules:
            del module.ropemods


class Summary(str):
    """The text of `summary`, which a notebook shows in its lines."""

    def _repr_html_(self) -> str:
        return f'<pre style="font-family: monospace; white-space: pre-wrap">{html.escape(self)}</pre>'


def summary(model: nn.Module) -> Summary:
    """One line a modification: where it acts, its strength, what trains; then backend, portability and totals."""
    inner = base_model(model)
    attached = _attached(inner)
    unchanged.check(inner)
    count = len(anatomy_of(inner).layers)
    lines = []
    for mod in attached.mods:
        trainable = sum(
            p.numel() for stage in _stages_for(mod, inner, count) for p in stage.parameters() if p.requires_grad
        )
        chosen_layers = mod.layers or sorted(mod.acts_on(count))
        where = f"layers {','.join(map(str, chosen_layers))} of {count}" if mod.for_some_layers else f"{count} layers"
        lines.append(f"{mod} · {where} · strength {attached.strength[mod.kind]:g} · trainable params: {trainable:,}")
        lines += _learned(mod, inner, count)
    portable = "yes" if config_record.is_portable(inner) else "no (reload with ropemods.from_pretrained)"
    total = sum(getattr(p, "ds_numel", p.numel()) for p in inner.parameters())
    backend, kernels = attention_function.backend_of(inner), ""
    if backend == "sdpa" and any(type(mod).stage is not Mod.stage for mod in attached.mods):
        kernels = f", kernels: {chosen(inner.device)}"
    lines.append(f"attention: {backend}{kernels} · loads in stock transformers: {portable} · all params: {total:,}")
    return Summary("\n".join(lines))


def _learned(mod: Mod, model: PreTrainedModel, layer_count: int) -> Iterator[str]:
    """What became of the modification's own numbers, a line for each run of layers that say the same."""
    found = []
    for layer, site in zip(anatomy_of(model).layers, anatomy_of(model).sites, strict=True):
        own = [stage for kind, stage in _stages_of(layer) if kind == mod.kind]
        if own and mod.selects(site.layer, layer_count) and (said := own[0].learned()) is not None:
            found.append((said, site.layer))
    for said, run in itertools.groupby(found, key=lambda each: each[0]):
        layers = [layer for _, layer in run]
        named = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
        yield f"  {named}: {said}"


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
