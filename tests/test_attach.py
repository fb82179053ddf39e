"""What `apply` refuses, what it leaves behind, and how the pieces behave as a model is used."""

from __future__ import annotations

import copy
import io
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import ropemods as rm
from evals import tiny_models
from ropemods.model import attention_function
from tests import zoo
from tests.contract import close

ALL = [
    rm.TruncatedRoPE(0.5),
    rm.AdaptiveTemperature(trainable="shared"),
    rm.ReplacedBos("mean"),
    rm.LearnedSink(init=0.2, read_bos=True),
]


@pytest.mark.parametrize(
    ("mods", "options", "message"),
    [
        ([], {}, "nothing would change"),
        (["truncated_rope"], {}, "expected modifications such as"),
        ([rm.TruncatedRoPE(0.5), rm.TruncatedRoPE(0.2)], {}, "one of a kind"),
        ([rm.LearnedSink(), rm.LearnedSink(layers=[1])], {}, "learned_sink was given twice"),
        ([rm.LearnedSink(layers=[0, 1]), rm.LearnedSink(layers=[-1])], {}, "layers` that the others do not have"),
        ([rm.TruncatedRoPE(0.5, layers=[0]), rm.TruncatedRoPE(0.2, layers=[1])], {}, "one of a kind"),
        ([rm.AdaptiveTemperature(layers=[7])], {}, "layers \\[7\\] do not exist; this model has 2"),
        ([rm.LearnedSink()], {"strength": 1.5}, "from 0 .* to 1"),
        ([rm.LearnedSink()], {"strength": True}, "from 0 .* to 1"),
    ],
)
def test_what_would_do_nothing_or_cannot_be_is_an_error(mods, options, message) -> None:
    model, ids = zoo.build(), zoo.tokens()
    with pytest.raises((ValueError, TypeError), match=message):
        rm.apply(model, *mods, **options)
    assert torch.equal(model(ids).logits, zoo.build()(ids).logits)


def test_a_model_without_rope_is_refused() -> None:
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, bos_token_id=1, eos_token_id=2)
    with pytest.raises(ValueError, match="no rotary frequency table"):
        rm.apply(GPT2LMHeadModel(config), rm.AdaptiveTemperature())


def test_rotary_tables_of_parts_with_configs_of_their_own_are_named_in_the_refusal() -> None:
    """blt is four transformers, each with rope parameters of its own."""
    model = tiny_models.build("blt")
    with pytest.raises(ValueError, match=r"rotary tables.*BltLocalEncoderConfig.*one config's rope parameters"):
        rm.apply(model, rm.TruncatedRoPE(0.5))


def test_a_text_model_outside_the_automatic_table_reloads(tmp_path) -> None:
    """mllama's text model has a config that AutoModelForCausalLM does not know; its class is in the checkpoint."""
    model, ids = rm.apply(tiny_models.build("mllama"), rm.TruncatedRoPE(0.5)), tiny_models.tokens()
    model.save_pretrained(tmp_path)
    loaded = rm.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_model_that_is_no_transformers_model_is_refused() -> None:
    with pytest.raises(TypeError, match="expected a transformers model"):
        rm.apply(torch.nn.Linear(2, 2), rm.TruncatedRoPE(0.5))


def test_a_model_without_bos_is_refused_by_the_bos_modifications_only() -> None:
    model = zoo.build()
    model.config.bos_token_id = None
    for mod in (rm.ReplacedBos(), rm.UnrotatedBos(), rm.LearnedSink(), rm.AdaptiveTemperature(spare_bos=True)):
        with pytest.raises(ValueError, match=r"needs a BOS token.*model.config.bos_token_id"):
            rm.apply(model, mod)
    rm.apply(model, rm.LearnedSink(read_bos=True), rm.AdaptiveTemperature())


@pytest.mark.parametrize("token", ["<s>", -1, 10**6, True])
def test_a_bos_that_is_no_token_of_the_model_is_told_as_that(token: object) -> None:
    model = zoo.build()
    model.config.__dict__["bos_token_id"] = token
    with pytest.raises(
        ValueError, match=r"bos_token_id in the config is .* none of the model's \d+ tokens; it is the id"
    ):
        rm.apply(model, rm.ReplacedBos())


def test_applying_twice_is_an_error_and_removing_twice_too() -> None:
    model = rm.apply(zoo.build(), rm.TruncatedRoPE(0.5))
    with pytest.raises(ValueError, match=r"already modified; ropemods.remove"):
        rm.apply(model, rm.ReplacedBos())
    rm.remove(model)
    with pytest.raises(ValueError, match="no modifications"):
        rm.remove(model)


def test_an_attention_implementation_without_a_path_is_named() -> None:
    model = zoo.build("llama", "eager")
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match=r"run on eager and sdpa.*'flex_attention'.*attn_implementation='sdpa'"):
        rm.apply(model, rm.AdaptiveTemperature())
    rm.apply(model, rm.TruncatedRoPE(0.5))  # edits tables only, so any attention will do


