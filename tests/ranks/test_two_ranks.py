"""Two real processes over gloo train a modified model as one process does, and save what one process would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ropemods as rm
from tests import zoo
from tests.contract import close
from tests.ranks import worker

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero3"])
def test_two_ranks_train_and_save_what_one_does(kind: str, tmp_path: Path) -> None:
    wanted, model = worker.alone()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    command += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", "-m", "tests.ranks.worker", kind, str(tmp_path)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    found = json.loads((tmp_path / "losses.json").read_text())
    assert wanted[0] != wanted[-1]
    assert found == pytest.approx(wanted, abs=1e-5)
    loaded, ids = rm.from_pretrained(tmp_path), zoo.tokens()
    close(loaded(ids).logits, model.eval()(ids).logits, 1e-4)
    moved = dict(loaded.named_parameters())["ropemods.adaptive_temperature.offsets"]
    assert moved.abs().max() > 0 and not torch.equal(loaded(ids).logits, worker.modified().eval()(ids).logits)
