"""One way in through what is put around a model: torch.compile, PEFT, DDP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ropemods as rm
from ropemods.model.wrappers import base_model, uncompiled, unwrapped
from tests import zoo

LORA = LoraConfig(r=2, target_modules=["q_proj"])


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("to_call", [False, True])
def test_the_model_is_found_within_any_order_of_wrappers(to_call: bool, alone: None) -> None:
    peft = get_peft_model(zoo.build(), LORA)
    for model in (zoo.build(), peft):
        for outer in (torch.compile(DistributedDataParallel(model)), DistributedDataParallel(torch.compile(model))):
            assert unwrapped(outer, to_call=to_call) is model
    assert base_model(torch.compile(peft)) is peft.get_base_model()


def test_what_cannot_be_called_without_its_wrapper_keeps_it() -> None:
    model = zoo.build()
    wrapped = nn.DataParallel(model)
    assert unwrapped(wrapped, to_call=True) is wrapped and unwrapped(wrapped) is model


def test_an_adapter_around_a_compiled_model_is_an_adapter() -> None:
    model = zoo.build()
    peft = get_peft_model(torch.compile(model), LORA)
    assert uncompiled(peft) is peft and base_model(peft) is model
    with pytest.raises(ValueError, match="apply them first, then get_peft_model"):
        rm.apply(peft, rm.LearnedSink(init=0.0))
