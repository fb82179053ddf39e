"""Two real processes over gloo train a modified model as one process does, and save what one process would."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import ropemods as rm
from tests import forked, zoo
from tests.contract import close
from tests.ranks import worker


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero3"])
def test_two_ranks_train_and_save_what_one_does(kind: str, tmp_path: Path) -> None:
    wanted, model = worker.alone()
    forked.run(worker.main, kind, tmp_path, ranks=2)
    found = json.loads((tmp_path / "losses.json").read_text())
    assert wanted[0] != wanted[-1]
    assert found == pytest.approx(wanted, abs=1e-5)
    loaded, ids = rm.from_pretrained(tmp_path), zoo.tokens()
    close(loaded(ids).logits, model.eval()(ids).logits, 1e-4)
    moved = dict(loaded.named_parameters())["ropemods.adaptive_temperature.offsets"]
    assert moved.abs().max() > 0 and not torch.equal(loaded(ids).logits, worker.modified().eval()(ids).logits)
