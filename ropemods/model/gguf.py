"""Models that come in a GGUF file: `model_name_or_path` is the folder or the hub's name, `gguf_file` the file in it.

transformers reads such a file with the gguf package and unpacks its weights. Three things are missing there, and are
here: an error that names the file and its architecture where it cannot be read, an error where the file scales rotary
frequencies (transformers leaves that out, and would run another model), and the end of the entry in the config that
calls the unpacked model quantised still, with which it neither trains nor saves.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file, is_gguf_available
from transformers.utils.quantization_config import GgufConfig

from ropemods.settings.extras import MissingPackage

TOKENS, BOS = "tokenizer.ggml.tokens", "tokenizer.ggml.bos_token_id"
SCALING_KEYS = (".rope.scaling.factor", ".rope.scale_linear")
SCALING_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def load(path: str | os.PathLike[str], gguf_file: str, hub: dict[str, Any], **hf_kwargs: Any) -> PreTrainedModel:
    """The stock model, its weights unpacked: it trains, and saves as safetensors.

    `hub` are transformers' keyword arguments that say how to find a file, `hf_kwargs` the others.
    """
    config = load_config(path, gguf_file, **hub)
    with reading(path, gguf_file, **hub):
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            gguf_file=gguf_file,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
            **hub,
            **hf_kwargs,
        )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(f"{gguf_file} lacks {len(missing)} parameters of {type(model).__name__}, such as {missing[0]}")
    return model


def load_config(path: str | os.PathLike[str], gguf_file: str, **hub: Any) -> PreTrainedConfig:
    """The config that the file's header gives, where that is all that the header says of positions."""
    with reading(path, gguf_file, **hub):
        config = AutoConfig.from_pretrained(path, gguf_file=gguf_file, **hub)
    file = _file(path, gguf_file, hub)
    scaling = _scaling(file)
    if scaling is not None and _unscaled(config):
        raise ValueError(
            f"{file} scales its rotary frequencies ({scaling}), and transformers {transformers.__version__} leaves "
            "that out when it reads a GGUF, so another model would run; load the model from its safetensors"
        )
    return config


def load_tokenizer(path: str | os.PathLike[str], gguf_file: str, **hub: Any) -> Any:
    """The tokenizer in the file; None where it holds none."""
    said, _ = header(_file(path, gguf_file, hub))
    if TOKENS not in said:
        return None
    with reading(path, gguf_file, **hub):
        tokenizer = AutoTokenizer.from_pretrained(path, gguf_file=gguf_file, **hub)
    if tokenizer.bos_token_id is None and BOS in said:  # older transformers pass over a token 0
        tokenizer.bos_token = tokenizer.convert_ids_to_tokens(said[BOS])
    return tokenizer


def settle(model: nn.Module) -> str | None:
    """End the quantisation of a model that transformers has unpacked; returns what there is to say of it.

    A model whose weights are still packed is left as it is: transformers can run it, but not train or save it.
    """
    if getattr(model, "quantization_method", None) != "gguf" or _packed(model):
        return None
    quantizer: Any = model.hf_quantizer
    file = quantizer.quantization_config.gguf_file
    quantizer.remove_quantization_config(model)
    vars(model.config).pop("_is_quantized", None)
    return (
        f"{file} was unpacked when it was loaded, so the quantisation entry was taken off the model's config: it "
        "trains, and saves as safetensors"
    )


def _packed(model: nn.Module) -> bool:
    return any(not parameter.is_floating_point() for parameter in model.parameters())


def hint(path: str | os.PathLike[str]) -> str | None:
    """What to do about a folder that holds GGUF files and no checkpoint; None where it holds none."""
    files = _beside(Path(path).expanduser())
    return f"{path} holds GGUF files ({', '.join(files)}); name one of them as gguf_file" if files else None


def _beside(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("*.gguf")) if folder.is_dir() else []


@contextlib.contextmanager
def reading(path: str | os.PathLike[str], gguf_file: str, **hub: Any) -> Iterator[None]:
    """Say of which file, and of which architecture, transformers could not make a model."""
    file = _file(path, gguf_file, hub)
    architecture = header(file)[0]["general.architecture"]
    try:
        yield
    except Exception as error:  # its readers raise a different class for each thing that they do not know
        raise ValueError(
            f"{file}: transformers {transformers.__version__} could not read this GGUF, whose architecture is "
            f"{architecture!r}: {error or type(error).__name__}"
        ) from error


def require() -> None:
    """Raise where what transformers reads GGUF files with is not installed."""
    if not is_gguf_available():
        raise MissingPackage(
            "GGUF files are read with the package gguf, which is missing: pip install 'ropemods[gguf]'"
        )


def _file(path: str | os.PathLike[str], gguf_file: str, hub: dict[str, Any]) -> Path:
    """Where the file is, fetched from the hub if need be."""
    require()
    folder = Path(path).expanduser()
    if folder.is_file():
        raise ValueError(f"{path} is a file; give the folder that it is in, and gguf_file={folder.name}")
    if not folder.is_dir():
        found = cached_file(str(path), gguf_file, **{k: v for k, v in hub.items() if k != "trust_remote_code"})
        return Path(found)  # type: ignore[arg-type]
    if not (folder / gguf_file).is_file():
        others = _beside(folder)
        found = f"its GGUF files are {', '.join(others)}" if others else "there are no GGUF files in it"
        raise FileNotFoundError(
            f"{path} has no file {gguf_file}; {found}. Name one that is there, or leave gguf_file out"
        )
    return folder / gguf_file


def header(file: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The file's metadata (of long lists only that they are there) and the names of its tensors."""
    from transformers.integrations.gguf.reader import read_gguf_metadata

    try:
        return read_gguf_metadata(str(file))
    except Exception as error:  # what a file that is cut short or no GGUF at all makes of the reader
        raise ValueError(f"{file} is no GGUF file, or one that is damaged: {error or type(error).__name__}") from error


def scaling_of(metadata: dict[str, Any]) -> str | None:
    """What in a file's metadata scales the rotary frequencies."""
    found = ((k, v) for k, v in metadata.items() if k.endswith(SCALING_KEYS) and v not in (0, 1))
    return next((f"{key} is {value:g}" for key, value in found), None)


def _scaling(file: Path) -> str | None:
    """What in the file scales the rotary frequencies."""
    metadata, tensors = header(file)
    if (said := scaling_of(metadata)) is not None:
        return said
    if not set(tensors) & set(SCALING_TENSORS):
        return None
    from gguf import GGUFReader

    for tensor in GGUFReader(file).tensors:
        if tensor.name in SCALING_TENSORS and (tensor.data != 1).any():
            return tensor.name
    return None


def _unscaled(config: PreTrainedConfig) -> bool:
    parameters = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    tables = [part for part in parameters.values() if isinstance(part, dict)] or [parameters]
    return all(table.get("rope_type", "default") == "default" for table in tables)
