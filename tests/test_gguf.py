"""A GGUF file is a way in: from Python, on the command line and in recipes, and what comes out is safetensors."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ropemods as rm
from ropemods.cli import main
from ropemods.training.__main__ import main as finetune
from ropemods.training.arms import read_result
from tests import zoo
from tests.cli.program import logits, refused, run

pytest.importorskip("gguf", reason="the package gguf is not installed")

from tests import gguf_files
from tests.recipes import tiny

FILE = "tiny.gguf"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with nothing in it but a GGUF file of `zoo`'s Llama."""
    (tmp_path / "model").mkdir()
    gguf_files.write(tmp_path / "model" / FILE, zoo.build())
    return tmp_path / "model"


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a tokenizer in the file, and a text beside it."""
    here = tmp_path_factory.mktemp("gguf")
    tiny.write_model(here / "plain")
    tiny.write_text(here)
    plain = here / "plain"
    (here / "model").mkdir()
    gguf_files.write(
        here / "model" / FILE, AutoModelForCausalLM.from_pretrained(plain), AutoTokenizer.from_pretrained(plain)
    )
    return here


def test_from_pretrained_gives_the_model_that_was_written_and_it_saves_as_safetensors(folder: Path) -> None:
    model = rm.from_pretrained(folder, gguf_file=FILE)
    assert torch.equal(logits(model), logits(zoo.build()))
    model.save_pretrained(folder.parent / "out")
    assert (folder.parent / "out" / "model.safetensors").is_file()
    assert "quantization_config" not in json.loads((folder.parent / "out" / "config.json").read_text())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder.parent / "out")), logits(model))


def test_what_transformers_itself_loaded_is_modified_saved_and_reloaded_and_one_sentence_says_so(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(folder.parent / "refused")
    with pytest.warns(UserWarning, match=f"{FILE} was unpacked when it was loaded") as said:
        rm.apply(model, rm.TruncatedRoPE(0.5), rm.LearnedSink(init=-1.0))
    assert len([each for each in said if "unpacked" in str(each.message)]) == 1
    model.save_pretrained(folder.parent / "out")
    assert torch.equal(logits(rm.from_pretrained(folder.parent / "out")), logits(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rm.apply(rm.remove(model), rm.TruncatedRoPE(0.5))


def test_a_file_that_came_through_ropemods_has_nothing_left_to_say(folder: Path) -> None:
    model = rm.from_pretrained(folder, gguf_file=FILE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rm.apply(model, rm.TruncatedRoPE(0.5))


def test_an_adapter_reloads_onto_the_file_that_it_was_trained_on(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = rm.apply(rm.from_pretrained(folder, gguf_file=FILE), rm.TruncatedRoPE(0.5))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder.parent / "adapter")
    back = rm.from_pretrained(folder.parent / "adapter", gguf_file=FILE)
    assert torch.equal(logits(back), logits(adapted))


@pytest.mark.parametrize(
    "scaled",
    [
        {"scaling": {"type": "linear", "factor": 4.0}},
        {"scaling": {"type": "yarn", "factor": 2.0}},
        {"rope_freqs": [1.0, 1.0, 8.0, 32.0]},
    ],
    ids=["linear", "yarn", "llama3"],
)
def test_scaled_frequencies_that_transformers_would_drop_are_an_error(folder: Path, scaled: dict) -> None:
    file = gguf_files.write(folder / "scaled.gguf", zoo.build(), **scaled)
    with pytest.raises(ValueError, match=f"{file} scales its rotary frequencies .*load the model from its safetensors"):
        rm.from_pretrained(folder, gguf_file="scaled.gguf")


@pytest.mark.parametrize("scaled", [{"scaling": {"type": "none", "factor": 1.0}}, {"rope_freqs": [1.0] * 4}])
def test_scaling_by_one_is_no_scaling(folder: Path, scaled: dict) -> None:
    gguf_files.write(folder / "same.gguf", zoo.build(), **scaled)
    assert torch.equal(logits(rm.from_pretrained(folder, gguf_file="same.gguf")), logits(zoo.build()))


def test_an_architecture_that_transformers_does_not_read_is_named_with_its_file(folder: Path) -> None:
    file = gguf_files.write(folder / "other.gguf", zoo.build(), architecture="chameleon")
    with pytest.raises(ValueError, match=f"{file}: transformers .* could not read this GGUF, .*'chameleon'"):
        rm.from_pretrained(folder, gguf_file="other.gguf")


def test_a_parameter_that_is_not_in_the_file_is_an_error(folder: Path) -> None:
    gguf_files.write(folder / "less.gguf", zoo.build(), leave_out="model.norm.weight")
    with pytest.raises(ValueError, match=r"less.gguf lacks 1 parameters of LlamaForCausalLM, such as model.norm"):
        rm.from_pretrained(folder, gguf_file="less.gguf")


@pytest.mark.parametrize("kept", [0, 3, 100, 2000, -64])
def test_a_file_that_is_cut_short_is_an_error_that_names_it(folder: Path, kept: int) -> None:
    whole = (folder / FILE).read_bytes()
    (folder / "cut.gguf").write_bytes(whole[:kept])
    with pytest.raises(ValueError, match=f"{folder / 'cut.gguf'}"):
        rm.from_pretrained(folder, gguf_file="cut.gguf")


def test_a_name_that_is_not_there_is_answered_with_those_that_are(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"has no file other.gguf; its GGUF files are {FILE}"):
        rm.from_pretrained(folder, gguf_file="other.gguf")


def test_a_missing_gguf_package_is_answered_with_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ropemods.model.gguf.is_gguf_available", lambda: False)
    with pytest.raises(ImportError, match=r"pip install 'ropemods\[gguf\]'"):
        rm.from_pretrained(folder, gguf_file=FILE)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("apply model out --mods truncated_rope", f"model holds GGUF files ({FILE}); name one of them as gguf_file"),
        (f"apply model/{FILE} out --mods truncated_rope", f"give the folder of the checkpoint and --gguf_file {FILE}"),
        ("apply model out --mods truncated_rope --gguf_file x.gguf", f"its GGUF files are {FILE}"),
        (f"apply model out --mods 'truncated_rope:layers=[9]' --gguf_file {FILE}", "layers [9] do not exist"),
    ],
)
def test_the_command_line_says_how_a_gguf_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, says: str
) -> None:
    monkeypatch.chdir(folder.parent)
    assert says in refused(line, capsys)


def test_apply_measure_and_suggest_read_a_gguf_with_the_tokenizer_in_it(
    with_tokenizer: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(with_tokenizer)
    run(f"apply model {tmp_path}/out --gguf_file {FILE} --mods truncated_rope:keep=0.5")
    assert f"{FILE} were unpacked to float32, and are written as safetensors" in capsys.readouterr().out
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    expected = rm.apply(AutoModelForCausalLM.from_pretrained("plain"), rm.TruncatedRoPE(0.5))
    written = rm.from_pretrained(tmp_path / "out")
    assert written.ropemods_attached.mods == expected.ropemods_attached.mods
    state = written.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())
    ids = torch.arange(40)[None]
    with torch.no_grad():  # the same numbers elsewhere in memory: some processors' kernels then round differently
        torch.testing.assert_close(written(ids).logits, expected.eval()(ids).logits, rtol=1e-5, atol=1e-5)
    sizes = "--text text.jsonl --sequences 8"
    for model, output in ((f"model --gguf_file {FILE}", "from_gguf"), ("plain", "plain")):
        run(f"measure {model} {sizes} --length 32 --groups 8 --early 8 16 --grid_rows 8 --output {tmp_path}/{output}")
    found, known = (rm.Report.from_json(tmp_path / name) for name in ("from_gguf", "plain"))
    assert found.held_out_loss.value == pytest.approx(known.held_out_loss.value, rel=1e-5)
    capsys.readouterr()
    run(f"suggest model --gguf_file {FILE} {sizes} --crop 64 --length 64")
    assert "keep" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": "all-linear"}], ids=["all parameters", "lora"])
def test_a_recipe_trains_what_a_gguf_holds(with_tokenizer: Path, tmp_path: Path, lora: dict | None) -> None:
    values = {"gguf_file": FILE, "max_steps": 4, "schedule": {"steps": 2}, "arms": ["modified"]}
    recipe = tiny.write_recipe(
        tmp_path / "recipe.yaml",
        with_tokenizer / "model",
        with_tokenizer / "text.jsonl",
        tmp_path / "out",
        **values,
        **({} if lora is None else {"lora": lora}),
    )
    finetune(["--config", str(recipe)])
    result = read_result(tmp_path / "out" / "modified-0" / "result.json")
    assert result.reload_difference is not None
    model = tmp_path / "out" / "modified-0" / "model"
    assert {file.suffix for file in model.iterdir()} >= {".safetensors"} and not list(model.rglob("*.gguf"))
    assert ("gguf_file=" in (model / "README.md").read_text()) == (lora is not None)


def test_train_hands_the_file_to_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "recipe.yaml", "--gguf_file", FILE, "--print_only"]) == 0
    assert f"--config recipe.yaml --gguf_file {FILE}" in capsys.readouterr().out
