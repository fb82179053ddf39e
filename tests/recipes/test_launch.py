"""The commands that start a recipe: a list of words, this Python, and the number of processes told to the recipe."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from ropemods.training.launcher import command

START = [sys.executable, "-m"]
END = ["--config", "r.yaml"]


def test_each_launcher_has_its_command() -> None:
    assert command("r.yaml") == [*START, "ropemods.training", *END]
    assert command("r.yaml", launcher="torchrun", num_processes=2) == [
        *START, "torch.distributed.run", "--nproc_per_node", "2", "-m", "ropemods.training", *END, "--world_size", "2",
    ]  # fmt: skip
    assert command("r.yaml", launcher="accelerate", num_processes=8, launcher_config="ddp.yaml") == [
        *START, "accelerate.commands.launch", "--config_file", "ddp.yaml", "--num_processes", "8", "-m",
        "ropemods.training", *END, "--world_size", "8",
    ]  # fmt: skip
    assert command("r.yaml", launcher="deepspeed", num_processes=8, more=["--deepspeed", "zero2.json"]) == [
        *START, "deepspeed.launcher.runner", "--num_gpus", "8", "--module", "ropemods.training", *END, "--world_size",
        "8", "--deepspeed", "zero2.json",
    ]  # fmt: skip


def test_words_are_never_split_or_joined() -> None:
    assert command("a b;c.yaml", more=["--mods", "[{kind: learned_sink}]"])[-3:] == [
        "a b;c.yaml", "--mods", "[{kind: learned_sink}]",
    ]  # fmt: skip


def test_with_a_hostfile_the_machines_say_how_many() -> None:
    words = command("r.yaml", launcher="deepspeed", num_processes=16, hostfile="hosts")
    assert words[2:5] == ["deepspeed.launcher.runner", "--hostfile", "hosts"] and "--num_gpus" not in words
    assert words[-2:] == ["--world_size", "16"]


@pytest.mark.parametrize(
    ("launcher", "flag"),
    [("torchrun", "--master_port"), ("accelerate", "--main_process_port"), ("deepspeed", "--master_port")],
)
def test_two_runs_on_one_machine_meet_at_ports_of_their_own(launcher: Any, flag: str) -> None:
    words = command("r.yaml", launcher=launcher, num_processes=2, port=29511)
    assert words[words.index(flag) + 1] == "29511" and words.index(flag) < words.index("ropemods.training")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"launcher": "mpirun"}, "one of python, torchrun"),
        ({"num_processes": 2}, "which starts one"),
        ({"launcher": "torchrun"}, "needs num_processes"),
        ({"launcher": "torchrun", "num_processes": 0}, "at least 1"),
        ({"launcher": "torchrun", "num_processes": 2, "launcher_config": "x.yaml"}, "config of accelerate"),
        ({"port": 29511}, "starts one"),
        ({"launcher": "accelerate", "hostfile": "hosts"}, "read by deepspeed"),
    ],
)
def test_options_that_do_not_go_together_are_errors(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        command("r.yaml", **options)
