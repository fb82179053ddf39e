"""`ropemods measure`: how much a model's attention tells about absolute position."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from typing import Literal

from ropemods.cli.command import Command
from ropemods.cli.measured_model import Subject, check_writable, launched, load, read
from ropemods.cli.output import show
from ropemods.leakage.protocol import Protocol
from ropemods.settings.options import items, option

FIELDS = (
    "sequences",
    "length",
    "groups",
    "window",
    "grid_rows",
    "early",
    "seed",
    "dtype",
    "batch_size",
    "replicates",
    "confidence",
)
"""The options that are fields of the protocol, under their own names."""


@dataclass(frozen=True, kw_only=True)
class Options(Subject):
    """Measure how much a model's attention tells about absolute position. Prints a report of residual, mask and total
    leakage, sink, entropy and frequency usage, with intervals, and writes it where asked, whole or not at all. With
    torchrun or accelerate launch it runs on several ranks (torchrun --nproc_per_node 8 -m ropemods.cli measure ...).
    """

    output: str | None = option(None, "write the report here, as JSON", metavar="FILE", unset="not written")
    html: str | None = option(None, "write a page to look at, in one file", metavar="FILE", unset="not written")
    sequences: int = option(Protocol.sequences, "crops to read; the noise falls with their number")
    length: int = option(Protocol.length, "tokens in a crop, BOS included", metavar="TOKENS")
    groups: int | None = option(
        None, "groups of documents that intervals are formed over", unset="as many as fit the sequences, 32 at most"
    )
    window: int = option(Protocol.window, "offsets that are compared")
    grid_rows: int | None = option(
        None, "query rows read whole, for the mask term", unset="64, or all where there are fewer"
    )
    early: tuple[int, int] | None = option(
        None,
        "the early queries, first and one past the last",
        metavar="FIRST STOP",
        unset="8 64, or what a short length has of it",
    )
    seed: int = option(Protocol.seed, "of the crops and of the intervals")
    dtype: Literal["float32", "float64", "bfloat16", "float16", "model"] = option(
        "float32", "dtype to measure in; model leaves it as it was loaded"
    )
    control_text: bool = option(False, "read random tokens with the text's frequencies instead of the text")
    batch_size: int = option(Protocol.batch_size, "crops in one forward pass; moves memory and speed, no number")
    replicates: int = option(Protocol.replicates, "draws of the bootstrap")
    confidence: float = option(Protocol.confidence, "coverage that the intervals aim at")
    skip_mask: bool = option(False, "do not measure the mask term")
    interventions: tuple[str, ...] | None = option(
        None,
        "change something and measure again: zero mean noise none reference clamp carrier window rope_scaling, or all",
        metavar="NAME",
        unset="none",
    )
    reference: int = option(32, "random tokens in the reference distribution of the swaps")
    controls: bool = option(False, "also run the measurements whose answer is known beforehand")

    def protocol(self) -> Protocol:
        fields = {name: getattr(self, name) for name in FIELDS}  # those left at None follow from the others
        text = "unigram" if self.control_text else "stationary"
        return Protocol.from_dict({**fields, "text": text, "mask_term": not self.skip_mask})


def run(options: Options) -> None:
    protocol = options.protocol()
    check_writable(options.output, options.html, read=[options.text])

    from ropemods.cli.stock_checkpoints import quieten
    from ropemods.leakage.interventions import NAMES, check_names
    from ropemods.leakage.measurement import measure

    quieten()
    asked = tuple(items(options.interventions or ()))
    interventions = NAMES if asked == ("all",) else asked
    check_names(interventions)
    with launched() as rank:
        documents = read(options, options.length, options.seed)
        model, tokenizer = load(options)
        report = measure(
            model,
            tokenizer,
            documents,
            protocol,
            bos_token_id=options.bos_token_id,
            interventions=interventions,
            reference=options.reference,
            controls=options.controls,
            command=shlex.join(["ropemods", *sys.argv[1:]]),
        )
        if rank == 0:
            show(report, output=options.output, html=options.html)


COMMAND = Command(
    options=Options,
    run=run,
    example="""
        ropemods measure HuggingFaceTB/SmolLM2-135M --text books.jsonl --output before.json --html before.html
    """,
)
