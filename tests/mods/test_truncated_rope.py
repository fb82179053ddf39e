from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import ropemods as rm
from evals import tiny_models
from ropemods.attention import reference
from ropemods.mods import TruncatedRoPE
from tests import zoo
from tests.contract import ModContract


class TestContract(ModContract):
    variants = {
        "half": [TruncatedRoPE(0.5)],
        "highest": [TruncatedRoPE(0.5, which="highest")],
        "one-layer": [TruncatedRoPE(0.5, layers=[1])],
    }


@pytest.mark.parametrize(
    ("keep", "dim", "kept"), [(0.3, 64, 9), (0.1, 96, 4), (0.7, 128, 44), (0.75, 64, 24), (0.0, 64, 0)]
)
def test_the_kept_count_is_the_floor(keep: float, dim: int, kept: int) -> None:
    assert TruncatedRoPE(keep).kept(dim // 2) == kept


@pytest.mark.parametrize("which", ["lowest", "highest"])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_frequencies_equal_the_oracle(which: str, alpha: float) -> None:
    inv_freq = 10000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    found = TruncatedRoPE(0.7, which=which).frequencies(inv_freq, alpha)
    assert torch.equal(found, reference.truncated_frequencies(inv_freq, keep=0.7, which=which, strength=alpha))


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.5, 0.75])
def test_equals_the_native_rope_type_bitwise(keep: float) -> None:
    ids = zoo.tokens()
    model = rm.apply(zoo.build("llama"), TruncatedRoPE(keep))
    config = copy.deepcopy(zoo.build("llama").config)
    config.rope_parameters = {"rope_type": "proportional", "rope_theta": 100.0, "partial_rotary_factor": keep}
    native = AutoModelForCausalLM.from_config(config).eval()
    native.load_state_dict(zoo.build("llama").state_dict())
    assert torch.equal(model(ids).logits, native(ids).logits)
    assert model.config.rope_parameters == config.rope_parameters


@pytest.mark.parametrize("scaling", zoo.ROPE_SCALINGS)
def test_composes_with_every_scaling(scaling: str) -> None:
    stock = zoo.build("llama", rope_parameters=zoo.ROPE_SCALINGS[scaling])
    model = rm.apply(copy.deepcopy(stock), TruncatedRoPE(0.5))
    ids = zoo.tokens(length=40)  # past every original length, where dynamic and longrope change their tables
    stock(ids)
    wanted = reference.truncated_frequencies(_table_at(stock, ids), keep=0.5)
    assert torch.equal(_table_at(model, ids), wanted)
    assert not torch.equal(_table_at(model, ids), _table_at(stock, ids))


def test_llama3_scaling_equals_the_analytic_table() -> None:
    parameters = zoo.ROPE_SCALINGS["llama3"]
    model = rm.apply(zoo.build("llama", rope_parameters=parameters), TruncatedRoPE(0.5))
    base = parameters["rope_theta"] ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    wavelength = 2 * torch.pi / base
    original = parameters["original_max_position_embeddings"]
    low, high = original / parameters["low_freq_factor"], original / parameters["high_freq_factor"]
    blend = (original / wavelength - 1.0) / (4.0 - 1.0)
    scaled = torch.where(wavelength > low, base / 4.0, (1 - blend) * base / 4.0 + blend * base)
    table = torch.where(wavelength < high, base, scaled)
    table[2:] = 0
    torch.testing.assert_close(model.model.rotary_emb.inv_freq.double(), table, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scaling", [*zoo.ROPE_SCALINGS, None])
@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_save_load_and_export_over_every_scaling(scaling: str | None, strength: float, tmp_path) -> None:
    changes = {"rope_parameters": zoo.ROPE_SCALINGS[scaling]} if scaling else {}
    model = rm.apply(zoo.build("llama", **changes), TruncatedRoPE(0.5), strength=strength)
    ids = zoo.tokens(length=40)
    wanted = model(ids).logits
    model.save_pretrained(tmp_path / "mod")
    assert torch.equal(rm.from_pretrained(tmp_path / "mod")(ids).logits, wanted)
    if scaling == "dynamic":
        with pytest.raises(ValueError, match="at every length"):
            rm.export(model, tmp_path / "stock")
        return
    rm.export(model, tmp_path / "stock")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "stock")(ids).logits, wanted)


