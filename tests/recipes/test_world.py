"""What is asked of a launcher and what is in force: every disagreement stops the run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ropemods.training.world import NotAsAsked, World, asked, check, in_force


def args(**changes: Any) -> Any:
    plain = {
        "deepspeed": None,
        "deepspeed_plugin": None,
        "fsdp": None,
        "ddp_backend": None,
        "device": torch.device("cpu"),
    }
    return SimpleNamespace(**(plain | changes))


def test_one_process_asks_for_itself() -> None:
    assert asked(args(), environment={}) == World("none", 1, None)


def test_a_launcher_asks_by_its_environment() -> None:
    assert asked(args(), environment={"WORLD_SIZE": "4"}) == World("ddp", 4, "gloo")
    plugin = SimpleNamespace(zero_stage=3)
    zero = args(deepspeed="zero3.json", deepspeed_plugin=plugin, device=torch.device("cuda"))
    assert asked(zero, environment={"WORLD_SIZE": "8"}) == World("zero3", 8, "nccl")
    by_accelerate = {"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"}
    assert asked(args(deepspeed_plugin=SimpleNamespace(zero_stage=2)), environment=by_accelerate).kind == "zero2"
    fsdp = {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    assert asked(args(), environment=fsdp).kind == "fsdp2"


def test_a_recipe_that_asks_for_another_number_or_kind_is_refused() -> None:
    with pytest.raises(NotAsAsked, match="world_size=8 and the launcher started 2 processes"):
        asked(args(), world_size=8, environment={"WORLD_SIZE": "2"})
    with pytest.raises(NotAsAsked, match="world_size=2 and the launcher started 1 process;"):
        asked(args(), world_size=2, environment={})
    with pytest.raises(NotAsAsked, match="distributed=zero2"):
        asked(args(), kind="zero2", environment={"WORLD_SIZE": "2"})
    with pytest.raises(ValueError, match="one of none, ddp"):
        asked(args(), kind="zero9", environment={})
    assert asked(args(), kind="ddp", world_size=2, environment={"WORLD_SIZE": "2"}).size == 2


def test_an_accelerate_that_started_one_process_of_several_is_found_out() -> None:
    with pytest.raises(NotAsAsked, match="started one"):
        asked(args(), environment={"MASTER_ADDR": "127.0.0.1", "ACCELERATE_MIXED_PRECISION": "no"})


def test_what_is_in_force_is_read_from_the_wrapped_model() -> None:
    assert in_force(nn.Linear(1, 1)) == World("none", 1, None)


@pytest.mark.parametrize(
    "found", [World("none", 1, None), World("ddp", 2, "gloo"), World("fsdp2", 4, "gloo"), World("fsdp2", 2, "nccl")]
)
def test_any_disagreement_stops_the_run(found: World) -> None:
    wanted = World("fsdp2", 2, "gloo")
    with pytest.raises(NotAsAsked, match="asked for: FSDP 2 · world size 2 · gloo; in force: "):
        check(wanted, found)
    check(wanted, wanted)
