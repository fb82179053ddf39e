from __future__ import annotations

import pytest
import torch

import ropemods as rm
from ropemods.mods import OutputGate
from tests import zoo
from tests.contract import ModContract


class TestContract(ModContract):
    moved = 0.05  # a matrix, whose products with all channels would saturate every gate
    variants = {
        "head": [OutputGate()],
        "channel": [OutputGate("channel", layers=[0]), rm.LearnedSink(init=0.3)],
    }


@pytest.mark.parametrize("per", ["head", "channel"])
def test_it_starts_at_the_model_bit_by_bit_with_a_gradient(per: str) -> None:
    ids, model = zoo.tokens(), rm.apply(zoo.build(), OutputGate(per))
    assert torch.equal(model(ids).logits, zoo.build()(ids).logits)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if "ropemods" in name)


def test_a_closed_gate_silences_its_head() -> None:
    ids, model = zoo.tokens(), rm.apply(zoo.build(), OutputGate())
    stock = zoo.build()
    for gated, plain in zip(model.model.layers, stock.model.layers, strict=True):
        dim = plain.self_attn.head_dim
        with torch.no_grad():
            gated.self_attn.ropemods.output_gate.bias[1] = -100.0
            plain.self_attn.o_proj.weight[:, dim : 2 * dim] = 0
    torch.testing.assert_close(model(ids).logits, stock(ids).logits)
