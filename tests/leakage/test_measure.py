"""`measure`: every architecture, every modification, every rank; known answers on real weights; bad input."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch

import ropemods as rm
from tests import forked, zoo
from tests.leakage import measuring_rank
from tests.leakage.small import PROTOCOL, apart, documents, real, text, tokenizer
from tests.leakage.test_capture import MODS


def measured(model: torch.nn.Module, **options: object) -> rm.Report:
    return rm.measure(model, tokenizer(), documents(), PROTOCOL, progress=False, **options)


@pytest.mark.parametrize("architecture", zoo.ARCHITECTURES)
def test_every_architecture_gives_the_same_numbers_on_every_backend(architecture: str) -> None:
    backends = [backend for name, backend in zoo.pairs() if name == architecture]
    reports = [measured(zoo.build(architecture, backend)) for backend in backends]
    for report in reports:
        assert set(report.terms) == {"residual", "mask", "total"}
        assert report.usage is not None and len(report.usage.query[0][0]) == len(report.usage.wavelengths[0]) > 0
        assert report.model.attention in backends
    if len(reports) == 2:
        assert apart(*reports) < 1e-4


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("mods", [name for name in MODS if MODS[name]])
def test_every_modification_can_be_measured_and_is_left_in_place(mods: str, backend: str) -> None:
    model = rm.apply(zoo.build("llama", backend), *MODS[mods], strength=0.7)
    ids = zoo.tokens()
    before, record = model(ids).logits, copy.deepcopy(model.config.ropemods)
    report = measured(model)
    assert torch.equal(model(ids).logits, before) and model.config.ropemods == record
    assert [mod["kind"] for mod in report.model.mods] == [mod.kind for mod in MODS[mods]]
    assert set(report.model.strength.values()) == {0.7}
    assert report.terms["total"].all.value > 0
    rm.remove(model)


def test_a_modification_at_strength_zero_measures_as_the_stock_model() -> None:
    model = zoo.build("llama")
    stock = measured(model)
    modified = measured(rm.apply(model, *MODS["all"], strength=0.0))
    assert apart(stock, modified) == 0


def test_modifications_move_the_numbers_they_are_about() -> None:
    stock = measured(zoo.build("llama"))
    sink = measured(rm.apply(zoo.build("llama"), rm.LearnedSink(init=0.5)))
    assert stock.sink is not None and sink.sink is not None
    assert stock.sink.bos_mass_all.value > 0 and sink.sink.bos_mass_all.value == 0
    cut = measured(rm.apply(zoo.build("llama"), rm.TruncatedRoPE(0.5)))
    assert cut.usage is not None and [w == float("inf") for w in cut.usage.wavelengths[0]] == [False, False, True, True]


def test_the_batch_size_moves_no_number() -> None:
    model = zoo.build("qwen3")
    other = dataclasses.replace(PROTOCOL, batch_size=3)
    report = rm.measure(model, tokenizer(), documents(), other, progress=False)
    assert apart(measured(model), report) < 1e-5
    assert report.protocol_hash == PROTOCOL.hash()


def test_another_reports_protocol_and_a_generator_of_texts_will_do() -> None:
    model = zoo.build("llama")
    first = measured(model)
    again = rm.measure(model, tokenizer(), (text for text in documents()), first.protocol, progress=False)
    assert apart(first, again) == 0 and again.protocol_hash == first.protocol_hash


def test_a_report_survives_its_file(tmp_path: Path) -> None:
    report = measured(zoo.build("llama"))
    again = rm.Report.from_json(report.to_json(tmp_path / "report.json"))
    assert again.terms == report.terms and again.held_out_loss == report.held_out_loss
    assert rm.compare(again, report).headline.find("residual", "early").delta.value == 0
    assert "layers" in report.to_markdown() or report.to_markdown()


def test_a_peft_model_is_measured_with_its_adapter() -> None:
    from peft import LoraConfig, get_peft_model

    stock = measured(zoo.build("llama"))
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    wrapped = get_peft_model(zoo.build("llama"), config)
    tuned = measured(wrapped)
    with wrapped.disable_adapter():
        assert apart(stock, measured(wrapped)) == 0
    assert apart(stock, tuned) > 1e-2
    assert apart(tuned, measured(wrapped.merge_and_unload())) < 1e-4


def test_half_precision_is_measured_in_float32_and_the_drift_is_noted() -> None:
    model = zoo.build("llama", dtype=torch.bfloat16)
    exact = copy.deepcopy(model).float()
    report = measured(model)
    assert model.dtype == torch.bfloat16 and report.model.dtype == "bfloat16"
    assert apart(report, measured(exact)) == 0
    assert any("bfloat16" in note and "float32" in note for note in report.notes)
    as_it_is = rm.measure(model, tokenizer(), documents(), dataclasses.replace(PROTOCOL, dtype="model"), progress=False)
    assert apart(report, as_it_is) > 0 and not any("float32" in note for note in as_it_is.notes)


def test_another_attention_implementation_is_measured_on_sdpa_and_put_back() -> None:
    model = zoo.build("llama")
    expected = measured(model)
    model.set_attn_implementation("flex_attention")
    report = measured(model)
    assert model.config._attn_implementation == "flex_attention"
    assert report.model.attention == "sdpa" and any("flex_attention" in note for note in report.notes)
    assert apart(expected, report) == 0


def test_a_model_without_rotary_positions_says_what_is_not_defined() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=zoo.VOCAB, n_positions=64, bos_token_id=1)
    report = measured(GPT2LMHeadModel(config))
    assert any("no rotary" in note for note in report.notes)
    assert report.usage is not None and report.usage.wavelengths == ((), ())
    # Learned positions are in the queries and keys of the first layer already.
    assert report.terms["residual"].layers[0].all.low > 0


@pytest.mark.parametrize("layer", [0, 1])
def test_nan_in_one_head_names_its_layer_and_head_and_keeps_the_rest(layer: int) -> None:
    model = zoo.build("llama")
    whole = measured(model)
    with torch.no_grad():
        model.model.layers[layer].self_attn.q_proj.weight[8:16] = float("nan")  # head 1
    report = measured(model)
    assert any(f"layer {layer}, head 1:" in note for note in report.notes)
    assert not any(f"layer {layer}, head 0:" in note for note in report.notes)
    heads = report.terms["residual"].heads.all[layer]
    for head in (0, 2, 3):
        assert heads[head] == pytest.approx(whole.terms["residual"].heads.all[layer][head], rel=1e-5)


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ("lm_head.weight", r"lm_head \(Linear\), whose weight holds 32 such values of 1952"),
        ("model.norm.weight", r"model.norm \(LlamaRMSNorm\), whose weight holds 1 such values"),
        ("model.embed_tokens.weight", r"model.embed_tokens \(Embedding\), whose weight holds 32"),
        ("model.layers.0.mlp.up_proj.weight", r"model.layers.0.mlp.up_proj \(Linear\), whose weight"),
        ("model.layers.1.self_attn.o_proj.weight", r"model.layers.1.self_attn.o_proj \(Linear\), whose weight"),
    ],
)
def test_nan_in_the_logits_is_an_error_that_says_where_it_first_appears(broken: str, says: str) -> None:
    model = zoo.build("llama")
    with torch.no_grad():
        model.get_parameter(broken)[5] = float("nan")
    with pytest.raises(ValueError, match=says):
        measured(model)
    assert not any(module._forward_hooks for module in model.modules())


def test_nan_of_some_heads_is_not_laid_at_the_masks_door() -> None:
    model = zoo.build("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[8:16] = float("nan")
    notes = measured(model).notes
    assert not any("which keys a query sees" in note for note in notes)
    assert any("first appears in model.layers.0.self_attn.q_proj" in note for note in notes)


def test_an_interrupted_measurement_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("llama", dtype=torch.bfloat16)
    ids = zoo.tokens()
    before = model(ids).logits
    calls = []

    def interrupt(*args: object) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("ropemods.leakage.capture.losses", interrupt)
    monkeypatch.setattr("ropemods.leakage.sums.Sums.add_loss", lambda *args: None)
    with pytest.raises(KeyboardInterrupt):
        measured(model)
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "sdpa"
    assert torch.equal(model(ids).logits, before)


def test_bad_input_is_an_error_that_says_what_to_do() -> None:
    model = zoo.build("llama")
    with pytest.raises(ValueError, match="no BOS token"):
        rm.measure(model, tokenizer(bos=False), documents(), PROTOCOL, progress=False)
    assert rm.measure(model, tokenizer(bos=False), documents(), PROTOCOL, bos_token_id=1, progress=False).terms
    with pytest.raises(ValueError, match="too little text"):
        rm.measure(model, tokenizer(), documents(20), PROTOCOL, progress=False)
    with pytest.raises(ValueError, match="no intervention 'zeros'"):
        measured(model, interventions=("zeros",))
    with pytest.raises(ValueError, match="vocabulary of 40"):
        measured(zoo.build("llama", vocab_size=40))
    with pytest.raises(TypeError, match=r"write \['zero'\]"):
        measured(model, interventions="zero")
    with pytest.raises(TypeError, match="a tokenizer is needed to read text, found NoneType"):
        rm.measure(model, None, documents(), PROTOCOL, progress=False)
    with pytest.raises(TypeError, match="protocol is a Protocol or a mapping of its fields, found 48"):
        rm.measure(model, tokenizer(), documents(), 48, progress=False)
    with pytest.raises(ValueError, match="a protocol has no sequence;"):
        rm.measure(model, tokenizer(), documents(), {"sequence": 48}, progress=False)
    with pytest.raises(TypeError, match="transformers model"):
        measured(torch.nn.Linear(2, 2))


def test_layer_0_of_prose3M_has_no_residual_and_layers_3_to_5_have() -> None:
    model, own_tokenizer = real("prose3M")
    protocol = rm.Protocol(sequences=256, length=128, batch_size=32, mask_term=False)
    report = rm.measure(model, own_tokenizer, text("books.valid.jsonl.xz"), protocol, progress=False)
    layers = report.terms["residual"].layers
    assert layers[0].early.low < 0 < layers[0].early.high and layers[0].all.low < 0 < layers[0].all.high
    assert all(layer.early.low > 0 for layer in layers[3:])
    assert 0.01 < layers[3].early.value < 0.06  # 0.029 with the first prototype


def test_layer_0_of_stories260K_has_no_residual_and_later_layers_have() -> None:
    model, own_tokenizer = real("stories260K")
    protocol = rm.Protocol(sequences=256, length=128, batch_size=32, mask_term=False)
    report = rm.measure(model, own_tokenizer, text("tinystories.txt"), protocol, progress=False)
    layers = report.terms["residual"].layers
    assert layers[0].early.low < 0 < layers[0].early.high
    assert all(layer.early.low > 0 for layer in layers[2:])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "zero3"])
def test_two_ranks_give_the_report_of_one(tmp_path: Path, kind: str) -> None:
    """Real processes over gloo; with ZeRO-3 each holds half of every parameter."""
    if kind == "zero3":
        pytest.importorskip("deepspeed")
    forked.run(measuring_rank.main, kind, str(tmp_path), ranks=2)
    # An odd number of sequences in a fold, so that a rank must fill up.
    alone = rm.measure(
        zoo.build("llama"), tokenizer(), documents(), PROTOCOL, interventions=("zero", "clamp"), progress=False
    )
    reports = [rm.Report.from_json(tmp_path / f"{rank}.json") for rank in range(2)]
    for report in reports:
        assert apart(alone, report) < 1e-5
        for mine, theirs in zip(alone.interventions, report.interventions, strict=True):
            assert mine.early_residual.value == pytest.approx(theirs.early_residual.value, rel=1e-4, abs=1e-7)
    assert (
        json.loads((tmp_path / "0.json").read_text())["terms"] == json.loads((tmp_path / "1.json").read_text())["terms"]
    )
