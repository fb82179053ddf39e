"""Hooks at the model's entrance: where the BOS stands, and shared values.

What they find travels to the attention layers as keyword arguments, which every transformers decoder hands down to its
attention function. So each forward pass carries its own, and a gradient-checkpointed layer is recomputed with the ones
it was first given, whatever the model has read since.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from transformers import PreTrainedModel

from ropemods.attention.rows import shown
from ropemods.model import bos, cached_bos
from ropemods.model.anatomy import anatomy_of
from ropemods.model.batch_checks import checked
from ropemods.mods.base import Call

BOS, SHARED = "ropemods_bos", "ropemods_shared"


def install(model: PreTrainedModel) -> list:
    """Hook the model and the decoder inside it, so that either may be called; returns what removes the hooks."""
    handles = []
    for entrance in anatomy_of(model).entrances:
        parameters = inspect.signature(type(entrance).forward).parameters
        entrance.ropemods_parameters = list(parameters)[1:]
        entrance.ropemods_open = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        handles.append(entrance.register_forward_pre_hook(_before, with_kwargs=True))
        handles.append(entrance.register_forward_hook(_after, with_kwargs=True))
        entrance.ropemods_owner = [model]  # in a list, so that the model does not become its own descendant
    cached_bos.follow_caches()
    decoder = anatomy_of(model).entrances[-1]
    # The decoder knows the positions best; a model around it that hands on what it found need not remember it too.
    model.ropemods_remembers = model is decoder or not decoder.ropemods_open
    decoder.ropemods_remembers = True
    return handles


def carry(model: PreTrainedModel, layers: list[nn.Module], rotary_modules: list[nn.Module]) -> list:
    """For models that drop keyword arguments on the way: their rotary tables carry what was found to the layers.

    The tables are made anew in each forward pass and handed to every layer, a recomputed layer gets the ones it was
    first given, so they are as good a messenger as a keyword argument. Returns what removes the hooks.
    """
    model.ropemods_carries = True
    handles = [m.register_forward_hook(partial(_load, model)) for m in dict.fromkeys(rotary_modules)]
    return handles + [layer.register_forward_pre_hook(_unload, with_kwargs=True) for layer in layers]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)


def _load(model: PreTrainedModel, rotary: nn.Module, args: tuple, output: Any) -> None:
    for tensor in _tensors(output):
        tensor.ropemods_told = model.ropemods_told  # type: ignore[attr-defined]


def _unload(layer: nn.Module, args: tuple, kwargs: dict[str, Any]):
    for tensor in _tensors([*args, *kwargs.values()]):
        told = getattr(tensor, "ropemods_told", None)
        if told:
            return args, told | kwargs
    return None


def _before(entrance: nn.Module, args: tuple, kwargs: dict[str, Any]):
    model = entrance.ropemods_owner[0]
    attached = model.ropemods_attached
    given = dict(zip(entrance.ropemods_parameters, args, strict=False)) | kwargs
    added: dict[str, Any] = {}
    told = given.get(BOS)
    ids = given.get("input_ids")
    if attached.bos_active:
        added[BOS], ids = _locate(model, given) if told is None else (_measure(model, given, told), ids)
    elif attached.rows_active:
        ids = _kept_apart(model, given)
    if attached.shared_active and given.get(SHARED) is None:
        added[SHARED] = model.ropemods({}, Call())
    if getattr(model, "ropemods_carries", False):
        model.ropemods_told = {k: v for k, v in (given | added).items() if k in (BOS, SHARED) and v is not None}
    if not entrance.ropemods_open:
        added = {}
    if ids is not given.get("input_ids"):  # the model reads what has been checked, so that no graph leaves that out
        place = entrance.ropemods_parameters.index("input_ids")
        if place < len(args):
            args = (*args[:place], ids, *args[place + 1 :])
        else:
            added["input_ids"] = ids
    return args, kwargs | added


def _after(entrance: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    found = kwargs.get(BOS)
    if found is None or not entrance.ropemods_remembers:
        return
    given = dict(zip(entrance.ropemods_parameters, args, strict=False)) | kwargs
    # A cache that the model made for itself carries the prompt's BOS on to the next call.
    cache = given.get("past_key_values")
    cache = getattr(output, "past_key_values", None) if cache is None else cache
    if cache is not None:
        before = cached_bos.recall(cache)
        if before is not None and before.column_B1.shape[0] != found.column_BN.shape[0]:
            before = None  # of what the cache held before it was reset
        cached_bos.remember(cache, bos.memory(found, before))


def _locate(model: PreTrainedModel, given: dict[str, Any]) -> tuple[bos.Bos, Tensor | None]:
    """Where the BOS of every query is, and the token ids, checked."""
    ids, cache = given.get("input_ids"), given.get("past_key_values")
    past = _past(given)
    before = None if isinstance(past, int) and past == 0 else cached_bos.recall(cache)
    index = _index(ids if ids is not None else given["inputs_embeds"][..., 0], given)
    batch, tokens = index.shape
    mask, positions = _mask(given), _positions(given, batch)
    if before is not None and before.column_B1.shape[0] != batch:
        raise ValueError(
            f"this call has {batch} rows, and the BOS of {before.column_B1.shape[0]} is remembered with its cache; "
            "repeat or select a cache's rows by its own methods (reorder_cache, batch_select_indices, "
            "batch_repeat_interleave)"
        )
    if cache is None and mask is not None and mask.shape[-1] != tokens:
        raise ValueError(
            f"the model was called with an attention_mask of {mask.shape[-1]} columns, {tokens} tokens and no "
            "cache, so where these tokens' BOS stands is unknown; pass the cache that holds the others, or all tokens"
        )
    packed = None
    if _separates(model, given) and positions is not None:
        column = bos.by_positions(positions)
    elif mask is not None and mask.ndim == 4:
        column = bos.by_visibility(shown(mask).any(1).expand(batch, tokens, -1), past)
    else:
        here = None
        column = torch.zeros_like(index[:, :1])
        if mask is not None:
            column = bos.by_padding(mask, past + tokens)
            here = _here(mask, index)
            if ids is not None:
                packed = bos.behind_holes(ids, here, model.ropemods_attached.bos_token_id)
        if positions is not None and tokens > 1:
            again = bos.restarts(positions, here)
            packed = again if packed is None else packed | again
    found = bos.find(
        column,
        ids,
        index if positions is None else positions,
        bos_token_id=model.ropemods_attached.bos_token_id,
        past=past,
        before=before,
        recall=mask is None or mask.ndim == 4,
        packed_B1=None if packed is None else packed.any(1, keepdim=True),
    )
    return _checked(model, found, ids, decodes=before is not None and tokens == 1)


def _checked(
    model: PreTrainedModel, found: bos.Found, ids: Tensor | None, *, decodes: bool
) -> tuple[bos.Bos, Tensor | None]:
    column = found.bos.column_BN
    value = checked(
        column if ids is None else ids,
        *(found.problem_BN, column, found.token_BN, model.ropemods_attached.bos_token_id),
        decodes=decodes,
    )
    if ids is None:
        return found.bos._replace(column_BN=value), None
    one_each = not is_compiling() and column.shape[1] > 1 and not bos.memory(found.bos, None).several_B1.any()
    return bos.narrowed(found.bos) if one_each else found.bos, value


def _measure(model: PreTrainedModel, given: dict[str, Any], told: bos.Bos) -> bos.Bos:
    """What an outer entrance has found, with the positions that reach the rotary tables."""
    positions = given.get("position_ids")
    if not isinstance(positions, Tensor):
        return told
    if positions.ndim == 2:
        return bos.measured(told, positions.expand(told.distance_BT.shape[0], -1))
    # Several axes (time, height, width), sometimes below the positions of the text alone.
    axes = positions[-3:]
    if model.ropemods_attached.turns_active:
        several = (axes.amax(0) != axes.amin(0)).any(1, keepdim=True) * bos.AXES
        problem = several.expand_as(told.column_BN)
        column = told.column_BN
        told = told._replace(column_BN=checked(column, problem, column, column, -1, decodes=axes.shape[2] == 1))
    return bos.measured(told, axes[0].expand(told.distance_BT.shape[0], -1))


def _kept_apart(model: PreTrainedModel, given: dict[str, Any]) -> Tensor | None:
    """The token ids, checked: packed sequences that would read each other are refused without a BOS too."""
    ids, mask = given.get("input_ids"), _mask(given)
    positions = given.get("position_ids")
    if ids is None or _separates(model, given) or (mask is not None and mask.ndim == 4):
        return ids
    if not isinstance(positions, Tensor) or positions.ndim != 2 or positions.shape[1] == 1:
        return ids
    positions, column = positions.expand(ids.shape[0], -1), torch.zeros_like(ids[:, :1])
    again = bos.restarts(positions, None if mask is None else _here(mask, _index(ids, given)))
    problem = again.any(1, keepdim=True) * bos.PACKED
    return checked(ids, problem, column, column, -1, decodes=False)


def _separates(model: PreTrainedModel, given: dict[str, Any]) -> bool:
    """Whether transformers keeps sequences apart by their positions: without mask and cache."""
    caching = given.get("use_cache")
    caching = getattr(model.config.get_text_config(), "use_cache", False) if caching is None else caching
    return given.get("attention_mask") is None and given.get("past_key_values") is None and not caching


def _past(given: dict[str, Any]) -> int | Tensor:
    cache = given.get("past_key_values")
    return cache.get_seq_length() if cache is not None else 0


def _index(tokens_BT: Tensor, given: dict[str, Any]) -> Tensor:
    """The column of each token of this call (B, T)."""
    batch, tokens = tokens_BT.shape
    return torch.arange(tokens, device=tokens_BT.device).expand(batch, -1) + _past(given)


def _here(mask_BS: Tensor, index_BT: Tensor) -> Tensor:
    """Which tokens of this call a mask shows (B, T)."""
    return mask_BS.bool().gather(1, index_BT.clamp(max=mask_BS.shape[1] - 1))


def _mask(given: dict[str, Any]) -> Tensor | None:
    """The padding (B, S), or what queries see (B or 1, heads or 1, T, S); None where they see all before them."""
    mask = given.get("attention_mask")
    if isinstance(mask, dict):  # one a kind of layer, as `generate` makes them for static caches
        mask = mask["full_attention"] if "full_attention" in mask else next(iter(mask.values()))
    return mask if isinstance(mask, Tensor) and mask.ndim in (2, 4) else None


def _positions(given: dict[str, Any], batch: int) -> Tensor | None:
    positions = given.get("position_ids")
    return positions.expand(batch, -1) if isinstance(positions, Tensor) and positions.ndim == 2 else None
