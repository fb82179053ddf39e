"""A modified model as a GGUF: its weights and frequencies are in the file, or one sentence says what stands in the way.

That llama.cpp computes the same from it is shown by `python -m evals run llama_cpp`.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import ropemods as rm
from tests import zoo
from tests.cli.program import refused, run

pytest.importorskip("gguf", reason="the package gguf is not installed")

import gguf
import numpy as np

from tests import gguf_files

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
PACKED = "blk.0.ffn_up.weight"


def tensors(file: Path) -> dict[str, np.ndarray]:
    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}


def theta_frequencies(model: PreTrainedModel) -> torch.Tensor:
    """θ's own, by llama.cpp's rule: each is the one before it, times θ^(−2/d)."""
    step = model.config.rope_parameters["rope_theta"] ** (-2 / model.config.head_dim)
    return torch.tensor([step**band for band in range(model.config.head_dim // 2)])


def base_of(model: PreTrainedModel, folder: Path, **options) -> Path:
    """A GGUF as the converter makes it: with factors where the model scales its frequencies."""
    if model.config.rope_parameters["rope_type"] == "llama3":
        options["rope_freqs"] = (theta_frequencies(model) / model.model.rotary_emb.inv_freq).tolist()
    return gguf_files.write(folder / "base.gguf", model, **options)


def tuned(model: PreTrainedModel) -> PreTrainedModel:
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_tuned_weights_are_in_the_file(tmp_path: Path, architecture: str, tied: bool) -> None:
    model = zoo.build(architecture, tie_word_embeddings=tied)
    base = base_of(model, tmp_path)
    tuned(rm.apply(model, rm.TruncatedRoPE(0.5), rm.ReplacedBos(by="mean")))
    rm.export(model, tmp_path / "stock")
    rm.export(model, tmp_path / "out.gguf", gguf=base)
    # transformers turns the channels back into its own order, and leaves the factors out.
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="out.gguf")
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "stock").state_dict()
    assert {name: torch.equal(value, wanted[name]) for name, value in read.state_dict().items()} == dict.fromkeys(
        wanted, True
    )
    assert gguf.GGUFReader(tmp_path / "out.gguf").get_field("tokenizer.ggml.bos_token_id").contents() == zoo.BOS


@pytest.mark.parametrize("rope", [zoo.THETA, LLAMA3], ids=["default", "llama3"])
@pytest.mark.parametrize(("keep", "strength"), [(0.0, 1.0), (0.3, 1.0), (0.5, 1.0), (0.75, 1.0), (0.5, 0.4)])
def test_the_factors_turn_every_band_as_the_model_does(
    tmp_path: Path, rope: dict, keep: float, strength: float
) -> None:
    model = zoo.build(rope_parameters=rope)
    base = base_of(model, tmp_path)
    rm.apply(model, rm.TruncatedRoPE(keep), strength=strength)
    rm.export(model, tmp_path / "out.gguf", gguf=base)
    factors = torch.from_numpy(tensors(tmp_path / "out.gguf")["rope_freqs.weight"].copy())
    position = torch.arange(131072, dtype=torch.float32)[:, None]
    there = position * theta_frequencies(model) / factors
    here = position * model.model.rotary_emb.inv_freq
    assert factors.isfinite().all()
    assert torch.allclose(there[:64], here[:64], atol=1e-4)
    still = model.model.rotary_emb.inv_freq == 0
    assert still.sum() == (4 - int(keep * 8 // 2) if strength == 1 else 0)
    assert (there[:, still].cos() == 1).all() and (1 + there[:, still].sin() == 1).all()


def test_a_replaced_bos_alone_leaves_the_frequencies_of_the_base(tmp_path: Path) -> None:
    model = zoo.build(rope_parameters=LLAMA3)
    base = base_of(model, tmp_path)
    rm.export(rm.apply(model, rm.ReplacedBos(by="zero")), tmp_path / "out.gguf", gguf=base)
    before, after = tensors(base), tensors(tmp_path / "out.gguf")
    assert not after["token_embd.weight"][zoo.BOS].any()
    assert [name for name, data in after.items() if not np.array_equal(data, before[name])] == ["token_embd.weight"]


def packed_base(folder: Path, kind: gguf.GGMLQuantizationType) -> tuple[PreTrainedModel, Path]:
    """A base with one tensor of that type, and the model that it unpacks to."""
    model = zoo.build()
    if (
        kind is gguf.GGMLQuantizationType.IQ4_NL
    ):  # the package does not write it: a scale of 1, then 32 indices of 4 bits
        blocks = np.random.default_rng(0).integers(0, 256, (48, 18), dtype=np.uint8)
        blocks[:, :2] = np.frombuffer(np.float16(1).tobytes(), np.uint8)
    else:
        blocks = gguf.quantize(model.state_dict()["model.layers.0.mlp.up_proj.weight"].numpy(), kind)
    base = base_of(model, folder, packed={PACKED: (blocks, kind)})
    return rm.from_pretrained(folder, gguf_file=base.name, dtype=torch.float32), base


def test_what_was_not_changed_keeps_its_bytes_in_a_type_that_the_package_cannot_write(tmp_path: Path) -> None:
    model, base = packed_base(tmp_path, gguf.GGMLQuantizationType.IQ4_NL)
    rm.apply(model, rm.TruncatedRoPE(0.5))
    rm.export(model, tmp_path / "out.gguf", gguf=base)
    after = tensors(tmp_path / "out.gguf")
    assert all(np.array_equal(after[name], data) for name, data in tensors(base).items())
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3] += 1
    with pytest.raises(ValueError, match=rf"{PACKED} is IQ4_NL in {base}, its values were changed, .* Q8_0"):
        rm.export(model, tmp_path / "out.gguf", gguf=base)


def test_only_the_rows_that_were_changed_are_packed_anew(tmp_path: Path) -> None:
    model, base = packed_base(tmp_path, gguf.GGMLQuantizationType.Q4_1)
    rm.apply(model, rm.TruncatedRoPE(0.5))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3] += 0.25
    rm.export(model, tmp_path / "out.gguf", gguf=base)
    before, after = tensors(base)[PACKED], tensors(tmp_path / "out.gguf")[PACKED]
    assert [row for row in range(48) if not np.array_equal(before[row], after[row])] == [3]
    row = model.model.layers[0].mlp.up_proj.weight[3].detach()
    unpacked = torch.from_numpy(gguf.dequantize(after, gguf.GGMLQuantizationType.Q4_1)[3].copy())
    assert (unpacked - row).abs().max() <= 0.51 * (row.max() - row.min()) / 15  # half of a step


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({}, r"its token_embd.weight has nothing in common with the model's \(cosine"),
        ({"num_hidden_layers": 1}, r"it has no tensor for model.layers.1"),
        ({"num_hidden_layers": 3}, r"the model has nothing for its blk.2.\S+ \(9 such in all\)"),
        ({"vocab_size": 60}, r"its token_embd.weight is \(60, 32\), and the model's \(61, 32\)"),
        ({"rope_parameters": zoo.THETA | {"rope_theta": 50.0}}, "by θ 50, and the model 8 by θ 100"),
        (
            {"rope_parameters": LLAMA3},
            r"divides the frequencies by 4 factors from 1 to 8 .* model by 4 .* from 1 to 1;",
        ),
    ],
    ids=["weights", "fewer layers", "more layers", "vocabulary", "theta", "llama3"],
)
def test_a_base_that_is_not_the_models_is_told_by_what_differs(tmp_path: Path, changed: dict, says: str) -> None:
    other = zoo.build(**changed)
    if not changed:
        torch.manual_seed(1)
        for parameter in other.parameters():
            torch.nn.init.normal_(parameter)
    base = base_of(other, tmp_path)
    model = rm.apply(zoo.build(), rm.TruncatedRoPE(0.5))
    with pytest.raises(ValueError, match=f"{base} is no GGUF of this model.*{says}"):
        rm.export(model, tmp_path / "out.gguf", gguf=base)


def test_a_base_that_scales_its_frequencies_by_metadata_is_not_the_models(tmp_path: Path) -> None:
    base = base_of(zoo.build(), tmp_path, scaling={"type": "linear", "factor": 4.0})
    with pytest.raises(ValueError, match=r"llama.rope.scaling.factor is 4\), and the model 8 by"):
        rm.export(rm.apply(zoo.build(), rm.TruncatedRoPE(0.5)), tmp_path / "out.gguf", gguf=base)


def test_an_architecture_that_reads_no_factors_is_refused_and_takes_a_replaced_bos(tmp_path: Path) -> None:
    base = base_of(zoo.build(), tmp_path, architecture="qwen2")
    model = rm.apply(zoo.build(), rm.TruncatedRoPE(0.5), rm.ReplacedBos(by="zero"))
    with pytest.raises(ValueError, match=r"architecture 'qwen2', for which llama.cpp reads no rope_freqs.weight"):
        rm.export(model, tmp_path / "out.gguf", gguf=base)
    rm.set_strength(model, 0.0, kind="truncated_rope")
    rm.export(model, tmp_path / "out.gguf", gguf=base)
    assert not tensors(tmp_path / "out.gguf")["token_embd.weight"][zoo.BOS].any()


@pytest.mark.parametrize(
    ("mod", "rope", "says"),
    [
        (rm.AdaptiveTemperature(), zoo.THETA, "it acts on attention scores"),
        (rm.TruncatedRoPE(0.5, layers=(0,)), zoo.THETA, "it acts on some layers only"),
        (rm.ReplacedBos(by="random_token"), zoo.THETA, "it acts in training only"),
        (rm.TruncatedRoPE(0.5), zoo.THETA | {"rope_type": "linear", "factor": 2.0}, "and its own is linear"),
    ],
    ids=lambda value: getattr(value, "kind", None),
)
def test_what_a_gguf_cannot_hold_is_refused_by_name(tmp_path: Path, mod: rm.Mod, rope: dict, says: str) -> None:
    model = zoo.build(rope_parameters=rope)
    base = base_of(model, tmp_path)
    with pytest.raises(ValueError, match=f"{re.escape(str(mod))} cannot be written into a GGUF: .*{says}"):
        rm.export(rm.apply(model, mod), tmp_path / "out.gguf", gguf=base)


def test_the_command_writes_the_file_whole_or_not_at_all(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    rm.apply(zoo.build(), rm.TruncatedRoPE(0.5)).save_pretrained("out")
    base_of(zoo.build(), tmp_path)
    assert "is what is read; write to another file" in refused("export out base.gguf --gguf base.gguf", capsys)
    assert "leave one out" in refused("export out new.gguf --gguf base.gguf --rope longrope", capsys)
    run("export out written/out.gguf --gguf base.gguf")
    assert "with the tokenizer of base.gguf" in capsys.readouterr().out
    assert "rope_freqs.weight" in tensors(Path("written/out.gguf"))
    assert "exists; choose another file" in refused("export out written/out.gguf --gguf base.gguf", capsys)
    run("export out written/out.gguf --gguf base.gguf --overwrite")
    Path("text").write_text("mine")
    assert "of another format than" in refused("export out text --gguf base.gguf --overwrite", capsys)
    assert "none.gguf: there is no such GGUF file" in refused("export out new.gguf --gguf none.gguf", capsys)
    assert "is no GGUF file, or one that is damaged" in refused("export out new.gguf --gguf text", capsys)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["base.gguf", "out", "text", "written"]
    assert [entry.name for entry in (tmp_path / "written").iterdir()] == ["out.gguf"]
