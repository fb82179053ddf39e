"""The kernels compile for GPUs, which takes none: types, shapes, shared memory and registers, and no more than that."""

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
from evals.compiled import ASKED, KERNELS, usage
asked, *case = json.loads(sys.argv[1])
print(json.dumps([usage(name, *case, ASKED[asked]) for name in KERNELS]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [("everything", 90, "bfloat16", 256), ("everything", 80, "float32", 256), ("temperature", 80, "bfloat16", 64)],
    ids=str,
)
def test_kernels_compile_fit_the_shared_memory_and_do_not_spill(case: tuple[str, int, str, int]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(case)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert max(each["shared"] for each in found) <= SMALLEST_SHARED_MEMORY, found
    if case[0] == "temperature":
        assert max(each["stack"] for each in found) == 0, found
