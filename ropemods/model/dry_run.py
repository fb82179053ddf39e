"""One short forward pass when modifications are put on a model, to see that its attention is what they take it for.

What cannot be seen in a modeling file from outside is seen here on real calls:

- the attention function that the model would have called gives what ropemods' own gives with nothing added to it,
- what is told at the model's entrance (`inputs`) arrives at every layer,
- which frequency table turns the queries of each layer, in which channels, or that nothing turns them (a NoPE layer).

What does not hold is refused by `apply`, before anything is trained.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ropemods.attention import capabilities, eager, measured_paths
from ropemods.attention.rows import Rows, shown
from ropemods.model import attention_function, rope_tables
from ropemods.model.anatomy import Anatomy, anatomy_of
from ropemods.model.attention_layers import HIDDEN, Stages, head_dim_of, key_dim_of
from ropemods.model.model_inputs import BOS, SHARED, carry
from ropemods.model.partition import gathered_in_turn, home
from ropemods.model.rope_tables import Table
from ropemods.model.short_pass import in_full_precision, quietly
from ropemods.mods.base import Call, Mod
from ropemods.mods.bos_column import with_bos_column

TOKENS = 8
TOLERANCE = 1e-3
"""Relative, in fp32: far above rounding, far below a dropped term."""


@dataclasses.dataclass
class Seen:
    """The first attention call of one layer, and how the layer came to make it."""

    call: attention_function.Asked
    args: tuple = ()
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)


class _Reached(Exception):
    def __init__(self, asked: attention_function.Asked) -> None:
        self.asked = asked


def examine(model: PreTrainedModel, anatomy: Anatomy) -> None:
    """Refuse what the modifications of this model cannot work on, and find what turns each layer's queries."""
    modules = list(anatomy.layers)
    attached = model.ropemods_attached
    with quietly(model), in_full_precision(model), gathered_in_turn(model), attention_function.passing(modules):
        seen, made = _run(model, modules)
        if attached.wants_bos or attached.wants_shared:
            lacking = _untold(attached, seen)
            if lacking:
                attached.handles += carry(model, modules, [table.module for table in anatomy.tables])
                seen, made = _run(model, modules)
                lacking = _untold(attached, seen)
            if lacking:
                raise ValueError(
                    f"{type(model).__name__} does not hand keyword arguments down to its attention layers "
                    f"({type(lacking[0]).__name__}), so they cannot be told where the BOS is or what is trained for "
                    "the whole model; use modifications that need neither"
                )
        if not seen:
            raise ValueError(f"a forward pass of {type(model).__name__} reached none of its attention layers")
        _check_finite(model, seen)
        for module in modules:
            if module in seen:
                _check_causal(model, module, seen[module].call)
        for module in modules:
            if module in seen and getattr(module, "ropemods", None) is not None:
                _check_call(attached, module, seen[module].call)
        for module in modules:
            if module in seen:
                _find_rotation(model, module, seen[module], made)
                module.ropemods_site.dropout = _dropout(module, seen[module])
    _check_rotation(model, [module for module in modules if module in seen])
    with quietly(model), gathered_in_turn(model):
        shared: dict[str, Tensor] = {}
        for _, stage in model.ropemods.stages() if attached.wants_shared else ():
            shared = stage(shared, Call())
        for module in modules:
            if module in seen and isinstance(getattr(module, "ropemods", None), Stages):
                _check_terms(module, seen[module].call, shared)


