"""`ropemods bench`: what the modifications cost on this machine."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

from ropemods.cli.command import Command
from ropemods.options import option


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time the modifications against stock attention. Each is measured on one attention call, in turn with
    `scaled_dot_product_attention` on the same inputs, and printed as a ratio beside its floor: the least that the
    mathematics allows. TruncatedRoPE and ReplacedBos leave the attention call alone and cost nothing.
    """

    output: str | None = option(
        None, "folder to write bench.json, bench.md and bench.svg into", metavar="FOLDER", unset="only print"
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto is the GPU, where there is one")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "of queries, keys and values")
    lengths: tuple[int, ...] = option((1024, 2048), "tokens, or those in the cache when decoding", metavar="N")
    head_dims: tuple[int, ...] = option((64,), "channels of a head", metavar="N")
    heads: int = option(8, "query heads", metavar="N")
    group_ratios: tuple[int, ...] = option((1, 4), "query heads to a key/value head", metavar="N")
    kinds: tuple[Literal["forward", "training", "decode"], ...] = option(
        ("forward", "training", "decode"), "some of forward, training (forward and backward) and decode"
    )
    paths: tuple[Literal["sdpa", "eager"], ...] = option(("sdpa",), "some of sdpa and eager")
    pairs: int = option(7, "timed pairs, of which the median ratio counts", metavar="N")


def run(options: Options) -> None:
    import json
    from pathlib import Path

    import torch

    from ropemods.atomic import write_text
    from ropemods.bench.subjects import Shape
    from ropemods.bench.survey import Plan, as_json, machine, survey
    from ropemods.bench.tables import line, plot, table

    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = itertools.product(options.head_dims, options.group_ratios, options.lengths)
    shapes = tuple(
        Shape(length=length, head_dim=dim, heads=options.heads, group_ratio=ratio, dtype=options.dtype)
        for dim, ratio, length in sizes
    )
    plan = Plan(shapes=shapes, kinds=options.kinds, paths=options.paths, pairs=options.pairs, device=device)
    print(f"{machine(device)}; median, min and max of {plan.pairs} pairs, stock attention = 1", flush=True)
    rows = survey(plan, told=lambda row: print("  ".join(line(row)), flush=True))
    print(f"\n{table(rows)}")
    if options.output is not None:
        folder = Path(options.output)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "bench.json", json.dumps(as_json(plan, rows), indent=1) + "\n")
        write_text(folder / "bench.md", table(rows) + "\n")
        write_text(folder / "bench.svg", plot(rows) + "\n")
        print(f"wrote {folder}/bench.json, bench.md and bench.svg")


COMMAND = Command(
    options=Options,
    run=run,
    example="""
        ropemods bench --lengths 256 512 --pairs 5 --output ./bench
    """,
)
