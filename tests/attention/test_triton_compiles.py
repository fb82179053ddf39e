"""The kernels compile for GPUs, which takes none: types, shapes and shared memory, and no more than that."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SMALLEST_SHARED_MEMORY = 99 * 1024
"""Of one program on any GPU of compute capability 8.0 or more."""

PROGRAM = """
import json, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ropemods.attention.triton import attend_kernels, blocks, decode_kernels, gradient_kernels, row_kernels

group, capability, dtype, dim, mask = json.loads(sys.argv[1])
groups = {
    "statistics": {"statistics": row_kernels.statistics_kernel,
                   "statistics_query_gradient": row_kernels.query_gradient_kernel,
                   "statistics_key_gradient": row_kernels.key_gradient_kernel},
    "attention": {"attend_kept": attend_kernels.attend_kernel},
    "gradients": {"query_gradients": gradient_kernels.query_gradients_kernel,
                  "key_gradients": gradient_kernels.key_gradients_kernel},
    "decode": {"decode": decode_kernels.split_scores_kernel, "decode ": decode_kernels.split_values_kernel,
               "decode  ": decode_kernels.merge_kernel},
}
short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[dtype]
inputs = "q k v d_out out slope dq dk dv".split()
flags = "is_bos" if group != "statistics" else ""
numbers = "scale cap hold_from".split()
integers = "first past bos_past".split()
for name, kernel in groups[group].items():
    size = blocks.default(name.strip(), dim, getattr(torch, dtype))
    constants = {"DIM": dim, "VDIM": dim, "ROWS": 16 if group == "decode" else size.rows, "KEYS": size.keys,
                 "MASK": mask, "CAPPED": True, "BOS": True, "SPARED": True, "SINK": True, "BETA": 2, "POWERS": 5,
                 "KEEP": True, "PARTS": 32}
    if name != "decode  ":
        constants |= {"head_dim": dim, "value_dim": dim}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    # Every pointer that is no input holds fp32; what has a stride's or a size's name holds an integer.
    scalars = [n for n in kernel.arg_names if n.endswith(("_batch", "_head", "_row", "_dim", "_key")) or n in
               "heads repeats queries keys part parts".split()]
    types = {name: "*fp32" for name in kernel.arg_names} | {name: "i32" for name in scalars}
    types |= {name: f"*{short}" for name in inputs} | dict.fromkeys(integers, "*i32") | dict.fromkeys(numbers, "fp32")
    types |= {"mask": "*u8" if mask == 1 else f"*{short}", "is_bos": "*u8"} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        kernel,
        {name: types[name] for name in kernel.arg_names},
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
    )
    options = {"num_warps": size.warps, "num_stages": size.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    print(compiled.metadata.shared)
"""
KERNELS = {"statistics": 3, "attention": 1, "gradients": 2, "decode": 3}


@pytest.mark.slow
@pytest.mark.parametrize("group", KERNELS)
@pytest.mark.parametrize("case", [(90, "bfloat16", 256, 0), (80, "float32", 256, 2)], ids=str)
def test_kernels_compile_and_fit_the_shared_memory(group: str, case: tuple[int, str, int, int]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([group, *case])], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    sizes = [int(size) for size in done.stdout.split()]
    assert len(sizes) == KERNELS[group] and max(sizes) <= SMALLEST_SHARED_MEMORY, sizes
