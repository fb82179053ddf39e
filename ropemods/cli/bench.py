"""`ropemods bench`: what the modifications cost on this machine."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ropemods.cli.command import Command
from ropemods.settings.options import option

if TYPE_CHECKING:
    from pathlib import Path

    from ropemods.bench.grid import Plan, Row


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time the modifications against stock attention. Each is measured on one attention call, in turn with
    `scaled_dot_product_attention` on the same inputs, and printed as a ratio beside its floor: the least that the
    mathematics allows. What changes rotary tables or embeddings leaves the attention call alone and costs nothing.
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
    decode_heads: tuple[int, ...] = option(
        (), "query heads and key/value heads when decoding, if not --heads and --group_ratios", metavar="N"
    )
    paths: tuple[Literal["flash", "triton", "triton-rows", "flex", "eager"], ...] = option(
        ("flash",), "kernels, as ROPEMODS_KERNEL names them, and eager"
    )
    pairs: int = option(7, "timed pairs at most, of which the median ratio counts; 3 where one takes long", metavar="N")
    choices: str | None = option(
        None,
        "a .json file for the fastest of --paths by call, which ROPEMODS_KERNEL may name",
        metavar="FILE",
        unset="none is written",
    )
    redraw: str | None = option(
        None, "a bench.json; nothing is measured, its table and plot are made again", metavar="FILE", unset="measure"
    )
    page: str | None = option(
        None, "a Markdown page; the table between its marks is replaced", metavar="FILE", unset="none is written"
    )


def run(options: Options) -> None:
    import json
    from pathlib import Path

    from ropemods.bench.bench_tables import into_page, line, plot, table
    from ropemods.bench.grid import as_json, from_json, machine, survey
    from ropemods.settings.files import read_text, write_text
    from ropemods.settings.json_records import read_json

    if options.redraw is not None:
        written = read_json(options.redraw, "`ropemods bench --output FOLDER` writes another.")
        rows = from_json(written, options.redraw)
    else:
        plan = _plan(options)
        print(f"{machine(plan.device)}; median, min and max of {plan.pairs} pairs, stock attention = 1", flush=True)
        rows = survey(plan, told=lambda row: print("  ".join(line(row)), flush=True))
        written = as_json(plan, rows)
        print(f"\n{table(rows)}")
    if options.output is not None:
        folder = Path(options.output)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "bench.json", json.dumps(written, indent=1) + "\n")
        write_text(folder / "bench.md", table(rows) + "\n")
        write_text(folder / "bench.svg", plot(rows))
        print(f"wrote {folder}/bench.json, bench.md and bench.svg")
    if options.choices is not None:
        print(f"wrote {_write_choices(options, rows)}")
    if options.page is not None:
        page = Path(options.page)
        write_text(page, into_page(read_text(page), rows))
        print(f"wrote {page}")


def _write_choices(options: Options, rows: list[Row]) -> Path:
    """Beside what the file has for other cards and calls."""
    import json
    from pathlib import Path

    import torch

    from ropemods.attention import measured_paths
    from ropemods.bench.cases import subjects
    from ropemods.bench.grid import machine
    from ropemods.settings.files import write_text

    assert options.choices is not None
    device, file = torch.device(_device(options)), Path(options.choices)
    terms = {subject.name: subject.terms for subject in subjects()}
    found = measured_paths.fastest(
        (
            measured_paths.call(getattr(torch, r.shape.dtype), r.shape.head_dim, r.kind, terms[r.subject]),
            r.path,
            r.ratio.median,
        )
        for r in rows
        if terms[r.subject]
    )
    if not found:
        raise ValueError(
            "--choices: a choice is between paths; give two or more of --paths flash triton triton-rows flex"
        )
    known = measured_paths.read(file) if file.exists() else {}
    card = measured_paths.card(device)
    measured_paths.read.cache_clear()
    choices = known | {card: known.get(card, {}) | found}
    return write_text(file, json.dumps({"machine": machine(device.type), "choices": choices}, indent=1) + "\n")


def _device(options: Options) -> str:
    import torch

    if options.device != "auto":
        return options.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _plan(options: Options) -> Plan:
    from ropemods.bench.cases import Shape
    from ropemods.bench.grid import Plan

    def shapes(heads: int, ratios: tuple[int, ...]) -> tuple[Shape, ...]:
        sizes = itertools.product(options.head_dims, ratios, options.lengths)
        return tuple(
            Shape(length=length, head_dim=dim, heads=heads, group_ratio=ratio, dtype=options.dtype)
            for dim, ratio, length in sizes
        )

    decode = options.decode_heads
    if decode and (len(decode) != 2 or min(decode) < 1 or decode[0] % decode[1]):
        raise ValueError(f"--decode_heads must be query heads and key/value heads that divide them, not {decode}")
    return Plan(
        shapes=shapes(options.heads, options.group_ratios),
        decode_shapes=shapes(decode[0], (decode[0] // decode[1],)) if decode else (),
        kinds=options.kinds,
        paths=options.paths,
        pairs=options.pairs,
        device=_device(options),
    )


COMMAND = Command(
    options=Options,
    run=run,
    example="""
        ropemods bench --lengths 256 512 --pairs 5 --output ./bench
        ropemods bench --redraw ./bench/bench.json --output ./bench
    """,
)