def test_a_soft_cap_without_a_kernel_is_refused(monkeypatch) -> None:
    """Some versions of transformers run such a model on sdpa and leave the cap out; others refuse to."""
    stock = attention_function.stock

    def without_cap(backend, layer):
        return lambda *args, softcap=None, **kwargs: stock(backend, layer)(*args, **kwargs)

    monkeypatch.setattr(attention_function, "stock", without_cap)
    model = zoo.build("gemma2", "eager")
    model.config._attn_implementation_internal = "sdpa"
    with pytest.raises(ValueError, match=r"soft cap.*attn_implementation='eager'"):
        rm.apply(model, rm.AdaptiveTemperature())
    rm.apply(model, rm.TruncatedRoPE(0.5))


def test_transformers_itself_keeps_soft_caps_off_sdpa() -> None:
    with pytest.raises(ValueError, match="scaled_dot_product_attention"):
        zoo.build("gemma2", "sdpa")


@pytest.mark.parametrize("mod", [rm.ReplacedBos(), rm.UnrotatedBos(), rm.LearnedSink()])
def test_a_batch_without_bos_is_told_so(mod) -> None:
    model, ids = rm.apply(zoo.build(), mod), zoo.tokens()
    ids[1, 0] = 9
    with pytest.raises(ValueError, match=r"1 of 2 rows .* row 1 begins at column 0 with token 9"):
        model(ids)
    padded = torch.nn.functional.pad(zoo.tokens(), (2, 0), value=0)
    with pytest.raises(ValueError, match="pass the attention_mask"):
        model(padded)


def test_embeddings_without_ids_and_caches_without_history_are_refused() -> None:
    model, ids = rm.apply(zoo.build(), rm.LearnedSink()), zoo.tokens()
    with pytest.raises(ValueError, match="inputs_embeds and no input_ids"):
        model(inputs_embeds=model.model.embed_tokens(ids))
    past = zoo.build()(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="filled without ropemods"):
        model(ids[:, :1], past_key_values=past)
    with pytest.raises(ValueError, match="an attention_mask of 12 columns, 0 tokens and no cache"):
        model(ids[:, :0], attention_mask=torch.ones_like(ids))


def test_the_decoder_may_be_called_on_its_own() -> None:
    model, ids = rm.apply(zoo.build(), *ALL), zoo.tokens()
    hidden = model.model(ids).last_hidden_state
    close(model.lm_head(hidden), model(ids).logits, 1e-6)


def test_a_bos_token_inside_a_sequence_is_an_ordinary_token() -> None:
    model, ids = rm.apply(zoo.build(), rm.LearnedSink(init=0.3)), zoo.tokens()
    ids[0, 5] = zoo.BOS
    before = model(ids).logits[0, 6:]
    with torch.no_grad():
        model.model.embed_tokens.weight[zoo.BOS] += 1.0
    assert not torch.equal(model(ids).logits[0, 6:], before)  # it is read


def test_apply_prints_nothing() -> None:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        rm.apply(zoo.build(), *ALL)
    assert out.getvalue() == err.getvalue() == ""


def test_summary_says_what_is_where() -> None:
    model = rm.apply(zoo.build(), *ALL)
    rm.set_strength(model, 0.25, kind="replaced_bos")
    assert rm.summary(model).splitlines() == [
        "TruncatedRoPE(keep=0.5) · 2 layers · strength 1 · trainable params: 0",
        "AdaptiveTemperature(trainable='shared') · 2 layers · strength 1 · trainable params: 5",
        "ReplacedBos(by='mean') · 2 layers · strength 0.25 · trainable params: 0",
        "LearnedSink(init=0.2, read_bos=True) · 2 layers · strength 1 · trainable params: 8",
        "attention: sdpa, kernels: flash · loads in stock transformers: no (reload with "
        "ropemods.from_pretrained) · all params: "
        f"{sum(p.numel() for p in model.parameters()):,}",
    ]


def test_one_kind_may_stand_twice_on_layers_of_its_own(tmp_path) -> None:
    """Each layer has the form that was given for it, in memory, in the summary and after a reload."""
    ids, mods = (
        zoo.tokens(),
        (rm.LearnedSink(init=0.3, layers=[0]), rm.LearnedSink(init=2.0, read_bos=True, layers=[1])),
    )
    model = rm.apply(zoo.build(), *mods)
    starts = [(layer.self_attn.ropemods.learned_sink.sink_H(torch.float32)).tolist() for layer in model.model.layers]
    assert starts == [[pytest.approx(0.3)] * 4, [2.0] * 4]
    assert [line.split("·")[1].strip() for line in rm.summary(model).splitlines()[:2]] == [
        "layers 0 of 2",
        "layers 1 of 2",
    ]
    assert all(line.endswith("trainable params: 4") for line in rm.summary(model).splitlines()[:2])
    alone = [rm.apply(zoo.build(), mod)(ids).logits for mod in mods]
    logits = model(ids).logits
    assert not any(torch.equal(logits, other) for other in alone)
    rm.set_strength(model, 0.0)
    assert torch.equal(model(ids).logits, zoo.build()(ids).logits)
    rm.set_strength(model, 1.0)
    model.save_pretrained(tmp_path)
    assert torch.equal(rm.from_pretrained(tmp_path)(ids).logits, logits)


