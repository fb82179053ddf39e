"""`ropemods apply`: from a stock model to a modified checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ropemods.cli.command import Command
from ropemods.mod_words import known_mods, mod_from, mod_records
from ropemods.settings.options import REQUIRED, option

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ropemods.mods import Mod


@dataclass(frozen=True, kw_only=True)
class Options:
    """Put modifications on a model and save the result with its tokenizer. The folder it writes reloads with
    ropemods.from_pretrained; stock transformers either runs exactly the same model from it or refuses to load it.
    OUTPUT is written whole or not at all.
    """

    model: str = option(REQUIRED, "folder of a stock model, or its name on the hub", positional=True)
    gguf_file: str | None = option(None, "the GGUF file in MODEL to read", metavar="FILE", unset="none")
    output: str = option(REQUIRED, "folder to write; made if it is not there", positional=True)
    mods: tuple[Any, ...] = option(REQUIRED, "modifications, in order; listed below", metavar="MOD", parse=mod_records)
    strength: float = option(1.0, "of all modifications, from 0 (the stock model) to 1 (in full)")
    attn_implementation: str | None = option(
        None, "sdpa or eager", metavar="NAME", unset="what transformers chooses for the model"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", "dtype to load and save in")
    trust_remote_code: bool = option(False, "run model code that comes with the checkpoint")
    calibration_text: str | None = option(
        None,
        "text file on which initial values are chosen, as by learned_sink",
        metavar="FILE",
        unset="none, so that such values start at 0",
    )
    calibration_length: int = option(256, "tokens in each of the 8 rows taken from it", metavar="TOKENS")
    overwrite: bool = option(False, "replace the checkpoint in OUTPUT")

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise ValueError(f"--strength is from 0 (the stock model) to 1 (in full), not {self.strength}")
        if self.calibration_length < 2:
            raise ValueError(f"--calibration_length is at least 2, BOS and a token, not {self.calibration_length}")


def run(options: Options) -> None:
    mods = [mod_from(record) for record in options.mods]

    import ropemods
    from ropemods.cli.calibration import rows_from_file
    from ropemods.cli.folders import check_room, new_folder
    from ropemods.cli.stock_checkpoints import quieten, stock_model, tokenizer_of

    if options.calibration_text is not None and not any(mod.calibrates for mod in mods):
        raise ValueError("--calibration_text would be used by none of these modifications; leave it out")
    quieten()
    with new_folder(options.output, source=options.model, overwrite=options.overwrite) as folder:
        model = stock_model(
            options.model,
            mods,
            gguf_file=options.gguf_file,
            dtype=options.dtype,
            attn_implementation=options.attn_implementation,
            trust_remote_code=options.trust_remote_code,
        )
        tokenizer = tokenizer_of(options.model, options.gguf_file, trust_remote_code=options.trust_remote_code)
        calibration = None
        if options.calibration_text is not None:
            if tokenizer is None:
                raise ValueError(f"--calibration_text needs a tokenizer, and {options.model} has none")
            bos = model.config.get_text_config().bos_token_id
            calibration = rows_from_file(options.calibration_text, tokenizer, bos, options.calibration_length)
        ropemods.apply(model, *mods, strength=options.strength, calibration=calibration)
        check_room(folder, options.output, model)
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        summary = ropemods.summary(model)
    print(summary)
    if options.gguf_file is not None:
        dtype = str(model.dtype).removeprefix("torch.")
        print(f"note: the weights of {options.gguf_file} were unpacked to {dtype}, and are written as safetensors")
    for remark in _remarks(mods, model, tokenizer, calibrated=calibration is not None):
        print(f"note: {remark}")
    print(f"\nwrote {options.output}{', with its tokenizer' if tokenizer else ''}. It loads with\n")
    print("    import ropemods")
    print(f'    model = ropemods.from_pretrained("{options.output}")')


def _remarks(
    mods: list[Mod], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, *, calibrated: bool
) -> list[str]:
    """What a user would want to have been told."""
    remarks = []
    for mod in mods:
        if mod.calibrates and not calibrated:
            remarks.append(
                f"{mod} starts at its default; with --calibration_text FILE it starts from what the model does there"
            )
    needing = [mod.kind for mod in mods if mod.needs_bos]
    if needing and tokenizer is None:
        remarks.append(
            f"there is no tokenizer beside the model; {', '.join(needing)} need BOS in front of every sequence"
        )
    elif needing and tokenizer is not None:
        bos = model.config.get_text_config().bos_token_id
        if tokenizer("a")["input_ids"][:1] != [bos]:
            remarks.append(
                f"the tokenizer puts no BOS (token {bos}) in front of text, and {', '.join(needing)} need it there: "
                "add it yourself"
            )
    return remarks


COMMAND = Command(
    options=Options,
    run=run,
    example="""
        ropemods apply HuggingFaceTB/SmolLM2-135M ./smollm2-p-rope --mods truncated_rope:keep=0.75 adaptive_temperature
    """,
    details=known_mods,
)
