"""What the compiler makes of every kernel for GPUs that are not here: registers, shared memory, and what spills.

    python -m evals.compiled --page evals/bench.md
    python -m evals.compiled --fit          the largest blocks that do not spill, for numbers of 16 bits

Nothing runs. Each kernel is compiled as a call would have it compiled: contiguous channels, strides in multiples of 16,
and the block sizes that a card without measured ones gets; once for causal attention with a temperature that trains,
and once with everything that a call may ask for (a mask that adds, a soft cap, the BOS column, slots). Registers are
those of a thread, of which a program's threads share 65,536; what does not fit spills to the stack, in slow memory.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from evals.between import write_between
from evals.claim import RESULTS
from ropemods.attention.triton import attend_kernels, blocks, decode_kernels, gradient_kernels, row_kernels, tiles
from ropemods.attention.triton.blocks import Blocks
from ropemods.report.words import markdown_table
from ropemods.settings.files import write_text
from ropemods.settings.versions import versions_of

KERNELS = {
    "attend_kept": attend_kernels.attend_kernel,
    "query_gradients": gradient_kernels.query_gradients_kernel,
    "key_gradients": gradient_kernels.key_gradients_kernel,
    "statistics": row_kernels.statistics_kernel,
    "statistics_query_gradient": row_kernels.query_gradient_kernel,
    "statistics_key_gradient": row_kernels.key_gradient_kernel,
    "decode": decode_kernels.split_scores_kernel,
    "decode, values": decode_kernels.split_values_kernel,
    "decode, merge": decode_kernels.merge_kernel,
}
CAPABILITIES = (80, 90, 100)
DTYPES = {"bfloat16": "bf16", "float32": "fp32"}
DIMS = (64, 128, 256)
TEMPERATURE: dict[str, Any] = {
    "BETA": tiles.FROM_ENTROPY, "POWERS": 5, "KEEP": True, "MASK": tiles.NO_MASK, "CAPPED": False, "BOS": False,
    "SPARED": False, "SLOTS": 0, "VALUED": False,
}  # fmt: skip
EVERYTHING = TEMPERATURE | {
    "MASK": tiles.ADDITIVE,
    "CAPPED": True,
    "BOS": True,
    "SPARED": True,
    "SLOTS": 1,
    "VALUED": True,
}
ASKED = {"temperature": TEMPERATURE, "everything": EVERYTHING}
INPUTS = "mask q k v d_out out slope dq dk dv".split()
CANDIDATES = [
    Blocks(*sizes)
    for sizes in (
        (64, 64, 4), (64, 64, 8), (64, 32, 4), (32, 64, 4), (32, 64, 8), (32, 32, 4), (32, 32, 8), (32, 16, 4),
        (16, 32, 4), (16, 32, 8), (16, 16, 4), (16, 16, 8),
    )
]  # fmt: skip
"""Queries, keys, warps; the largest first."""
SHARED, NEVER = 99 * 1024, 1 << 30
"""Bytes that a program may have on any GPU of compute capability 8.0 or more."""
STRIDES = ("_batch", "_head", "_row", "_dim", "_key")
IDENTITY = ("kernel", "dtype", "head_dim", "asked")
SIZES = ("slot_step", "heads", "repeats", "queries", "keys", "part", "parts")
PART = "compiled"


def compiled(
    name: str, capability: int, dtype: str, dim: int, asked: dict[str, Any], size: Blocks | None = None
) -> Any:
    """A kernel as it is for a GPU of this capability."""
    kernel, size = KERNELS[name], size or blocks.default(name.split(",")[0], dim, getattr(torch, dtype))
    rows = 16 if name.startswith("decode") else size.rows
    constants = asked | {"DIM": dim, "VDIM": dim, "ROWS": rows, "KEYS": size.keys, "PARTS": 32}
    constants |= dict.fromkeys(("q_dim", "k_dim", "v_dim"), 1)
    if name != "decode, merge":
        constants |= {"head_dim": dim, "value_dim": dim}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    # Every pointer that is no input holds fp32; what has a stride's or a size's name holds an integer.
    strides = [n for n in kernel.arg_names if n.endswith(STRIDES) and n not in constants]
    types = dict.fromkeys(kernel.arg_names, "*fp32") | dict.fromkeys((*strides, *SIZES), "i32")
    types |= dict.fromkeys(INPUTS, f"*{DTYPES[dtype]}") | dict.fromkeys(("first", "past", "bos_past"), "*i32")
    types |= dict.fromkeys(("scale", "cap", "hold_from"), "fp32") | {"is_bos": "*u8"}
    types |= dict.fromkeys(constants, "constexpr")
    aligned = [n for n in kernel.arg_names if types[n].startswith("*") or n in strides]
    source = ASTSource(
        kernel,
        {key: types[key] for key in kernel.arg_names},
        {(kernel.arg_names.index(key),): value for key, value in constants.items()},
        {(kernel.arg_names.index(key),): [["tt.divisibility", 16]] for key in aligned},
    )
    options = {"num_warps": size.warps, "num_stages": size.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def usage(
    name: str, capability: int, dtype: str, dim: int, asked: dict[str, Any], size: Blocks | None = None
) -> dict[str, Any]:
    """Registers and stack bytes of a thread, shared memory of a program, and how long compiling took."""
    begun = time.monotonic()
    made = compiled(name, capability, dtype, dim, asked, size)
    seconds = round(time.monotonic() - begun, 2)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", said)}
    return {"registers": found["REG"], "stack": found["STACK"], "shared": made.metadata.shared, "seconds": seconds}


Case = tuple[str, int, str, int, str]


def _row(case: Case) -> dict[str, Any]:
    *which, asked = case
    said = dict(zip(("kernel", "capability", "dtype", "head_dim"), which, strict=True)) | {"asked": asked}
    return said | usage(*which, ASKED[asked])


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each kernel, dtype and head dim; the numbers of a cell are those of the capabilities in order."""
    lines = []
    for name, dtype, dim in itertools.product(KERNELS, DTYPES, DIMS):
        size = blocks.default(name.split(",")[0], dim, getattr(torch, dtype))
        line = [name, DTYPES[dtype], str(dim), f"{size.rows} × {size.keys}, {size.warps}"]
        for asked in ASKED:
            of = [r for r in rows if [r[key] for key in IDENTITY] == [name, dtype, dim, asked]]
            line += [" · ".join(str(row[key]) for row in of) for key in ("registers", "shared")]
            line.append(" · ".join(str(row["stack"]) for row in of) if any(row["stack"] for row in of) else "")
        lines.append(line)
    heads = [f"{asked}: {what}" for asked in ASKED for what in ("registers", "shared", "spilt")]
    return markdown_table(("kernel", "dtype", "D", "block, warps", *heads), lines)


