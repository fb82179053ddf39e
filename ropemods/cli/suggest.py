"""`ropemods suggest`: what a model's use of its rotary bands and of BOS speaks for."""

from __future__ import annotations

from dataclasses import dataclass

from ropemods.cli.command import Command
from ropemods.cli.measured_model import Subject, check_writable, launched, load, read
from ropemods.settings.options import option


@dataclass(frozen=True, kw_only=True)
class Options(Subject):
    """Propose how much of RoPE to keep, and how a sink should start. Reads a few sequences and shows, for every rotary
    band, its wavelength, how far it turns within the length, and how much of the queries and keys lies in it; then the
    largest cut within two limits, with the reason.
    """

    length: int = option(8192, "tokens that the model will be used at", metavar="TOKENS")
    max_phase: float = option(1.0, "radians that a dropped band may turn over the length", metavar="RADIANS")
    max_usage: float = option(0.25, "share of the query or key norms that dropped bands may hold", metavar="SHARE")
    sequences: int = option(32, "crops to read")
    crop: int = option(512, "tokens in a crop", metavar="TOKENS")
    seed: int = option(0, "of the crops")
    output: str | None = option(None, "write the suggestion here, as JSON", metavar="FILE", unset="not written")


def run(options: Options) -> None:
    check_writable(options.output, read=[options.text])

    from ropemods.cli.stock_checkpoints import quieten
    from ropemods.leakage.suggestion import suggest

    quieten()
    with launched() as rank:
        documents = read(options, options.crop, options.seed)
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
        )
        if rank != 0:
            return
        written = None if options.output is None else suggestion.to_json(options.output)
        print(suggestion.to_markdown())
        if written is not None:
            print(f"wrote {written}")


COMMAND = Command(
    options=Options,
    run=run,
    example="""
        ropemods suggest HuggingFaceTB/SmolLM2-135M --text books.jsonl --length 8192
    """,
)
