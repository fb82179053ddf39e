"""A modification of one's own applies, trains, saves and reloads like ours, once it is registered."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

import ropemods as rm
from ropemods.mods import MODS
from tests import zoo
from tests.mods.own import Cooled, Dimmed, Levelled, Shifted, Slowed

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("mod", [Slowed(), Shifted(names=["a", "b"]), Cooled(), Levelled(), Dimmed()], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_it_keeps_the_promises_that_ours_keep(mod, architecture, tmp_path: Path) -> None:
    stock, ids = zoo.build(architecture), zoo.tokens()
    model = rm.apply(zoo.build(architecture), mod, strength=0.0)
    assert torch.equal(model(ids).logits, stock(ids).logits)
    model.save_pretrained(tmp_path / "stock")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "stock")(ids).logits, stock(ids).logits)
    rm.set_strength(model, 0.7)
    logits = model(ids).logits
    assert (logits - stock(ids).logits).abs().max() > 1e-4
    model.save_pretrained(tmp_path / "modified")
    loaded = rm.from_pretrained(tmp_path / "modified")
    assert loaded.ropemods_attached.mods == [mod]
    assert torch.equal(loaded(ids).logits, logits)
    with pytest.raises(ValueError, match="ropemods"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "modified")
    assert torch.equal(rm.remove(model)(ids).logits, stock(ids).logits)


def test_it_trains_and_reloads_with_what_it_learned(tmp_path: Path) -> None:
    model, ids = rm.apply(zoo.build(), Shifted()).train(), zoo.tokens()
    number = model.model.layers[0].self_attn.ropemods.shifted.number
    before = number.detach().clone()
    model(ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert not torch.equal(number, before)
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(rm.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_it_is_saved_with_an_adapter_and_comes_back_with_it(tmp_path: Path) -> None:
    zoo.build().save_pretrained(tmp_path / "base")
    base, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "base"), zoo.tokens()
    config = LoraConfig(r=2, target_modules="all-linear", modules_to_save=["ropemods"], init_lora_weights=False)
    wrapped = get_peft_model(rm.apply(base, Shifted(), Slowed(), strength=0.6), config).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    loaded = rm.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(ids).logits, wrapped(ids).logits, rtol=0, atol=1e-6)


def test_a_process_that_does_not_know_it_is_told_to_register_it(tmp_path: Path) -> None:
    rm.apply(zoo.build(), Shifted()).save_pretrained(tmp_path)
    program = f"import ropemods as rm; rm.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1
    assert "unknown modification 'shifted'; known are truncated_rope" in done.stderr
    assert "`from tests.mods.own import Shifted` and ropemods.register(Shifted)" in done.stderr


def test_one_that_is_not_registered_is_refused_before_anything_is_lost() -> None:
    @dataclasses.dataclass(frozen=True)
    class Unknown(rm.Mod):
        kind: ClassVar[str] = "unknown"

    @dataclasses.dataclass(frozen=True)
    class OtherSink(rm.LearnedSink):
        """Would be read back as a LearnedSink."""

    for mod in (Unknown(), OtherSink()):
        with pytest.raises(ValueError, match=r"is not registered, .*; put @ropemods.register on the class"):
            rm.apply(zoo.build(), mod)


def test_one_whose_options_json_cannot_hold_is_refused() -> None:
    @rm.register
    @dataclasses.dataclass(frozen=True)
    class Odd(rm.Mod):
        kind: ClassVar[str] = "odd"
        value: object = None

        def frequencies(self, inv_freq_F: Tensor, alpha: float) -> Tensor:
            return inv_freq_F / 2

    with pytest.raises(ValueError, match="cannot be written to a checkpoint and read again"):
        rm.apply(zoo.build(), Odd(value=torch.zeros(1)))
    with pytest.raises(ValueError, match="give its options types that JSON has"):
        rm.apply(zoo.build(), Odd(value={1: 2}))
    rm.apply(zoo.build(), Odd(value={"a": [1, None]}))


def frozen(**body):
    return dataclasses.dataclass(frozen=True)(type("Mine", (rm.Mod,), {"__annotations__": {}, **body}))


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (lambda: object, TypeError, "a class derived from ropemods.Mod"),
        (lambda: rm.LearnedSink(), TypeError, "a class derived from ropemods.Mod"),
        (lambda: type("Mine", (rm.Mod,), {"kind": "mine"}), TypeError, "must be a frozen dataclass"),
        (lambda: frozen(), ValueError, "kind must be a name such as 'learned_sink'"),
        (lambda: frozen(kind="no name"), ValueError, "kind must be a name such as 'learned_sink'"),
        (lambda: frozen(kind="forward"), ValueError, "kind must be a name such as 'learned_sink'"),
        (lambda: frozen(kind="learned_sink"), ValueError, r"is ropemods.mods.learned_sink.LearnedSink's; give Mine"),
    ],
)
def test_what_cannot_be_registered_says_why(made, error, message) -> None:
    with pytest.raises(error, match=message):
        rm.register(made())


def test_registering_again_puts_the_new_one_in_its_place() -> None:
    def cell() -> type[rm.Mod]:
        @rm.register
        @dataclasses.dataclass(frozen=True)
        class Again(rm.Mod):
            kind: ClassVar[str] = "again"

            def frequencies(self, inv_freq_F: Tensor, alpha: float) -> Tensor:
                return inv_freq_F / 2

        return Again

    first, second = cell(), cell()
    with pytest.raises(ValueError, match="not registered"):
        rm.apply(zoo.build(), first())
    rm.apply(zoo.build(), second())


@pytest.mark.parametrize("mod", MODS, ids=lambda mod: mod.kind)
def test_ours_may_be_registered_and_are_as_they_were(mod) -> None:
    assert rm.register(mod) is mod