def test_strength_of_one_kind_and_of_an_unknown_kind() -> None:
    model, ids = rm.apply(zoo.build(), *ALL), zoo.tokens()
    for mod in ALL:
        rm.set_strength(model, 0.0, kind=mod.kind)
    assert torch.equal(model(ids).logits, zoo.build()(ids).logits)
    with pytest.raises(ValueError, match="no 'unrotated_bos'; it has truncated_rope, adaptive_temperature"):
        rm.set_strength(model, 0.5, kind="unrotated_bos")


def test_strength_survives_casting_the_model() -> None:
    model = rm.apply(zoo.build(), *ALL, strength=0.3).to(torch.bfloat16)
    for layer in model.model.layers:
        assert layer.self_attn.ropemods.learned_sink.strength.item() == torch.tensor(0.3).item()
        assert layer.self_attn.ropemods.adaptive_temperature.published.dtype == torch.float64


def test_a_copied_model_is_its_own() -> None:
    model, ids = rm.apply(zoo.build(), *ALL), zoo.tokens()
    wanted = model(ids).logits
    twin = copy.deepcopy(model)
    rm.set_strength(twin, 0.0)
    assert torch.equal(model(ids).logits, wanted)
    rm.remove(twin)
    assert torch.equal(twin(ids).logits, zoo.build()(ids).logits)
    assert torch.equal(model(ids).logits, wanted)


def test_checkpointed_layers_are_recomputed_with_their_own_batch() -> None:
    """Two forward passes before one backward, as preference losses do; BOS stands elsewhere in the second."""
    ids = zoo.tokens()
    padded = torch.nn.functional.pad(ids, (3, 0), value=0)
    mask = (torch.arange(padded.shape[1]) >= 3).long().expand_as(padded)

    def grads(checkpointing: bool) -> list[torch.Tensor]:
        model = rm.apply(zoo.build(), rm.UnrotatedBos()).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        first = model(padded, attention_mask=mask, use_cache=False).logits[:, 3:]
        second = model(ids, use_cache=False).logits
        (first.square().mean() + second.mean()).backward()
        return [p.grad for p in model.parameters()]

    for actual, wanted in zip(grads(True), grads(False), strict=True):
        close(actual, wanted, 1e-6)


def test_adapters_must_name_the_parameters_of_the_modifications(tmp_path) -> None:
    from peft import LoraConfig, get_peft_model

    plain = get_peft_model(zoo.build(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="apply them first"):
        rm.apply(plain, rm.LearnedSink())
    rm.apply(plain, rm.TruncatedRoPE(0.5))  # owns nothing, so the adapter need not know it


def test_a_stock_peft_load_of_a_modified_adapter_fails(tmp_path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    wrapped = get_peft_model(rm.apply(zoo.build(), rm.TruncatedRoPE(0.5)), LoraConfig(target_modules=["q_proj"]))
    wrapped.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"was trained with TruncatedRoPE\(keep=0.5\) at strength 1"):
        PeftModel.from_pretrained(zoo.build(), tmp_path)


def test_a_modified_checkpoint_loaded_by_stock_transformers_is_not_modified_again(tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    rm.apply(zoo.build(), rm.TruncatedRoPE(0.5)).save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"records modifications.*ropemods.from_pretrained"):
        rm.apply(stock, rm.TruncatedRoPE(0.75))


def test_loading_what_is_not_modified_says_so(tmp_path) -> None:
    zoo.build().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="records no modification"):
        rm.from_pretrained(tmp_path)


def test_a_stock_load_beside_ropemods_says_what_to_call(tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    rm.apply(zoo.build(), rm.AdaptiveTemperature()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"load it with ropemods.from_pretrained"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("lost", ["logit", "start"])
def test_a_checkpoint_that_lost_a_parameter_is_refused(lost: str, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    rm.apply(zoo.build(), rm.LearnedSink()).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    del state[f"model.layers.1.self_attn.ropemods.learned_sink.{lost}"]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"layers.1.self_attn.ropemods.learned_sink.{lost}"):
        rm.from_pretrained(tmp_path)


def test_a_record_of_another_version_is_refused(tmp_path) -> None:
    import json

    rm.apply(zoo.build(), rm.LearnedSink()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["ropemods"]["version"] = 99
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="version 99"):
        rm.from_pretrained(tmp_path)


def test_adapters_of_a_merged_model_are_plain_checkpoints(tmp_path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["ropemods"], init_lora_weights=False)
    wrapped, ids = get_peft_model(rm.apply(zoo.build(), *ALL), config), zoo.tokens()
    with pytest.raises(ValueError, match="merge the adapter first"):
        rm.export(wrapped, tmp_path / "stock")
    wanted = wrapped.eval()(ids).logits
    merged = wrapped.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    close(rm.from_pretrained(tmp_path / "merged")(ids).logits, wanted, 1e-5)
