"""`ropemods show`: what it says of a checkpoint is so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import ropemods as rm
from tests.cli.program import logits, refused, run, save_tiny, shown


def test_show_gives_the_frequencies_in_force(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("apply model out --mods truncated_rope:keep=0.5 learned_sink:init=0 --strength 0.75")
    found = shown("out", capsys)
    (rope,) = found["rope"]
    wavelengths = [2 * torch.pi * 100 ** (band / 4) for band in range(4)]  # θ = 100, 4 frequencies
    assert rope["wavelengths"] == pytest.approx(wavelengths, rel=1e-6)
    assert rope["wavelengths_in_force"] == pytest.approx(
        [*wavelengths[:2], wavelengths[2] / 0.25, wavelengths[3] / 0.25], rel=1e-6
    )
    assert (rope["kept"], rope["dropped"], rope["stopped"]) == (2, 2, 0)
    assert rope["first_dropped_wavelength"] == pytest.approx(62.832, rel=1e-4)
    assert [(mod["kind"], mod["strength"], mod["stored"]) for mod in found["mods"]] == [
        ("truncated_rope", 0.75, 0),
        ("learned_sink", 0.75, 8),
    ]
    run("show out")
    text = capsys.readouterr().out
    assert "llama · 2 layers · 4 heads (2 key/value) of 8 · context 64 · BOS 1 · float32" in text
    assert "TruncatedRoPE(keep=0.5) · strength 0.75" in text
    assert "2 kept, 2 slowed to 0.25 of their frequency" in text
    assert "first dropped band: wavelength 62.8 tokens, 6.4 rad at the context of 64" in text


@pytest.mark.parametrize("keep", [0, 0.25, 0.75])
@pytest.mark.parametrize("which", ["lowest", "highest"])
def test_show_counts_what_stops_in_checkpoint_and_export_alike(
    here: Path, capsys: pytest.CaptureFixture[str], keep: float, which: str
) -> None:
    run(f"apply model out --mods truncated_rope:keep={keep},which={which}")
    run("export out stock")
    for path in ("out", "stock"):
        (rope,) = shown(path, capsys)["rope"]
        kept = int(keep * 4)
        assert (rope["kept"], rope["dropped"], rope["stopped"]) == (kept, 4 - kept, 4 - kept)


def test_show_reads_every_table_of_a_model_with_several(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny(here / "gemma", "gemma3_text")
    run("apply gemma out --mods truncated_rope:keep=0.5")
    ropes = {rope["layer_type"]: rope for rope in shown("out", capsys)["rope"]}
    # θ = 50, and θ = 200 stretched by two; four frequencies each, so the third is the first dropped.
    assert ropes["sliding_attention"]["first_dropped_wavelength"] == pytest.approx(2 * torch.pi * 50**0.5, rel=1e-6)
    assert ropes["full_attention"]["first_dropped_wavelength"] == pytest.approx(4 * torch.pi * 200**0.5, rel=1e-6)


@pytest.mark.parametrize("strength", [0, 0.5, 1])
@pytest.mark.parametrize("mods", ["truncated_rope:keep=0.5", "replaced_bos", "learned_sink truncated_rope"])
def test_show_says_of_stock_loading_what_is_so(
    here: Path, capsys: pytest.CaptureFixture[str], mods: str, strength: float
) -> None:
    run(f"apply model out --mods {mods} --strength {strength}")
    claim = shown("out", capsys)["loads_in_stock_transformers"]
    try:
        stock = logits(AutoModelForCausalLM.from_pretrained("out"))
    except (KeyError, ValueError):
        assert not claim
    else:
        assert claim
        assert torch.equal(stock, logits(rm.from_pretrained("out")))


def test_show_says_that_a_model_has_nothing_to_modify(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64)).save_pretrained("gpt2")
    run("show gpt2")
    text = capsys.readouterr().out
    assert "gpt2 · 2 layers · 4 heads of 8" in text
    assert "none: this model has no rotary frequencies to modify" in text
    assert "has no rotary frequency table" in refused("apply gpt2 out --mods truncated_rope", capsys)


def test_show_needs_no_weights(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("apply model out --mods truncated_rope learned_sink")
    (here / "out" / "model.safetensors").unlink()
    found = shown("out", capsys)
    assert found["model"]["parameters"] is None
    assert found["notes"] == []


def test_show_notices_that_parameters_were_not_saved(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    run("apply model out --mods learned_sink")
    weights = here / "out" / "model.safetensors"
    save_file({k: v for k, v in load_file(weights).items() if "ropemods" not in k}, weights)
    assert shown("out", capsys)["notes"] == [
        "learned_sink has parameters, and the weights hold none: this was saved incompletely"
    ]


def test_show_describes_an_adapter_and_its_base(
    here: Path, adapter: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    found = shown("adapter", capsys)
    assert found["adapter"] == {
        "type": "LORA",
        "base": "model",
        "rank": 2,
        "alpha": 8,
        "targets": ["q_proj"],
        "parameters": 2 * 2 * (32 + 32),
    }
    assert found["model"]["type"] == "llama"
    assert found["rope"][0]["stopped"] == 2
    assert not found["loads_in_stock_transformers"]
    (here / "model").rename(here / "elsewhere")
    found = shown("adapter", capsys)
    assert found["model"] is None
    assert found["mods"][0]["kind"] == "truncated_rope"
    assert "the base model is not described: model: there is no such folder here" in found["notes"][0]


def test_show_paths_reads_the_table_of_capabilities(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("apply model out --mods learned_sink:init=0 scale_invariant:start=paper --attn_implementation eager")
    capsys.readouterr()
    run("show out --paths --json")
    found = json.loads(capsys.readouterr().out)
    assert {mod: [path for path, why in reasons.items() if why is None] for mod, reasons in found["mods"].items()} == {
        "LearnedSink(init=0.0)": ["eager", "flash", "triton", "triton-rows", "flex"],
        "ScaleInvariant(tau=10.0, start='paper')": ["eager", "flex"],
        "LearnedSink(init=0.0) + ScaleInvariant(tau=10.0, start='paper')": ["eager"],
    }
    assert found["paths"]["flash"] is None and ("CUDA" in found["paths"]["triton"]) != torch.cuda.is_available()
    run("show model --paths")
    text = capsys.readouterr().out
    assert text.startswith("training on c") and "\nScaleInvariant(tau=10.0)" in text and "\nKeyedSink()" in text
    assert "a factor and bias by offset was asked for on the triton kernels" in text
