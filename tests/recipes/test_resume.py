"""Killing a run for real, and going on: on one rank the weights are bitwise those of a run that was left alone."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from ropemods.training import checkpoints
from ropemods.training.__main__ import main
from ropemods.training.arms import read_result
from tests import forked
from tests.recipes import launched, tiny

pytestmark = pytest.mark.slow

RUN = {
    "arms": ["modified"],
    "mods": ["truncated_rope:keep=0.5", "replaced_bos:by=random_token", "adaptive_temperature:trainable=head"],
    "schedule": {"steps": 12},
    "max_steps": 16,
    "save_strategy": "steps",
    "save_steps": 3,
    "save_total_limit": 2,
    "lr_scheduler_type": "cosine",
}
"""Random tokens at BOS, so that a wrong state of the random numbers shows too."""


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "modified-0" / "model" / "model.safetensors")


def kill_at(words: list[str], step: int, *, one_rank: bool = False) -> str:
    """Start, and send SIGKILL when that step has been logged: to everything, or to one of the ranks."""
    process, said = launched.start(words), ""
    assert process.stdout is not None
    for line in process.stdout:
        said += line
        if f"  step {step}/" in line:
            ranks = psutil.Process(process.pid).children(recursive=True)
            if one_rank:
                ranks[-1].send_signal(signal.SIGKILL)
            else:
                for each in [*ranks, process]:
                    each.send_signal(signal.SIGKILL)
            break
    rest, _ = process.communicate(timeout=120)
    assert process.returncode != 0, said + rest
    return said + rest


@pytest.fixture(scope="module")
def whole(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that was left alone."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = tiny.write_recipe(folder / "recipe.yaml", model, text, folder / "out", **RUN)
    forked.script([*launched.FINETUNE[1:], "--config", str(recipe)], ranks=1)
    return folder / "out"


def test_a_killed_run_ends_with_the_same_weights_bitwise(
    whole: Path, model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", model, text, tmp_path / "out", **RUN)
    words = [*launched.FINETUNE, "--config", str(recipe)]
    kill_at(words, 8)
    arm = tmp_path / "out" / "modified-0"
    assert [checkpoints.step_of(path) for path in checkpoints.complete(arm)] == [3, 6]
    # As a kill in the middle of a save leaves it: a folder without its mark.
    (arm / "checkpoint-9").mkdir(exist_ok=True)
    (arm / "checkpoint-9" / "model.safetensors").write_bytes(b"half")
    (arm / "checkpoint-9" / checkpoints.COMPLETE).unlink(missing_ok=True)

    flags = ["--config", str(recipe)]
    with pytest.raises(ValueError, match=r"holds an earlier run of this arm; go on with it .--resume_from_checkpoint"):
        main(flags)
    with pytest.raises(ValueError, match="belongs to another run: recipe was"):
        main([*flags, "--resume_from_checkpoint", "--learning_rate", "1e-4"])

    said = forked.script([*words[1:], "--resume_from_checkpoint"], ranks=1)
    assert "checkpoint-9 was not written to its end" in said and "resuming from" in said and "checkpoint-6" in said
    a, b = weights(tmp_path / "out"), weights(whole)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    mine, theirs = (read_result(out / "modified-0" / "result.json") for out in (tmp_path / "out", whole))
    assert mine.curve == theirs.curve and mine.loss == theirs.loss and mine.tokens == theirs.tokens

    main([*flags, "--resume_from_checkpoint"])
    said = capsys.readouterr().out
    assert "done before" in said and "step 1/" not in said


def test_one_rank_of_two_killed_takes_the_run_down_and_it_goes_on(model: Path, text: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {**RUN, "mods": ["truncated_rope:keep=0.5", "learned_sink"]}
    recipe = tiny.write_recipe(
        tmp_path / "recipe.yaml", model, text, tmp_path / "out", **changes, per_device_train_batch_size=4
    )
    words = [*launched.torchrun(2), *launched.FINETUNE[1:], "--config", str(recipe)]
    kill_at(words, 8, one_rank=True)
    said = forked.script([*launched.FINETUNE[1:], "--config", str(recipe), "--resume_from_checkpoint"], ranks=2)
    assert "resuming from" in said and "in force: DDP · world size 2" in said
    found = read_result(tmp_path / "out" / "modified-0" / "result.json")
    assert [step for step, _ in found.curve] == list(range(1, 17))
    # As one rank that nobody killed, within what the order of sums moves.
    main(["--config", str(recipe), "--output_dir", str(tmp_path / "one"), "--per_device_train_batch_size", "8"])
    alone = read_result(tmp_path / "one" / "modified-0" / "result.json")
    assert abs(found.loss - alone.loss) < 1e-3
    log = json.loads((tmp_path / "out" / "modified-0" / "checkpoint-16" / "trainer_state.json").read_text())
    assert [entry["strength"] for entry in log["log_history"] if "loss" in entry][-1] == 1.0


def test_accumulating_eight_ones_is_one_eight(model: Path, text: Path, tmp_path: Path) -> None:
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", model, text, tmp_path / "out", arms=["modified"])
    found = []
    for name, each, accumulate in (("whole", "8", "1"), ("parts", "1", "8")):
        words = [
            *launched.FINETUNE[1:], "--config", str(recipe), "--output_dir", str(tmp_path / name),
            "--per_device_train_batch_size", each, "--gradient_accumulation_steps", accumulate,
        ]  # fmt: skip
        forked.script(words, ranks=1)
        found.append(read_result(tmp_path / name / "modified-0" / "result.json"))
    whole, parts = found
    assert whole.tokens == parts.tokens and len(whole.curve) == 8
    for (_, a), (_, b) in zip(whole.curve, parts.curve, strict=True):
        assert abs(a - b) < 1e-4
    assert abs(whole.loss - parts.loss) < 1e-4
