"""A modified model as a GGUF file for llama.cpp, after the pattern of a GGUF that there is of the same model, the base.

From the base come the metadata, the tokenizer, and the names, types and layout of the tensors; from the model come its
weights. A row of a tensor that is what the base unpacks to keeps the base's bytes, whatever their type; another is
packed anew into that type, where the gguf package can. Edited frequencies become `rope_freqs.weight`: a factor a band,
which llama.cpp divides the band's angle by. Its channels are paired otherwise than transformers', its bands are in the
same order.

The base is taken for the model's only where every tensor resembles the model's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ropemods.model import gguf
from ropemods.model.anatomy import anatomy_of
from ropemods.model.native_rope import DROPPED, parts
from ropemods.mods.base import Edits, edited

FREQUENCIES, EMBEDDING, HEAD = "rope_freqs.weight", "token_embd.weight", "output.weight"
READERS = ("llama", "arcee", "granite")
"""Architectures that read the factors, and turn every layer by them: `rope_freqs` and `get_rope_factors` in llama.cpp's
src/models/*.cpp, as llama-cpp-python 0.3.36 ships it. Others refuse a file for a tensor too many, also those for which
the gguf package's own table has it (qwen2, glm4); some turn only a part of their layers by it (gemma4, llama4)."""
RESEMBLES = 0.5
"""The least cosine between a tensor and the base's: four-bit rounding leaves 0.99, other weights or another order 0."""


def frequency_factors(model: PreTrainedModel, edits: Edits, stock: dict[str, Any]) -> tuple[Tensor, Tensor] | str:
    """What divides θ's own frequencies in the stock model, and the stock ones in the edited; or why no factors do."""
    kinds = sorted({part.get("rope_type", "default") for part in parts(model, stock)})
    if kinds not in (["default"], ["llama3"]):
        return f"the factors of a GGUF go over the rope types default and llama3, and its own is {', '.join(kinds)}"
    if len(anatomy_of(model).tables) > 1:
        return "its layers rotate by tables of their own, and a GGUF has one for all"
    stock_F = anatomy_of(model).tables[0].pristine["inv_freq"].cpu().double()
    theta_F = float(stock["rope_theta"]) ** -(torch.arange(len(stock_F)).double() / len(stock_F))

    edited_F = edited(stock_F, edits)
    return (theta_F / stock_F).float(), torch.where(edited_F == 0, DROPPED, stock_F / edited_F).float()


def write(
    path: Path,
    base: Path,
    state: dict[str, Tensor],
    config: PreTrainedConfig,
    factors: tuple[Tensor, Tensor] | None,
) -> None:
    """Write `path`. `state` are the stock model's parameters by transformers' names, `factors` from
    `frequency_factors`, or None where the frequencies stay the base's."""
    gguf.require()
    if not base.is_file():
        raise FileNotFoundError(f"{base}: there is no such GGUF file; give one that was made of this model")
    gguf.header(base)
    import gguf as package

    file = package.GGUFReader(base)
    said = {key: field.contents() for key, field in file.fields.items() if not key.startswith("GGUF.")}
    architecture = said[package.Keys.General.ARCHITECTURE]
    there = {tensor.name: tensor for tensor in file.tensors}
    wanted = _by_their_names(state, config, base, architecture, set(there) - {FREQUENCIES})
    out = package.GGUFWriter(path, architecture)
    for key, field in file.fields.items():
        if key == package.Keys.General.ALIGNMENT:
            out.add_custom_alignment(said[key])
        elif key in said and key != package.Keys.General.ARCHITECTURE:
            listed = field.types[-1] if field.types[0] is package.GGUFValueType.ARRAY else None
            out.add_key_value(key, said[key], field.types[0], sub_type=listed)
    written = [name for name in there if name != FREQUENCIES] + [name for name in wanted if name not in there]
    frequencies = there[FREQUENCIES].data if FREQUENCIES in there else None
    if factors is not None:
        found_F = torch.ones(len(factors[0])) if frequencies is None else torch.from_numpy(frequencies.copy())
        _check_frequencies(base, architecture, said, found_F, factors[0], config)
        frequencies = (found_F * factors[1]).numpy()
    if frequencies is not None:
        out.add_tensor_info(FREQUENCIES, frequencies.shape, frequencies.dtype, frequencies.nbytes)
    for name in written:
        like = there.get(name, there[EMBEDDING])
        out.add_tensor_info(name, like.data.shape, like.data.dtype, like.data.nbytes, like.tensor_type)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_ti_data_to_file()
    if frequencies is not None:
        out.write_tensor_data(frequencies)
    for name in written:
        out.write_tensor_data(_packed(name, wanted[name], there.get(name, there[EMBEDDING]), config, base))
    out.close()


def _by_their_names(
    state: dict[str, Tensor], config: PreTrainedConfig, base: Path, architecture: str, there: set[str]
) -> dict[str, Tensor]:
    import gguf as package

    text = config.get_text_config(decoder=True)
    known = {name: number for number, name in package.MODEL_ARCH_NAMES.items()}
    names = package.get_tensor_name_map(known[architecture], text.num_hidden_layers) if architecture in known else None
    other = f"{base} is no GGUF of this model ({text.model_type}; the file says {architecture!r}): "
    wanted = {}
    for key, value in state.items():
        name = names and names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None or (name not in there and name != HEAD):
            raise ValueError(
                f"{other}it has no tensor for {key}. Give one that was made of the model before it was tuned"
            )
        if name in there or not text.tie_word_embeddings:
            wanted[name] = value
    if more := sorted(there - set(wanted)):
        raise ValueError(
            f"{other}the model has nothing for its {more[0]} ({len(more)} such in all). Give the model's own"
        )
    return wanted


def _check_frequencies(
    base: Path, architecture: str, said: dict[str, Any], found_F: Tensor, stock_F: Tensor, config: PreTrainedConfig
) -> None:
    """An error where the base's architecture reads no factors, or its frequencies are not those of the stock model."""
    if architecture not in READERS:
        raise ValueError(
            f"{base} is of the architecture {architecture!r}, for which llama.cpp reads no {FREQUENCIES}, so changed "
            f"frequencies cannot be written there. It reads one for {', '.join(READERS)}"
        )
    theta = float(config.get_text_config(decoder=True).rope_parameters["rope_theta"])
    found_theta = float(said.get(f"{architecture}.rope.freq_base", 10000.0))
    channels = said.get(f"{architecture}.rope.dimension_count", 2 * len(stock_F))
    scaled = gguf.scaling_of(said)
    if abs(found_theta / theta - 1) > 1e-5 or channels != 2 * len(stock_F) or scaled:
        raise ValueError(
            f"{base} is no GGUF of this model: it turns {channels} channels of a head by θ {found_theta:g}"
            f"{f' ({scaled})' if scaled else ''}, and the model {2 * len(stock_F)} by θ {theta:g}"
        )
    if found_F.shape != stock_F.shape or not torch.allclose(found_F, stock_F, rtol=1e-4):
        raise ValueError(
            f"{base} is no GGUF of this model: it divides the frequencies by {_shown(found_F)} and the stock model by "
            f"{_shown(stock_F)}; give one that was made of the model before it was modified"
        )


def _shown(factors_F: Tensor) -> str:
    return f"{len(factors_F)} factors from {factors_F.min():g} to {factors_F.max():g}"


def _packed(name: str, weight: Tensor, like: Any, config: PreTrainedConfig, base: Path) -> Any:
    """The model's tensor in the layout and the type of the base's."""
    import gguf as package
    import numpy

    kind = like.tensor_type
    own = torch.from_numpy(package.dequantize(like.data, kind).astype(numpy.float32))
    if own.shape != weight.shape:
        raise ValueError(
            f"{base} is no GGUF of this model: its {name} is {tuple(own.shape)}, and the model's {tuple(weight.shape)}"
        )
    values = weight.detach().cpu().float()
    layouts = [values]
    text = config.get_text_config(decoder=True)
    heads = {"attn_q": text.num_attention_heads, "attn_k": text.num_key_value_heads}.get(name.split(".")[-2])
    if heads is not None:  # (f, f + F) here may be (2f, 2f + 1) there
        layouts.append(values.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(values.shape))
    values = max(layouts, key=lambda each: _cosine(each, own))
    if _cosine(values, own) < RESEMBLES:
        raise ValueError(
            f"{base} is no GGUF of this model: its {name} has nothing in common with the model's (cosine "
            f"{_cosine(values, own):.2f}). Give one that was made of the model before it was tuned"
        )
    packed, by_row = like.data.copy(), values.reshape(-1, values.shape[-1])
    rows = (by_row != own.reshape(by_row.shape)).any(1).numpy()
    if rows.any():
        try:
            packed.reshape(len(rows), -1)[rows] = package.quantize(by_row.numpy()[rows], kind)
        except NotImplementedError as error:
            raise ValueError(
                f"{name} is {kind.name} in {base}, its values were changed, and the package gguf does not quantise to "
                "that type; give a base where it is F32, F16, BF16, Q8_0, Q5_1, Q5_0, Q4_1 or Q4_0"
            ) from error
    return packed


def _cosine(one: Tensor, other: Tensor) -> float:
    if torch.equal(one, other):
        return 1.0
    return float(torch.cosine_similarity(one.flatten(), other.flatten(), dim=0))