def fitting(case: tuple[str, str, int]) -> Blocks:
    """The largest candidate that fits every GPU and spills nothing with a temperature, or spills the least."""
    least = min(((_spilt(*case, size), -n, size) for n, size in _until_none(case)), default=None)
    assert least is not None
    print(*case, least, flush=True)
    return least[-1]


def _until_none(case: tuple[str, str, int]) -> Iterator[tuple[int, Blocks]]:
    """Candidates up to the first that spills nothing."""
    for n, size in enumerate(CANDIDATES):
        size = size._replace(stages=blocks.KERNELS[case[0]])
        yield n, size
        if _spilt(*case, size) == 0:
            return


@functools.cache
def _spilt(name: str, dtype: str, dim: int, size: Blocks) -> int:
    """Bytes on the stack over all GPUs and kernels that have these blocks; NEVER where shared memory does not do."""
    spilt = 0
    for kernel, capability in itertools.product(KERNELS, CAPABILITIES):
        if kernel.split(",")[0] != name:
            continue
        spilt += usage(kernel, capability, dtype, dim, TEMPERATURE, size)["stack"]
        if usage(kernel, capability, dtype, dim, EVERYTHING, size)["shared"] > SHARED:
            return NEVER
    return spilt


def fit(workers: int) -> Path:
    """For kernels of 16-bit numbers."""
    cases = list(itertools.product((kernel for kernel in blocks.KERNELS if kernel in KERNELS), ("bfloat16",), DIMS))
    with ProcessPoolExecutor(workers) as pool:
        found = zip(cases, pool.map(fitting, cases), strict=True)
        sizes = {blocks.name(kernel, dim, getattr(torch, dtype)): list(size) for (kernel, dtype, dim), size in found}
    return write_text(blocks.FITTING, json.dumps(sizes, indent=1) + "\n")


def spilling(rows: list[dict[str, Any]], asked: str) -> str:
    of = [row["stack"] for row in rows if row["asked"] == asked]
    return f"{sum(stack > 0 for stack in of)} of {len(of)} spill, {max(of)} bytes a thread at most"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m evals.compiled", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page", type=Path, help="a page with a place for the table")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--fit", action="store_true", help="look for the largest blocks that do not spill")
    options = parser.parse_args()
    if options.fit:
        print(f"wrote {fit(options.workers)}")
        return
    triton.knobs.compilation.always_compile = True  # or the seconds would be those of a look into the cache
    cases = list(itertools.product(KERNELS, CAPABILITIES, DTYPES, DIMS, ASKED))
    with ProcessPoolExecutor(options.workers) as pool:
        rows = list(pool.map(_row, cases))
    found = {"command": "python -m evals.compiled", "versions": versions_of("torch", "triton"), "rows": rows}
    write_text(RESULTS / "compiled.json", json.dumps(found, indent=1) + "\n")
    print(table(rows), *(f"{asked}: {spilling(rows, asked)}" for asked in ASKED), sep="\n")
    if options.page:
        write_between(options.page, PART, table(rows))


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET=1 is set, so that nothing would be compiled; unset it")
    main()
