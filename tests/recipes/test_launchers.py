"""The launchers, really run with two processes on a CPU, and the runs that must stop because they are not as asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from ropemods.training.arms import read_result
from ropemods.training.launcher import command
from tests.recipes import launched, tiny

pytestmark = pytest.mark.slow

ACCELERATE = launched.ROOT / "recipes" / "accelerate"


@pytest.fixture(scope="module")
def recipe(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    return tiny.write_recipe(
        folder / "recipe.yaml",
        model,
        text,
        folder / "out",
        arms=["modified"],
        max_steps=4,
        per_device_train_batch_size=4,
    )


def two(name: str, folder: Path, **changes: object) -> str:
    """A shipped config with two processes."""
    config = yaml.safe_load((ACCELERATE / f"{name}.yaml").read_text())
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**config, "num_processes": 2, **changes}))
    return str(path)


def test_accelerate_with_deepspeed(recipe: Path, tmp_path: Path) -> None:
    words = command(
        str(recipe),
        launcher="accelerate",
        num_processes=2,
        port=launched.free_port(),
        launcher_config=two("deepspeed_zero2", tmp_path),
        more=["--output_dir", str(tmp_path / "out"), "--distributed", "zero2"],
    )
    assert "in force: ZeRO-2 · world size 2 · gloo" in launched.run(words)
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["distribution"] == {"kind": "zero2", "size": 2, "backend": "gloo"}
    assert "accelerate" not in record["recipe"] and "--distributed zero2" in record["command"]
    assert read_result(tmp_path / "out" / "modified-0" / "result.json").reload_difference == pytest.approx(0, abs=1e-6)


def test_accelerate_with_ddp(recipe: Path, tmp_path: Path) -> None:
    more = ["--output_dir", str(tmp_path / "out"), "--distributed", "ddp"]
    config = two("ddp", tmp_path)
    words = command(
        str(recipe),
        launcher="accelerate",
        num_processes=2,
        launcher_config=config,
        port=launched.free_port(),
        more=more,
    )
    assert "in force: DDP · world size 2 · gloo" in launched.run(words)


def test_deepspeeds_own_launcher(recipe: Path, tmp_path: Path) -> None:
    more = ["--output_dir", str(tmp_path / "out"), "--deepspeed", "recipes/deepspeed/zero1.json"]
    words = command(str(recipe), launcher="deepspeed", num_processes=2, port=launched.free_port(), more=more)
    assert "in force: ZeRO-1 · world size 2 · gloo" in launched.run(words)


def test_fsdp_that_accelerate_leaves_off_on_a_cpu_stops_the_run(recipe: Path, tmp_path: Path) -> None:
    more = ["--output_dir", str(tmp_path / "out")]
    config = two("fsdp2", tmp_path, mixed_precision="no")
    words = command(
        str(recipe),
        launcher="accelerate",
        num_processes=2,
        launcher_config=config,
        port=launched.free_port(),
        more=more,
    )
    said = launched.run(words, fails=True)
    assert "asked for: FSDP 2 · world size 2 · gloo; in force: " in said
    assert not (tmp_path / "out" / "modified-0" / "model").exists()


def test_an_accelerate_that_starts_one_of_two_processes_stops_the_run(recipe: Path, tmp_path: Path) -> None:
    cpu = {"distributed_type": "MULTI_CPU", "use_cpu": True}
    words = [
        launched.sys.executable, "-m", "accelerate.commands.launch", "--config_file", two("ddp", tmp_path, **cpu),
        *launched.FINETUNE[1:], "--config", str(recipe), "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip
    assert "was asked for several processes and started one" in launched.run(words, fails=True)
