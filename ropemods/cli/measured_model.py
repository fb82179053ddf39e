"""What `measure` and `suggest` are run on: any model, its tokenizer, a text, and the ranks of a launcher."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ropemods.mod_words import registering
from ropemods.settings import files
from ropemods.settings.options import REQUIRED, option

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from ropemods.leakage.documents import Documents


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The options that `measure` and `suggest` share."""

    model: str = option(
        REQUIRED, "folder of a model, stock, modified or adapter, or a name on the hub", positional=True
    )
    gguf_file: str | None = option(
        None, "the GGUF file in MODEL to read (for an adapter, in its base)", metavar="FILE", unset="none"
    )
    text: str = option(
        REQUIRED, "a .txt, .jsonl or .parquet file (also .xz, .gz), or a dataset as name:config:split", metavar="FILE"
    )
    join: bool = option(False, "join short documents to long ones; crops then run across their borders")
    separator: str = option("auto", "what parts documents in a .txt file: auto, none, blank-line or a text")
    column: str = option("text", "the field with the text in jsonl, parquet and datasets", metavar="NAME")
    tokenizer: str | None = option(
        None, "folder or name of the tokenizer", metavar="NAME", unset="the one beside MODEL"
    )
    bos_token_id: int | None = option(
        None, "token that sequences begin with", metavar="TOKEN", unset="the tokenizer's BOS token"
    )
    load_dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "dtype to load the model in; auto is the checkpoint's"
    )
    attn_implementation: str | None = option(
        None, "sdpa or eager", metavar="NAME", unset="what transformers chooses for the model"
    )
    device: str | None = option(None, "cpu, cuda, cuda:1, …", metavar="NAME", unset="a GPU if there is one")
    device_map: str | None = option(
        None, "spread the model over devices, as transformers does (auto)", metavar="NAME", unset="one device"
    )
    trust_remote_code: bool = option(False, "run model code that comes with the checkpoint")
    register: tuple[Any, ...] = registering()


@contextlib.contextmanager
def launched() -> Iterator[int]:
    """Join the other ranks that torchrun, accelerate or deepspeed started; gives this one's rank."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0
        return
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def load(options: Subject) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The model on its device, and the tokenizer."""

    import ropemods
    from ropemods.cli.stock_checkpoints import check_name, load_config, readable, tokenizer_of
    from ropemods.model import adapters
    from ropemods.settings.extras import need

    if options.device_map is not None:
        need("accelerate", "--device_map")
    check_name(options.model, options.gguf_file)
    device = _device(options.device)
    trust = options.trust_remote_code
    chosen: dict[str, Any] = {"dtype": options.load_dtype, "trust_remote_code": trust}
    for name in ("attn_implementation", "device_map"):
        if (value := getattr(options, name)) is not None:
            chosen[name] = value
    file, base = options.gguf_file, options.model
    with readable(options.model):
        if adapters.is_adapter(options.model):
            config, record = adapters.read(options.model)
            base = config.base_model_name_or_path or ""
            if record is not None:
                model = ropemods.from_pretrained(options.model, gguf_file=file, **chosen)
            else:
                from peft import PeftModel

                model = PeftModel.from_pretrained(_stock(base, file, chosen), options.model)
        elif file is None and load_config(options.model, trust_remote_code=trust)[1] is not None:
            model = ropemods.from_pretrained(options.model, **chosen)
        else:
            model = _stock(options.model, file, chosen)
    if options.device_map is None:
        model = model.to(device)
    places = [options.tokenizer] if options.tokenizer is not None else [options.model, base]
    found = (tokenizer_of(place, file if place == base else None, trust_remote_code=trust) for place in places)
    tokenizer = next((each for each in found if each is not None), None)
    if tokenizer is None:
        raise ValueError(f"there is no tokenizer beside {places[0]}; name one with --tokenizer")
    return model.eval(), tokenizer


def _stock(name: str, gguf_file: str | None, chosen: dict[str, Any]) -> nn.Module:
    from transformers import AutoModelForCausalLM

    import ropemods

    if gguf_file is not None:
        return ropemods.from_pretrained(name, gguf_file=gguf_file, **chosen)
    return AutoModelForCausalLM.from_pretrained(name, **chosen)


def _device(name: str | None) -> torch.device:
    """The device of that name, or the one that there is; checked before anything is loaded onto it."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used ({why}); give cpu, cuda or cuda:1") from None
    if found.type == "meta":
        raise ValueError("--device meta holds no numbers; give cpu, cuda or cuda:1")
    return found


def read(options: Subject, length: int, seed: int) -> Documents:
    """The documents, joined if that was asked for."""
    from ropemods.leakage.crops import EXCERPT
    from ropemods.leakage.documents import join_short, read_documents

    documents = read_documents(options.text, separator=options.separator, column=options.column, seed=seed)
    return join_short(documents, characters=EXCERPT * length, seed=seed) if options.join else documents


def check_writable(*paths: str | None, read: Iterable[str] = ()) -> None:
    """An error now for what would be one after minutes of work. `read` are files that must not be written over."""
    taken = {os.path.realpath(path): path for path in read if os.path.isfile(path)}
    for path in paths:
        if path is None:
            continue
        where = os.path.realpath(files.check_writable(path))
        if where in taken:
            raise ValueError(f"{path} would be written over {taken[where]}; name another file")
        if os.path.isfile(where) and not _ours(where):
            raise ValueError(f"{path} is there, and nothing that ropemods wrote; name another file, or remove it first")
        if os.path.isfile(where) or not os.path.exists(where):
            taken[where] = path


def _ours(file: str) -> bool:
    """Whether a file begins as what these commands write, or is empty: what a second run may write over."""
    with open(file, "rb") as opened:
        start = opened.read(64).strip().lower()
    return not start or start.startswith(b"<!doctype html>") or (start.startswith(b"{") and b'"schema"' in start)
