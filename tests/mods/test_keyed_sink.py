from __future__ import annotations

import pytest
import torch

import ropemods as rm
from ropemods.attention import eager
from ropemods.model import attention_function
from ropemods.mods import KeyedSink
from tests import zoo
from tests.contract import ModContract, close


class TestContract(ModContract):
    variants = {
        "all": [KeyedSink(offset=3)],
        "no value": [KeyedSink(value=False, trains="logit"), rm.AdaptiveTemperature()],
        "fixed": [KeyedSink(offset=2, trains="none", layers=[0]), rm.LearnedSink(init=0.2, layers=[1])],
    }


def masses(model, ids) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per layer the mass on BOS or the slot, and that on position 1, of each later row."""
    found = []

    def look(site, rows, call, lse):
        _, probabilities, log_z = eager.attend(rows)
        slot = torch.exp(rows.slots[0].logit - log_z) if rows.slots else probabilities[..., 0]
        found.append((slot[..., 2:], probabilities[..., 2:, 1]))

    with attention_function.observed(look, of=model, want_lse=True), torch.no_grad():
        model(ids, use_cache=False)
    return found


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "qwen3"])
def test_the_row_at_the_offset_is_the_models_own(architecture: str) -> None:
    """Each query at distance `offset` reads the slot as it read BOS; with the offset of every query in turn, that is
    the whole row of logits."""
    ids = zoo.tokens(rows=2)
    wanted = masses(rm.apply(zoo.build(architecture, "eager"), rm.UnrotatedBos(), strength=0.0), ids)[0]
    for offset in (2, 5, 9):
        model = rm.apply(zoo.build(architecture, "eager"), KeyedSink(offset=offset))
        slot, first = masses(model, ids)[0]
        close(slot[..., offset - 2], wanted[0][..., offset - 2], 1e-5)
        close(first[..., offset - 2], wanted[1][..., offset - 2], 1e-5)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_no_later_token_reads_the_bos(backend: str) -> None:
    model, ids = rm.apply(zoo.build("llama", backend), KeyedSink()), zoo.tokens()
    before = model(ids).logits[:, 1:]
    with torch.no_grad():
        model.model.embed_tokens.weight[zoo.BOS] += 1.0
    assert torch.equal(model(ids).logits[:, 1:], before)


def test_the_bos_itself_stays_a_closed_system() -> None:
    ids, stock = zoo.tokens(), zoo.build()
    close(rm.apply(zoo.build(), KeyedSink())(ids).logits[:, 0], stock(ids).logits[:, 0], 1e-6)


@pytest.mark.parametrize("mod", [KeyedSink(), rm.AnchoredBos()], ids=str)
def test_calibration_takes_the_offset_of_least_change_in_each_layer_and_says_it(mod) -> None:
    ids = zoo.tokens(rows=8, length=24)
    model = rm.apply(zoo.build("llama", "eager"), mod, calibration=ids)
    offsets = [int(buffer) for name, buffer in model.named_buffers() if name.endswith("offset")]
    stock = rm.apply(zoo.build("llama", "eager"), rm.UnrotatedBos(), strength=0.0)
    wanted = [had for had, _ in masses(stock, ids)]

    def change(layer: int, offset: int) -> float:
        other = rm.apply(zoo.build("llama", "eager"), rm.AnchoredBos(offset=offset, layers=[layer]))
        return (masses(other, ids)[layer][0] - wanted[layer]).square().sum().item()

    tried = [1, 2, 3, 4, 6, 8, 12, 16]
    assert offsets == [min(tried, key=lambda offset, layer=layer: change(layer, offset)) for layer in range(2)]
    for layer, offset in enumerate(offsets):
        assert f"{offset} back" in rm.summary(model).splitlines()[1 if offsets[0] == offsets[1] else 1 + layer]


def test_what_stands_in_its_way_is_said() -> None:
    with pytest.raises(ValueError, match="AnchoredBos rescores the BOS column and KeyedSink closes it"):
        rm.apply(zoo.build(), KeyedSink(), rm.AnchoredBos())
    with pytest.raises(ValueError, match="reach no later token"):
        rm.apply(zoo.build(), KeyedSink(), rm.ReplacedBos())
    with pytest.raises(ValueError, match="0 or more"):
        KeyedSink(offset=-1)
