"""`ropemods apply`: what it writes is what the same call in Python gives."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import ropemods as rm
from ropemods.cli import main
from ropemods.mods import mod_from_json
from tests import zoo
from tests.cli.program import ENVIRONMENT, PROGRAM, REPOSITORY, logits, refused, run, save_tiny, save_tokenizer, shown

STORIES = REPOSITORY / ".." / "shared" / "data" / "models" / "stories260K"


@pytest.mark.parametrize(
    ("words", "mods"),
    [
        ("truncated_rope:keep=0.5", [rm.TruncatedRoPE(0.5)]),
        (
            "'truncated_rope:keep=0,layers=[-1]' learned_sink:init=-1.5",
            [rm.TruncatedRoPE(0.0, layers=(-1,)), rm.LearnedSink(-1.5)],
        ),
        (
            "'truncated_rope:keep=0.5,layers=[0,1],learned_sink:init=-1.5,output_gate'",
            [rm.TruncatedRoPE(0.5, layers=(0, 1)), rm.LearnedSink(-1.5), rm.OutputGate()],
        ),
        (
            "replaced_bos:by=noise adaptive_temperature:beyond=hold",
            [rm.ReplacedBos("noise"), rm.AdaptiveTemperature(beyond="hold")],
        ),
    ],
)
def test_what_apply_writes_reloads_to_the_logits_of_the_same_apply_in_python(
    here: Path, capsys: pytest.CaptureFixture[str], words: str, mods: list
) -> None:
    run(f"apply model out --mods {words} --strength 0.5")
    printed = capsys.readouterr().out
    expected = rm.apply(AutoModelForCausalLM.from_pretrained("model"), *mods, strength=0.5)
    assert rm.summary(expected) in printed
    assert 'model = ropemods.from_pretrained("out")' in printed
    assert torch.equal(logits(rm.from_pretrained("out")), logits(expected))
    assert not torch.equal(logits(expected), logits(AutoModelForCausalLM.from_pretrained("model")))
    assert json.loads((here / "out/tokenizer.json").read_text()) == json.loads(
        (here / "model/tokenizer.json").read_text()
    )


@pytest.mark.parametrize("architecture", zoo.ARCHITECTURES)
def test_every_architecture_goes_through_apply_show_and_reload(
    here: Path, capsys: pytest.CaptureFixture[str], architecture: str
) -> None:
    # None of these choose for themselves what transformers refuses, as SDPA with a soft cap.
    save_tiny(here / "other", architecture, backend="eager")
    run("apply other out --mods truncated_rope:keep=0.5 learned_sink:init=0")
    model = AutoModelForCausalLM.from_pretrained("other")
    expected = rm.apply(model, rm.TruncatedRoPE(0.5), rm.LearnedSink(0.0))
    assert torch.equal(logits(rm.from_pretrained("out")), logits(expected))
    found = shown("out", capsys)
    assert found["model"]["type"] == model.config.model_type
    assert found["model"]["parameters"] == sum(parameter.numel() for parameter in expected.parameters())
    assert all(rope["stopped"] == rope["dropped"] > 0 for rope in found["rope"])


def test_yaml_writes_modifications_either_way_and_the_flag_wins(here: Path) -> None:
    (here / "run.yaml").write_text(
        "model: model\noutput: out\nstrength: 1e-1\n"
        "mods:\n- truncated_rope:keep=0.5,which=highest\n- {kind: learned_sink, init: -1, layers: [0]}\n"
    )
    run("apply --config run.yaml --strength 0.75")
    recorded = json.loads((here / "out" / "config.json").read_text())["ropemods"]
    assert [mod_from_json(mod) for mod in recorded["mods"]] == [
        rm.TruncatedRoPE(0.5, which="highest"),
        rm.LearnedSink(-1.0, layers=(0,)),
    ]
    assert recorded["strength"] == {"truncated_rope": 0.75, "learned_sink": 0.75}
    run("apply model out --config run.yaml --overwrite")
    assert set(json.loads((here / "out" / "config.json").read_text())["ropemods"]["strength"].values()) == {0.1}


def test_dtype_is_what_is_saved(here: Path) -> None:
    run("apply model out --mods learned_sink --dtype bfloat16")
    assert rm.from_pretrained("out").dtype is torch.bfloat16


def test_calibration_text_sets_the_sink_from_the_mass_of_bos(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("apply model plain --mods learned_sink")
    assert "note: LearnedSink() starts at its default" in capsys.readouterr().out
    text = " ".join(f"w{3 + index * 7 % (zoo.VOCAB - 3)}" for index in range(8 * 40))
    (here / "text.txt").write_text(text)
    run("apply model out --mods learned_sink --calibration_text text.txt --calibration_length 16")
    assert "note:" not in capsys.readouterr().out
    ids = [3 + index * 7 % (zoo.VOCAB - 3) for index in range(8 * 40)]
    # Crops begin at eighths of the characters, inside a word at times; the tokens of the whole words are known.
    starts = [len(text) * row // 8 for row in range(8)]
    firsts = [text[:start].count(" ") for start in starts]
    model = rm.apply(
        AutoModelForCausalLM.from_pretrained("model"),
        rm.LearnedSink(),
        calibration=torch.tensor([[zoo.BOS, *(ids[first : first + 15])] for first in firsts]),
    )
    by_hand, saved = (
        m.model.layers[0].self_attn.ropemods.learned_sink.start for m in (model, rm.from_pretrained("out"))
    )
    assert (saved != 0).all()
    assert torch.allclose(saved, by_hand, atol=0.2)


def test_too_little_calibration_text_is_told_with_what_would_do(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "text.txt").write_text("w5 " * 80)
    line = "apply model out --mods learned_sink --calibration_text text.txt"
    length = re.search(r"--calibration_length (\d+) or less", refused(line, capsys))
    assert length is not None
    run(f"{line} --calibration_length {length[1]}")


def test_a_tokenizer_without_bos_is_pointed_out(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tokenizer(here / "model", bos=False)
    run("apply model out --mods replaced_bos")
    assert "note: the tokenizer puts no BOS (token 1) in front of text" in capsys.readouterr().out
    run("apply model other --mods truncated_rope")
    assert "note:" not in capsys.readouterr().out


def test_apply_starts_from_a_stock_and_complete_model(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("apply model out --mods truncated_rope:keep=0.5")
    assert "out is already modified (truncated_rope)" in refused("apply out again --mods learned_sink", capsys)
    weights = here / "model" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:500])
    assert "model: a weights file is damaged" in refused("apply model again --mods learned_sink", capsys)
    from safetensors.torch import load_file, save_file

    weights.write_bytes(whole)
    save_file({k: v for k, v in load_file(weights).items() if "q_proj" not in k}, weights, metadata={"format": "pt"})
    assert main(["apply", "model", "again", "--mods", "learned_sink"]) == 2
    assert "model lacks 2 parameters of LlamaForCausalLM, such as" in capsys.readouterr().err
    assert not (here / "again").exists()


@pytest.mark.slow
def test_the_program_modifies_a_trained_model(tmp_path: Path) -> None:
    if not STORIES.is_dir():
        pytest.skip(f"{STORIES} is not here")

    def program(*words: str) -> str:
        done = subprocess.run([*PROGRAM, *words], env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    program("apply", str(STORIES), "out", "--mods", "truncated_rope:keep=0.5")
    assert "first dropped band: wavelength 628 tokens, 5.12 rad at the context of 512" in program("show", "out")
    program("export", "out", "stock")
    ids = torch.arange(1, 60)[None]
    with torch.no_grad():
        modified = rm.from_pretrained(tmp_path / "out")(ids).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "stock")(ids).logits, modified)
        stock = AutoModelForCausalLM.from_pretrained(STORIES)
        assert torch.equal(rm.apply(stock, rm.TruncatedRoPE(0.5))(ids).logits, modified)
