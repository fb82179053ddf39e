from __future__ import annotations

import pytest
import torch

import ropemods as rm
from ropemods.attention import reference
from ropemods.attention.terms import EntropyScale
from ropemods.model import attention_function
from ropemods.mods import AdaptiveTemperature
from ropemods.mods.adaptive_temperature import PUBLISHED
from tests import zoo
from tests.contract import ModContract, close

PUBLISHED_VALUES = {0.5: 1.0, 1: 1.270, 2: 2.099, 3: 2.250, 4: 2.389, 5: 2.294, 5.5: 1.8466, 5.9: 1.1094, 6: 1.0}


class TestContract(ModContract):
    variants = {
        "paper": [AdaptiveTemperature()],
        "head-hold": [AdaptiveTemperature(trainable="head", beyond="hold")],
        "shared-spare": [AdaptiveTemperature(trainable="shared", spare_bos=True)],
        "one-layer": [AdaptiveTemperature(trainable="layer", layers=[-1])],
        "from the model": [AdaptiveTemperature(trainable="head", start="model")],
    }


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("trainable", ["head", "layer", "shared"])
def test_from_the_model_it_is_the_model_until_it_trains_and_says_what_it_learned(backend: str, trainable: str) -> None:
    ids, mod = zoo.tokens(), AdaptiveTemperature(trainable=trainable, start="model")
    model = rm.apply(zoo.build("llama", backend), mod)
    close(model(ids).logits, zoo.build("llama", backend)(ids).logits, 1e-6)
    model(input_ids=ids, labels=ids).loss.backward()
    offsets = [p for name, p in model.named_parameters() if name.endswith("offsets")]
    assert all((p.grad.abs() > 0).any() for p in offsets)
    if trainable != "shared":
        with torch.no_grad():
            offsets[0][:, -2] = 0.4412  # 0.1 · H
        line = "layer 0: β at H = 1 … 6: 1.100, 1.200, 1.300, 1.400, 1.500, 1.600"
        assert line in rm.summary(model) and "layer 1: β at H = 1 … 6: 1.000, 1.000" in rm.summary(model)


def test_from_the_model_takes_no_coefficients_and_trains() -> None:
    with pytest.raises(ValueError, match="until it has trained"):
        AdaptiveTemperature(start="model", coefficients=(1.0, 2.0))
    assert AdaptiveTemperature(start="model").trainable == "head"


def beta(entropy: float, *, hold_from: float | None = None, strength: float = 1.0) -> float:
    rule = EntropyScale(torch.tensor([PUBLISHED], dtype=torch.float64), torch.tensor(strength), hold_from)
    return float(rule.beta(torch.tensor([[[entropy]]], dtype=torch.float64)))


@pytest.mark.parametrize(("entropy", "wanted"), PUBLISHED_VALUES.items())
def test_beta_has_the_published_values(entropy: float, wanted: float) -> None:
    assert beta(entropy) == pytest.approx(wanted, abs=6e-4)


@pytest.mark.parametrize("entropy", [0.2, 0.7, 1.5, 3.3, 4.4, 5.2, 7.0])
@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_beta_equals_the_oracle(entropy: float, strength: float) -> None:
    wanted = reference.temperature(torch.tensor(entropy, dtype=torch.float64), strength=strength)
    assert beta(entropy, strength=strength) == pytest.approx(float(wanted), abs=1e-12)


def test_the_published_rule_is_off_past_382_tokens_and_hold_is_not() -> None:
    hold_from = AdaptiveTemperature(beyond="hold").peak()
    assert hold_from == pytest.approx(4.412, abs=1e-3)
    assert beta(5.95) == 1.0
    assert beta(9.0, hold_from=hold_from) == pytest.approx(2.4214, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beyond": "never"}, "'paper' or 'hold'"),
        ({"trainable": True}, "'shared', 'layer' or 'head'"),
        ({"coefficients": PUBLISHED[::-1]}, None),
        ({"coefficients": (0.0, 0.5)}, "nothing would ever be sharpened"),
        ({"coefficients": (1.0,)}, "two or more"),
    ],
)
def test_bad_options_say_what_is_wrong(options: dict, message: str | None) -> None:
    if message is None:
        # The published coefficients in ascending order, the bug seen elsewhere, are still a rule; just another one.
        assert AdaptiveTemperature(**options).peak() != AdaptiveTemperature().peak()
        return
    with pytest.raises(ValueError, match=message):
        AdaptiveTemperature(**options)


def test_a_mask_that_the_layers_share_is_looked_at_once_and_again_when_it_changes(monkeypatch) -> None:
    """Looking waits for the device. A mask that adds to logits goes where they are written out."""
    looked, adds = [], attention_function._adds
    monkeypatch.setattr(attention_function, "_adds", lambda mask: looked.append(mask) or adds(mask))
    model, ids = rm.apply(zoo.build("llama", "sdpa"), AdaptiveTemperature()), zoo.tokens()
    eager = rm.apply(zoo.build("llama", "eager"), AdaptiveTemperature())
    mask = torch.full((12, 12), float("-inf")).triu(1).expand(2, 1, 12, 12).clone()
    wanted = model(ids, use_cache=False).logits
    assert not looked
    close(model(ids, attention_mask=mask, use_cache=False).logits, wanted, 2e-5)
    assert len(looked) == 1
    mask[..., 3] += 1.0
    biased = model(ids, attention_mask=mask, use_cache=False).logits
    assert len(looked) == 2
    close(biased, eager(ids, attention_mask=mask, use_cache=False).logits, 2e-5)
    assert (biased - wanted).abs().max() > 1e-2
    assert len(looked) == 2
