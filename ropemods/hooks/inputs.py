"""Hooks at the model's entrance: where the BOS stands, shared values, and the input embedding.

What they find travels to the attention layers as keyword arguments, which every transformers decoder hands down to its
attention function. So each forward pass carries its own, and a gradient-checkpointed layer is recomputed with the ones
it was first given, whatever the model has read since.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling
from transformers import PreTrainedModel

from ropemods import bos
from ropemods.mods.base import Call

BOS, SHARED = "ropemods_bos", "ropemods_shared"
REMEMBERED = "_ropemods_bos"


def install(model: PreTrainedModel) -> list:
    """Hook the model and the decoder inside it, so that either may be called; returns what removes the hooks."""
    handles = []
    decoder = decoder_of(model)
    for entrance in dict.fromkeys((model, decoder)):
        parameters = inspect.signature(type(entrance).forward).parameters
        entrance.ropemods_parameters = list(parameters)[1:]
        entrance.ropemods_open = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        handles.append(entrance.register_forward_pre_hook(_before, with_kwargs=True))
        handles.append(entrance.register_forward_hook(_after, with_kwargs=True))
    decoder.ropemods_owner = [model]  # in a list, so that the model does not become its own descendant
    model.ropemods_owner = [model]
    return handles


def decoder_of(model: PreTrainedModel) -> nn.Module:
    decoder = model.get_decoder()
    # A few models call their output layer the decoder.
    return decoder if isinstance(decoder, PreTrainedModel) else model.base_model


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
    if attached.bos_active and given.get(BOS) is None:
        added[BOS] = _locate(model, given)
    if attached.shared_active and given.get(SHARED) is None:
        added[SHARED] = model.ropemods({}, Call())
    if getattr(model, "ropemods_carries", False):
        model.ropemods_told = {k: v for k, v in (given | added).items() if k in (BOS, SHARED) and v is not None}
    return (args, kwargs | added) if entrance.ropemods_open else None


def _after(entrance: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    found = kwargs.get(BOS)
    cache = getattr(output, "past_key_values", None)
    # A cache that the model made for itself carries the prompt's BOS on to the next call.
    if found is not None and cache is not None:
        setattr(cache, REMEMBERED, found)


def _locate(model: PreTrainedModel, given: dict[str, Any]) -> bos.Bos:
    ids, cache = given.get("input_ids"), given.get("past_key_values")
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    positions = positions if isinstance(positions, Tensor) and positions.ndim == 2 else None
    past = cache.get_seq_length() if cache is not None else 0
    before = getattr(cache, REMEMBERED, None)
    continues = before is not None if is_compiling() else int(past) > 0
    if continues:
        if before is None:
            raise ValueError(
                "this cache was filled without ropemods seeing the prompt, so where its BOS stands is unknown; "
                "run the prompt through the modified model with this cache"
            )
        tokens = (ids if ids is not None else given["inputs_embeds"]).shape[1]
        return bos.recall(before, tokens, past, positions)
    if ids is None:
        raise ValueError(
            "the model was called with inputs_embeds and no input_ids, so BOS cannot be found by its token; "
            "pass input_ids, or set the strength of the BOS modifications to 0"
        )
    mask_BT = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
    if mask_BT is not None and mask_BT.shape[1] != ids.shape[1]:
        raise ValueError(
            f"the model was called with an attention_mask of {mask_BT.shape[1]} columns, {ids.shape[1]} tokens and no "
            "cache, so where these tokens' BOS stands is unknown; pass the cache that holds the others, or all tokens"
        )
    found, first_BT = bos.find(ids, mask_BT, positions)
    if is_compiling():  # values cannot be looked at while a graph is traced
        return found
    caching = given.get("use_cache")
    caching = model.config.get_text_config().use_cache if caching is None else caching
    unmasked = mask is None and cache is None and not caching
    problem = bos.complaint(
        ids,
        first_BT,
        model.ropemods_attached.bos_token_id,
        kept_apart=unmasked or (mask is not None and mask_BT is None),
    )
    if problem is not None:
        raise ValueError(problem)
    one_each = int(first_BT.sum(1).max()) == 1
    return found._replace(column_BN=found.column_BN[:, -1:]) if one_each else found


def install_embedding(embedding: nn.Module):
    return embedding.register_forward_hook(_after_embedding)


def _after_embedding(embedding: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return embedding.ropemods(output, args[0], embedding)
