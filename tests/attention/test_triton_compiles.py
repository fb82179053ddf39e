"""The kernels compile for GPUs, which takes none: types, shapes, shared memory and registers, and no more than that."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
import json, sys
from evals.compiled import ASKED, KERNELS, SHARED, usage
asked, *case = json.loads(sys.argv[1])
found = [usage(name, *case, ASKED[asked]) for name in KERNELS]
print(json.dumps({"stack": [x["stack"] for x in found], "too much": [x["shared"] > SHARED for x in found]}))
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
    assert not any(found["too much"]), found
    if case[0] == "temperature":
        assert not any(found["stack"]), found
