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
from ropemods.attention.triton import row_kernels
from ropemods.attention.triton.row_stats import default_blocks

capability, dtype, dim, mask = json.loads(sys.argv[1])
rows, keys = default_blocks(dim, getattr(torch, dtype))
constants = {"DIM": dim, "ROWS": rows, "KEYS": keys, "MASK": mask, "CAPPED": True}
short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[dtype]
types = dict.fromkeys(("q", "k", "dq", "dk"), f"*{short}") | dict.fromkeys(("first", "past"), "*i32")
types |= dict.fromkeys(("lse", "entropy", "d_lse", "d_entropy"), "*fp32") | {"scale": "fp32", "cap": "fp32"}
types |= {"mask": "*u8" if mask == 1 else f"*{short}"} | dict.fromkeys(constants, "constexpr")
for kernel in (row_kernels.statistics_kernel, row_kernels.query_gradient_kernel, row_kernels.key_gradient_kernel):
    source = ASTSource(
        kernel,
        {name: types.get(name, "i32") for name in kernel.arg_names},
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
    )
    options = {"num_warps": 4, "num_stages": 2}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    print(compiled.metadata.shared)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [(90, "bfloat16", 256, 0), (80, "float32", 256, 2)],
    ids=str,
)
def test_kernels_compile_and_fit_the_shared_memory(case: tuple[int, str, int, int]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(case)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [int(size) <= SMALLEST_SHARED_MEMORY for size in done.stdout.split()] == [True] * 3