def _run(model: PreTrainedModel, modules: list[nn.Module]) -> tuple[dict[nn.Module, Seen], _Made]:
    vocabulary = model.get_input_embeddings().weight
    size = getattr(vocabulary, "ds_shape", vocabulary.shape)[0]
    attached = model.ropemods_attached
    ids = torch.arange(1, TOKENS + 1, device=home(model))[None] * (size // (TOKENS + 2))
    if attached.bos_token_id is not None:
        ids[:, 0] = attached.bos_token_id
    seen: dict[nn.Module, Seen] = {}
    taken: dict[nn.Module, tuple[tuple, dict[str, Any]]] = {}

    def note(asked: attention_function.Asked) -> None:
        args, kwargs = taken.get(asked.module, ((), {}))
        seen.setdefault(asked.module, Seen(asked, args, kwargs))

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        taken.setdefault(module, (args, kwargs))

    made = _Made()
    handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in modules]
    for module in {id(table.module): table.module for table in anatomy_of(model).tables}.values():
        handles.append(module.register_forward_hook(made.note, with_kwargs=True))
    before = attached.bos_active, attached.shared_active
    attached.bos_active, attached.shared_active = attached.wants_bos, attached.wants_shared
    try:
        with attention_function.asked(model, note):
            model(input_ids=ids, use_cache=False)
    finally:
        attached.bos_active, attached.shared_active = before
        for handle in handles:
            handle.remove()
    around = [module for module in modules if module in taken and module not in seen]
    if around and seen:
        raise ValueError(
            f"{len(around)} of the {len(taken)} attention layers that a pass of {type(model).__name__} reached make no "
            f"call of transformers' attention interface (layer {around[0].layer_idx} is the first): something has put "
            "its own attention in their place, which would go around the modifications; load the model without it"
        )
    return seen, made


def _untold(attached: Any, seen: dict[nn.Module, Seen]) -> list[nn.Module]:
    """Layers with a stage to which the entrance's word did not come."""
    wanted = [name for name, wants in ((BOS, attached.wants_bos), (SHARED, attached.wants_shared)) if wants]
    staged = [module for module in seen if getattr(module, "ropemods", None) is not None]
    return [m for m in staged if any(seen[m].call.options.get(name) is None for name in wanted)]


def _check_finite(model: PreTrainedModel, seen: dict[nn.Module, Seen]) -> None:
    """That there is anything to compare: a model that gives NaN is broken before it is modified."""
    if all(bool(torch.isfinite(tensor).all()) for each in seen.values() for tensor in each.call.inputs):
        return
    wrong = [name for name, p in model.named_parameters() if not p.is_meta and not bool(torch.isfinite(p).all())]
    found = f"its weights are finite, and {TOKENS} tokens overflow in {model.dtype}"
    if wrong:
        found = f"{wrong[0]} and {len(wrong) - 1} more parameters hold NaN or infinity"
    raise ValueError(
        f"this {type(model).__name__} hands NaN or infinity to its attention before anything is modified: {found}; "
        "load weights that are whole, in a dtype that holds them"
    )


def _check_causal(model: PreTrainedModel, module: nn.Module, asked: attention_function.Asked) -> None:
    """That no token sees a later one: what is said of position 0 and of BOS holds in causal models only."""
    if asked.key.shape[2] != asked.query.shape[2]:
        return
    options = {name: value for name, value in asked.own_options.items() if name != "position_bias"}
    rows = attention_function.rows_of(asked.backend, module, *asked.inputs, **options)
    if rows.mask is None:
        later = not rows.causal
    else:
        seen = rows.mask[..., 0, -1]
        later = bool(shown(seen).any())
    if later:
        raise ValueError(
            f"{type(model).__name__} is no causal model: in {type(module).__name__} tokens see later ones, as in an "
            "encoder. ropemods is for causal language models (AutoModelForCausalLM), where the first token sees only "
            "itself"
        )


def _check_terms(module: nn.Module, asked: attention_function.Asked, shared: dict[str, Tensor]) -> None:
    """That no two modifications set the same of a row, where the later would undo the earlier; and whether the path
    that will run can train the row that they make."""
    site = module.ropemods_site
    rows = attention_function.rows_of(asked.backend, module, *asked.inputs, **asked.own_options)
    call = site.call(asked.options.get(BOS), rows.k_BGSD.shape[2], shared, asked.options.get(HIDDEN))
    if call.bos_column_BN is not None:
        rows = with_bos_column(rows, call)  # at its own logit, so that every other is some stage's
    setters: dict[str, str] = {}
    for kind, stage in module.ropemods.stages():
        if stage.place != "rows":  # those of outputs act one on the other's, as they are listed
            continue
        before = _set_once(rows)
        stage.set_strength(1.0)
        try:
            rows = stage(rows, call)
        finally:
            stage.set_strength(0.0)
        for name, value in _set_once(rows).items():
            if value is before[name]:
                continue
            if name in setters:
                raise ValueError(
                    f"{setters[name]} and {kind} both set {name} of the rows in layer {site.layer}, and the second "
                    "would undo the first; leave one out, or give each layers= of its own"
                )
            setters[name] = kind
    if (rows.offset_bias is not None or rows.key_bias is not None) and asked.key.shape[2] != asked.query.shape[2]:
        raise ValueError(
            f"{' and '.join(site.kinds)}: {type(module).__name__} attends to {asked.key.shape[2]} keys when the model "
            f"has read {asked.query.shape[2]} tokens, so how far back a key stands is not known"
        )
    if asked.backend == "sdpa":
        in_training = rows._replace(dropout=site.dropout)
        path = measured_paths.for_rows(rows)
        found = capabilities.limit(path, in_training, rows.q_BHTD.device.type)
        if found is not None:
            site.untrainable = capabilities.refusal(path, found, in_training, rows.q_BHTD.device)


