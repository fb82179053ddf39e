"""`ropemods suggest`: what a model's use of its rotary bands and of BOS speaks for, and what modifications do to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ropemods.cli.command import Command
from ropemods.cli.measured_model import Subject, check_writable, launched, load, read
from ropemods.leakage.protocol import Protocol
from ropemods.settings.options import option

RECIPE = "suggested.yaml"


@dataclass(frozen=True, kw_only=True)
class Options(Subject):
    """Propose how much of RoPE to keep, and how a sink should start. Reads a few sequences and shows, for every rotary
    band, its wavelength, how far it turns within the length, and how much of the queries and keys lies in it; then the
    largest cut within two limits, with the reason. With --try it also puts a menu of modifications on the model, one
    after another and untrained, measures what each does to loss, leakage and time, and writes the recipe that follows.
    """

    length: int = option(8192, "tokens that the model will be used at", metavar="TOKENS")
    max_phase: float = option(1.0, "radians that a dropped band may turn over the length", metavar="RADIANS")
    max_usage: float = option(0.25, "share of the query or key norms that dropped bands may hold", metavar="SHARE")
    sequences: int = option(32, "crops to read")
    crop: int = option(512, "tokens in a crop", metavar="TOKENS")
    seed: int = option(0, "of the crops")
    output: str | None = option(None, "write the suggestion here, as JSON", metavar="FILE", unset="not written")
    try_: bool = option(False, "measure what modifications do to the model, untrained")
    try_sequences: int = option(64, "crops to measure each on")
    try_length: int = option(256, "tokens in each of these", metavar="TOKENS")
    html: str | None = option(None, "write a page of what was tried", metavar="FILE", unset="not written")
    recipe: str | None = option(
        None, "write the recipe here, for `ropemods train`", metavar="FILE", unset=f"{RECIPE}, with --try"
    )

    def __post_init__(self) -> None:
        for name in ("html", "recipe"):
            if getattr(self, name) is not None and not self.try_:
                raise ValueError(f"--{name} is written of what was tried; add --try, or leave it out")

    def protocol(self) -> Protocol:
        return Protocol(sequences=self.try_sequences, length=self.try_length, seed=self.seed)

    def recipe_keys(self) -> dict[str, Any]:
        """How the recipe finds the model and the text."""
        from ropemods.leakage.crops import EXCERPT

        given = {
            "model_name_or_path": self.model,
            "gguf_file": self.gguf_file,
            "tokenizer_name_or_path": self.tokenizer,
            "attn_implementation": self.attn_implementation,
            "data": self.text,
            "column": None if self.column == "text" else self.column,
            "separator": None if self.separator == "auto" else self.separator,
            "held_out_join": EXCERPT * self.try_length if self.join else None,
        }
        return {name: value for name, value in given.items() if value is not None}


def run(options: Options) -> None:
    recipe = _recipe(options)
    check_writable(options.output, options.html, recipe, read=[options.text])

    from ropemods.cli.output import show
    from ropemods.cli.stock_checkpoints import quieten
    from ropemods.leakage.suggestion import suggest

    trying = options.protocol() if options.try_ else False
    quieten()
    with launched() as rank:
        documents = read(options, max(options.crop, options.try_length if trying else 0), options.seed)
        model, tokenizer = load(options)
        suggestion = suggest(
            model,
            tokenizer,
            documents,
            options.length,
            sequences=options.sequences,
            crop=options.crop,
            max_phase=options.max_phase,
            max_usage=options.max_usage,
            bos_token_id=options.bos_token_id,
            seed=options.seed,
            trying=trying,
        )
        if rank != 0:
            return
        if recipe is not None:
            keys = options.recipe_keys()
            suggestion.to_recipe(recipe, model=keys.pop("model_name_or_path"), data=keys.pop("data"), **keys)
        show(suggestion, output=options.output, html=options.html)
        if recipe is not None:
            print(f"wrote {recipe}; run it with `ropemods train {recipe}`")


def _recipe(options: Options) -> str | None:
    """Where the recipe goes; a file that was not named is not written over."""
    if not options.try_:
        return None
    from ropemods.model import adapters

    if adapters.is_adapter(options.model):
        raise ValueError(
            f"{options.model} is an adapter, and a recipe begins at a model; merge it (merge_and_unload) and try that"
        )
    if options.recipe is None and Path(RECIPE).exists():
        raise ValueError(f"{RECIPE} is there already; name another file with --recipe, or the same to write over it")
    return options.recipe or RECIPE


COMMAND = Command(
    options=Options,
    run=run,
    example="""
        ropemods suggest HuggingFaceTB/SmolLM2-135M --text books.jsonl --length 8192
        ropemods suggest HuggingFaceTB/SmolLM2-135M --text books.jsonl --try --html tried.html --recipe tried.yaml
    """,
)
