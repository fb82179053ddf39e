"""Two ranks train the same tiny recipe to the same loss as one rank with the same global batch, in every distribution.

All run on CPUs over gloo. One launch goes through all distributions; the parameters below look at one result each.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ropemods.training.arms import ArmResult, read_result
from tests.recipes import launched, tiny

pytestmark = pytest.mark.slow

LORA = {
    "r": 4,
    "target_modules": "all-linear",
    "modules_to_save": ["embed_tokens", "norm"],
    "ensure_weight_tying": True,
}
PROBE = {"sequences": 16, "length": 48, "groups": 8, "early": [8, 16], "grid_rows": 16, "mask_term": False}
CASES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "zero1": {"deepspeed": "recipes/deepspeed/zero1.json"},
    "zero2": {"deepspeed": "recipes/deepspeed/zero2.json"},
    "zero3": {"deepspeed": "recipes/deepspeed/zero3.json", "probe": PROBE, "probe_steps": 4},
    "zero3-lora": {"deepspeed": "recipes/deepspeed/zero3.json", "lora": LORA},
    "fully_shard": {"sharded": True},
}


def case(model: Path, text: Path, output: Path, ranks: int, **changes: Any) -> dict[str, Any]:
    batch = {"global_batch_size": 8, "per_device_train_batch_size": 8 // ranks}
    # The learned sink owns parameters of its own; the temperature has one for the whole model beside those of layers.
    mods = ["truncated_rope:keep=0.5", "adaptive_temperature:trainable=shared", "learned_sink"]
    return tiny.values(model, text, output, **{"arms": ["modified"], "mods": mods, **batch, **changes})


@pytest.fixture(scope="module")
def folder(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    alone = [case(model, text, folder / "one", 1), case(model, text, folder / "one-lora", 1, lora=LORA)]
    (folder / "alone.json").write_text(json.dumps(alone))
    worker = str(launched.ROOT / "tests" / "recipes" / "two_ranks.py")
    launched.run([launched.sys.executable, worker, str(folder / "alone.json")])
    together = [case(model, text, folder / name, 2, **changes) for name, changes in CASES.items()]
    (folder / "together.json").write_text(json.dumps(together))
    said = launched.run([*launched.torchrun(2), worker, str(folder / "together.json")])
    (folder / "said.txt").write_text(said)
    return folder


def result(folder: Path, name: str) -> ArmResult:
    return read_result(folder / name / "modified-0" / "result.json")


def alone(folder: Path, name: str) -> ArmResult:
    return result(folder, "one-lora" if name.endswith("lora") else "one")


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_to_the_loss_of_one(folder: Path, name: str) -> None:
    if name == "fully_shard":
        found = json.loads((folder / name / "sharded.json").read_text())
        loss, curve = found["loss"], found["curve"]
    else:
        made = result(folder, name)
        loss, curve = made.loss, made.curve
    reference = alone(folder, name)
    assert abs(loss - reference.loss) < 1e-3
    assert len(curve) == len(reference.curve) == 8
    for (step, a), (same, b) in zip(curve, reference.curve, strict=True):
        assert step == same and abs(a - b) < 1e-3
    # The training did something, or equality would say nothing.
    assert reference.curve[-1][1] < reference.curve[0][1] - 0.05


@pytest.mark.parametrize("name", [name for name in CASES if name != "fully_shard"])
def test_what_was_saved_is_the_model_that_was_trained(folder: Path, name: str) -> None:
    assert result(folder, name).reload_difference is not None
    assert result(folder, name).reload_difference == pytest.approx(0, abs=1e-6)
    adapter = name.endswith("lora")
    weights = "adapter_model.safetensors" if adapter else "model.safetensors"
    together = load_file(folder / name / "modified-0" / "model" / weights)
    single = load_file(folder / ("one-lora" if adapter else "one") / "modified-0" / "model" / weights)
    # DeepSpeed hands transformers copies, so tied weights are written twice.
    head = together.pop("lm_head.weight", None)
    assert head is None or (head == together["model.embed_tokens.weight"]).all()
    assert together.keys() == single.keys()
    assert any("ropemods.learned_sink" in key for key in together)
    assert any("ropemods.adaptive_temperature" in key for key in together)
    for key, value in together.items():
        assert value.shape == single[key].shape
        assert (value - single[key]).abs().max() < 2e-3, key
    trained = next(value for key, value in together.items() if "learned_sink" in key)
    assert trained.abs().max() > 0


def test_leakage_is_probed_while_zero3_has_the_parameters_spread(folder: Path) -> None:
    probes = result(folder, "zero3").probes
    assert [step for step, *_ in probes] == [0, 4, 8]
    assert all(low <= value <= high for _, value, low, high in probes)


def test_each_run_states_what_is_in_force(folder: Path) -> None:
    said = (folder / "said.txt").read_text()
    for kind in ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3"):
        assert f"in force: {kind} · world size 2 · gloo · cpu · 8 rows a step (4 × 1 × 2)" in said