def _set_once(rows: Rows) -> dict[str, Any]:
    """What of a row has one value; all other terms compose, whoever comes first."""
    return {
        "the factor read off the entropy": rows.entropy_scale,
        "the logit of BOS": None if rows.column is None else rows.column.logit_BHT,
    }


def _check_call(attached: Any, module: nn.Module, asked: attention_function.Asked) -> None:
    """That ropemods' attention with nothing added is the layer's own, and that its keys are the tokens."""
    name = type(module).__name__
    if asked.query.shape[1] != module.ropemods_site.heads:
        raise ValueError(
            f"{name} has {asked.query.shape[1]} heads, and {module.ropemods_site.heads} were found in its attributes "
            "and config; it cannot be given parameters for each head"
        )
    taken, found = (key_dim_of(module), head_dim_of(module)), (asked.key.shape[3], asked.value.shape[3])
    if taken != found:
        raise ValueError(
            f"{name} hands over keys of {found[0]} channels and values of {found[1]}, and its attributes and config "
            f"say {taken[0]} and {taken[1]}; it cannot be given parameters of their size"
        )
    if asked.backend == "sdpa" and asked.options.get("softcap") is not None:
        raise ValueError(
            f"{name} asks for a soft cap on its logits, and the kernels of the sdpa path have none (stock transformers "
            "leaves it out there); load the model with attn_implementation='eager'"
        )
    column = [mod for mod in attached.mods if mod.needs_bos and type(mod).stage is not Mod.stage]
    if column and asked.key.shape[2] != asked.query.shape[2]:
        raise ValueError(
            f"{column[0].kind}: {name} attends to {asked.key.shape[2]} keys when the model has read "
            f"{asked.query.shape[2]} tokens, so which of them is the BOS is not known"
        )
    wide = [t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in asked.inputs]
    own, _ = attention_function.stock(asked.backend, module)(module, *wide, **asked.own_options)
    rows = attention_function.rows_of(asked.backend, module, *wide, **asked.own_options)
    ours = eager.attend(rows)[0].transpose(1, 2)
    if ours.shape != own.shape:
        ours = ours.reshape(own.shape)
    error = ((ours - own).norm() / own.norm()).item()
    if not error < TOLERANCE:
        raise ValueError(
            f"{name}'s own {asked.backend} attention does more than softmax(scale · q kᵀ + mask) v with the soft cap "
            f"and sinks that ropemods knows of: the two differ by {error:.1%} on the same inputs, so modifications of "
            "attention scores would change more than they say; those of rotary tables and embeddings still work on it"
        )


def _dropout(module: nn.Module, seen: Seen) -> float:
    """What the layer asks for in training: it is called again in training mode, as far as its attention."""
    module.training = True
    try:
        return float(_call_again(module, seen.args, seen.kwargs).options.get("dropout") or 0.0)
    finally:
        module.training = False


def check_training(model: PreTrainedModel) -> None:
    """Refuse what the first training step would, such as dropout beside a sink on kernels that cannot have both."""
    for site in anatomy_of(model).sites:
        if site.untrainable is not None:
            raise ValueError(f"{' and '.join(site.kinds)}: {site.untrainable}")


# What turns the queries


