from __future__ import annotations

import pytest
import torch

import ropemods as rm
from ropemods.mods import AnchoredBos
from tests import zoo
from tests.contract import ModContract


class TestContract(ModContract):
    everywhere = False
    variants = {
        "offset": [AnchoredBos(offset=3)],
        "tempered": [AnchoredBos(), rm.AdaptiveTemperature(spare_bos=True)],
    }


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_offset_0_is_an_unrotated_bos(backend: str) -> None:
    ids = zoo.tokens()
    models = [rm.apply(zoo.build("llama", backend), mod) for mod in (AnchoredBos(offset=0), rm.UnrotatedBos())]
    assert torch.equal(models[0](ids).logits, models[1](ids).logits)


def test_without_a_batch_the_offset_is_32() -> None:
    assert "BOS scored 32 back" in rm.summary(rm.apply(zoo.build(), AnchoredBos()))


def test_a_negative_offset_is_refused() -> None:
    with pytest.raises(ValueError, match="0 or more"):
        AnchoredBos(offset=-1)
