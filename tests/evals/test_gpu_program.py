"""What only a GPU can show is one command, and it is rehearsed here, so that it cannot rot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from evals.gpu_minutes import minutes, table


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it would measure")
def test_it_runs_to_its_end_in_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "evals", "gpu", "--out", str(tmp_path), "--only", "bench", "steps", "measure"]
    environment = {k: v for k, v in os.environ.items() if k != "ROPEMODS_KERNEL"} | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "a rehearsal and no measurement" in done.stdout, done.stderr[-2000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["rehearsal"]
    assert all(found[phase] for phase in ("bench", "steps", "measure"))
    parts = [part for phase in ("bench", "steps", "measure") for part in found[phase].values()]
    assert not [part for part in parts if isinstance(part, dict) and "failed" in part]


def test_minutes_grow_with_what_is_asked_for() -> None:
    plan = {
        "paths": ("flash",), "dims": (64,), "kinds": ("training",), "bench": {4096: 5}, "long": {16384: 5},
        "subjects": 2, "steps": 4, "step_pairs": 2, "tuned": ("attend",),
    }  # fmt: skip
    found = minutes(plan, 4)
    assert found["long"][1] > 2 * found["bench"][1] and list(found)[-1] == "tune"
    assert minutes(plan | {"step_pairs": 20}, 4)["steps"][1] > found["steps"][1]
    assert "together" in table(found)