class _Made:
    """What the rotary modules gave out during a pass, so that the same can be made again from other frequencies."""

    def __init__(self) -> None:
        self.outputs: list[tuple[Any, nn.Module, tuple, dict[str, Any]]] = []

    def note(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        self.outputs.append((output, module, args, kwargs))

    def again(self, value: Any) -> Any:
        """`value` with every rotary output in it made anew, from the frequencies that stand now."""
        for output, module, args, kwargs in self.outputs:
            if value is output:
                return module(*args, **kwargs)
            if isinstance(output, tuple | list):
                for index, part in enumerate(output):
                    if value is part:
                        return module(*args, **kwargs)[index]
        if isinstance(value, dict):
            return {key: self.again(each) for key, each in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self.again(each) for each in value)
        return value


def _find_rotation(model: PreTrainedModel, module: nn.Module, seen: Seen, made: _Made) -> None:
    """Set the layer's table, pairing and direction of turning; no table where nothing turns its queries."""
    site = module.ropemods_site

    def queries() -> Tensor:
        return _call_again(module, made.again(seen.args), made.again(seen.kwargs)).query

    site.table, site.layout, site.rotated = None, None, False
    for table in anatomy_of(model).tables:
        if _turns(table, queries):
            site.table, site.rotated = table, True
            with _uneven(module, seen.call.query.shape[-1]):
                found = rope_tables.find_layout(table, queries)
            if found is not None:
                site.layout, site.direction = found
            return


def _call_again(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> attention_function.Asked:
    with attention_function.asked(module, _stop):
        try:
            module(*args, **kwargs)
        except _Reached as reached:
            return reached.asked
    raise RuntimeError(f"{type(module).__name__}, called again with what it was given, made no attention call")


def _stop(asked: attention_function.Asked) -> None:
    raise _Reached(asked)


@contextlib.contextmanager
def _uneven(module: nn.Module, width: int) -> Iterator[None]:
    """Inside, no weight of the layer that goes over a head's channels is the same for all of them.

    A norm behind the rotation then shows, also where its weights are all ones and would only be trained apart later.
    """
    weights = [p for p in module.parameters() if p.ndim == 1 and p.numel() == width]
    saved = [p.detach().clone() for p in weights]
    try:
        for p in weights:
            p.add_(torch.linspace(0.2, 1.0, width, dtype=p.dtype, device=p.device))
        yield
    finally:
        for p, value in zip(weights, saved, strict=True):
            p.copy_(value)


def _turns(table: Table, queries) -> bool:
    with rope_tables.frequencies(table, torch.zeros_like(table.live())):
        still = queries().double()
    with rope_tables.frequencies(table, torch.full_like(table.live(), 0.7)):
        moved = queries().double()
    return bool((moved - still).norm() > 1e-2 * still.norm())


def _check_rotation(model: PreTrainedModel, modules: list[nn.Module]) -> None:
    attached = model.ropemods_attached
    edits = [mod for mod in attached.mods if mod.edits_frequencies]
    if edits and not any(module.ropemods_site.rotated for module in modules):
        raise ValueError(
            f"{edits[0].kind}: no attention layer of {type(model).__name__} changes when the frequencies in its rotary "
            "tables (inv_freq) do, so editing them would do nothing; this model computes them elsewhere"
        )
    for mod in (mod for mod in attached.mods if mod.needs_layout):
        chosen = [m for m in modules if mod.kind in m.ropemods_site.kinds]
        if chosen and not any(m.ropemods_site.rotated for m in chosen):
            raise ValueError(
                f"{mod.kind}: in none of its layers do the queries turn with the frequencies in the model's rotary "
                "tables (inv_freq): they are not rotated, or by frequencies computed elsewhere"
            )
        for module in chosen:
            if module.ropemods_site.rotated and module.ropemods_site.layout is None:
                raise ValueError(
                    f"{mod.kind}: {type(model).__name__} pairs its rotary channels in no way that is known (halves or "
                    "neighbours, at the head's start or end), or changes queries after rotating them, as a norm with "
                    f"weights does (layer {module.ropemods_site.layer}, {type(module).__name__})"
                )
            if not module.ropemods_site.rotated:
                _dismiss(module, mod.kind)


def _dismiss(module: nn.Module, kind: str) -> None:
    """Take a stage off a layer that has nothing for it to act on."""
    site = module.ropemods_site
    site.kinds = tuple(each for each in site.kinds if each != kind)
    stages = module.ropemods
    assert isinstance(stages, Stages)
    delattr(stages, kind)
    if not site.kinds:
        del module.ropemods