def test_full_strength_over_longrope_loads_in_stock_transformers(tmp_path) -> None:
    model = rm.apply(zoo.build("phi3"), TruncatedRoPE(0.5))
    ids = zoo.tokens()
    wanted = model(ids).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, wanted)


@pytest.mark.parametrize("layers", [None, [1]])
def test_a_table_that_is_computed_anew_in_each_pass_is_edited_too(layers: list[int] | None) -> None:
    """phimoe's rotary module calls its init function instead of reading its buffer."""
    stock, ids = tiny_models.build("phimoe"), tiny_models.tokens()
    before = stock(ids).logits
    model = rm.apply(copy.deepcopy(stock), TruncatedRoPE(0.5, layers=layers))
    whole = rm.apply(copy.deepcopy(stock), TruncatedRoPE(0.5))
    stock_rotary, rotary = (next(m for m in each.modules() if hasattr(m, "rope_init_fn")) for each in (stock, whole))
    frequencies = reference.truncated_frequencies(stock_rotary.inv_freq.double(), keep=0.5)
    angles = torch.arange(3)[:, None] * frequencies
    cos, sin = rotary(torch.ones(1, 1, 1), position_ids=torch.arange(3)[None])
    torch.testing.assert_close(cos[0].double(), torch.cat((angles, angles), -1).cos(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sin[0].double(), torch.cat((angles, angles), -1).sin(), rtol=1e-6, atol=1e-6)
    assert (model(ids).logits - before).abs().max() > 1e-3
    rm.set_strength(model, 0.0)
    assert torch.equal(model(ids).logits, before)
    rm.set_strength(model, 1.0)
    assert torch.equal(rm.remove(model)(ids).logits, before)


@pytest.mark.parametrize("layers", [None, [1]])
@pytest.mark.parametrize("casts", [("half",), ("half", "float"), ("bfloat16", "float")])
def test_a_cast_model_at_strength_zero_is_the_cast_stock_model(
    casts: tuple[str, ...], layers: list[int] | None
) -> None:
    """A cast to half precision and back leaves stock tables rounded, and so it does what the edits are made from."""
    ids, stock = zoo.tokens(length=40), zoo.build("llama")
    model = rm.apply(zoo.build("llama"), TruncatedRoPE(0.5, layers=layers))
    for cast in casts:
        for each in (stock, model):
            getattr(each, cast)()
    rm.set_strength(model, 0.0)
    assert torch.equal(model(ids).logits, stock(ids).logits)
    rm.set_strength(model, 1.0)
    rounded = rm.apply(copy.deepcopy(stock), TruncatedRoPE(0.5, layers=layers))
    assert torch.equal(model(ids).logits, rounded(ids).logits)
    buffers = {name for name, _ in stock.named_buffers()}
    assert torch.equal(rm.remove(model)(ids).logits, stock(ids).logits)
    assert {name for name, _ in model.named_buffers()} == buffers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 1.0}, "below 1"),
        ({"keep": -0.1}, "at least 0"),
        ({"keep": True}, "at least 0"),
        ({"keep": 0.5, "which": "middle"}, "'lowest' or 'highest'"),
        ({"keep": 0.5, "layers": []}, "nothing would change"),
        ({"keep": 0.5, "layers": 3}, "list of layer indices"),
    ],
)
def test_bad_options_say_what_is_wrong(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TruncatedRoPE(**options)


def _table_at(model, ids) -> torch.Tensor:
    """The frequencies in force for a sequence of this length."""
    model(ids, use_cache=False)
    return model.model.rotary_emb.inv_freq.clone()
