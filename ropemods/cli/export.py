"""`ropemods export`: from a modified checkpoint to a stock one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ropemods.cli.command import Command
from ropemods.mod_words import registering
from ropemods.settings.options import REQUIRED, option


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write a modified checkpoint as a stock one that any engine runs. The modified frequencies go into the rope
    parameters and a replaced BOS into its embedding row; an adapter is merged into its base first. A modification that
    no stock checkpoint can hold is an error that says which and why. With --gguf OUTPUT is a GGUF file for llama.cpp.
    """

    path: str = option(REQUIRED, "folder of a modified checkpoint or adapter, or a name on the hub", positional=True)
    output: str = option(REQUIRED, "folder to write, or with --gguf a file; made if not there", positional=True)
    gguf: str | None = option(
        None,
        "write a GGUF like this one of the model before it was tuned: its metadata, tokenizer, types",
        metavar="BASE.gguf",
        unset="a stock checkpoint",
    )
    rope: Literal["native", "longrope"] = option(
        "native", "how changed frequencies are written: longrope is a list of factors, which more engines read"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", "dtype to load and save in")
    trust_remote_code: bool = option(False, "run model code that comes with the checkpoint")
    register: tuple[Any, ...] = registering()
    overwrite: bool = option(False, "replace the checkpoint in OUTPUT")


def run(options: Options) -> None:
    import ropemods
    from ropemods.cli.folders import check_room, new_file, new_folder
    from ropemods.cli.stock_checkpoints import modified_model, quieten, tokenizer_of
    from ropemods.model.adapters import is_adapter

    quieten()
    beside = [options.path]

    def model() -> Any:
        found: Any = modified_model(options.path, dtype=options.dtype, trust_remote_code=options.trust_remote_code)
        if not is_adapter(options.path):
            return found
        beside.append(found.active_peft_config.base_model_name_or_path)
        return found.merge_and_unload()

    if options.gguf is not None:
        with new_file(options.output, like=options.gguf, overwrite=options.overwrite) as file:
            ropemods.export(model(), file, rope=options.rope, gguf=options.gguf)
        print(f"wrote {options.output}: a GGUF for llama.cpp, with the tokenizer of {options.gguf}")
        return
    with new_folder(options.output, source=options.path, overwrite=options.overwrite) as folder:
        whole = model()
        check_room(folder, options.output, whole)
        ropemods.export(whole, folder, rope=options.rope)
        tokenizers = (tokenizer_of(name, trust_remote_code=options.trust_remote_code) for name in beside)
        tokenizer = next((found for found in tokenizers if found is not None), None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    print(f"wrote {options.output}: a stock checkpoint{', with its tokenizer' if tokenizer else ''}. It loads with\n")
    print("    from transformers import AutoModelForCausalLM")
    print(f'    model = AutoModelForCausalLM.from_pretrained("{options.output}")')
    if '"proportional"' in Path(options.output, "config.json").read_text(encoding="utf-8"):
        print(
            "\nnote: its rope type is 'proportional'. SGLang 0.5.23 turns every frequency of it, and vLLM 0.33.0 leaves"
        )
        print("out a linear factor, both without a word; --rope longrope writes what both read")


COMMAND = Command(
    options=Options,
    run=run,
    example="""
        ropemods apply HuggingFaceTB/SmolLM2-135M ./smollm2-p-rope --mods truncated_rope:keep=0.75
        ropemods export ./smollm2-p-rope ./smollm2-stock
    """,
)
