from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import ropemods as rm
from ropemods.model import attention_function
from ropemods.mods import AdaptiveTemperature, LearnedSink, ReplacedBos, TruncatedRoPE, UnrotatedBos
from tests import zoo
from tests.contract import ModContract, close, perturb


class TestContract(ModContract):
    variants = {
        "closed": [LearnedSink(init=0.3)],
        "open": [LearnedSink(init=-0.2, read_bos=True)],
        "one-layer": [LearnedSink(init=0.3, layers=[0])],
        "everything": [
            TruncatedRoPE(0.5),
            AdaptiveTemperature(trainable="head", spare_bos=True),
            UnrotatedBos(),
            ReplacedBos("mean"),
            LearnedSink(init=0.1, read_bos=True),
        ],
        "closed-tempered": [LearnedSink(init=0.3), AdaptiveTemperature(), TruncatedRoPE(0.5)],
    }


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_later_tokens_do_not_read_a_closed_bos(backend: str) -> None:
    model = rm.apply(zoo.build("llama", backend), LearnedSink(init=0.3))
    ids = zoo.tokens()
    before = model(ids).logits[:, 1:]
    with torch.no_grad():
        model.model.embed_tokens.weight[zoo.BOS] += 1.0
    assert torch.equal(model(ids).logits[:, 1:], before)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_calibrated_sink_takes_the_mass_that_bos_had(backend: str) -> None:
    ids, stock = zoo.tokens(rows=16), zoo.build("llama", "eager")
    had = stock(ids, output_attentions=True).attentions[0][:, :, 1:, 0].mean((0, 2))
    model = rm.apply(zoo.build("llama", backend), LearnedSink(), calibration=ids)
    taken = []

    def look(site, rows, call, lse):
        if site.layer == 0:
            taken.append(torch.exp(rows.slots[0].logit[:, None] - lse)[:, :, 1:].mean((0, 2)))

    with attention_function.observed(look, of=model, want_lse=True), torch.no_grad():
        model(ids)
    close(taken[0], had, 1e-5)


def test_a_raised_start_stands_above_the_calibrated_one() -> None:
    ids = zoo.tokens(rows=16)
    logits = [
        torch.stack([b for n, b in rm.apply(zoo.build(), mod, calibration=ids).named_buffers() if n.endswith("start")])
        for mod in (LearnedSink(), LearnedSink(raised=1.5))
    ]
    close(logits[1], logits[0] + 1.5, 1e-6)
    assert logits[0].std() > 0
    with pytest.raises(ValueError, match="give the sum as init"):
        LearnedSink(init=1.0, raised=1.0)
    with pytest.raises(ValueError, match="raised must be a number"):
        LearnedSink(raised=True)


def test_weight_decay_pulls_to_the_calibrated_start() -> None:
    ids = zoo.tokens(rows=16)
    model = rm.apply(zoo.build(), LearnedSink(raised=1.5), calibration=ids)
    stages = [layer.self_attn.ropemods.learned_sink for layer in model.model.layers]
    started = [stage.sink_H(torch.float32).detach().clone() for stage in stages]
    own = [p for n, p in model.named_parameters() if "ropemods" in n]
    with torch.no_grad():
        for parameter in own:
            parameter.add_(1.0)
    optimizer = torch.optim.AdamW(own, lr=0.1, weight_decay=1.0)
    for _ in range(100):
        for parameter in own:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    for stage, start in zip(stages, started, strict=True):
        close(stage.sink_H(torch.float32), start, 1e-4)
        assert start.abs().min() > 1e-2


@pytest.mark.parametrize("adapter", [False, True])
def test_a_checkpoint_of_0_1_is_the_model_it_was(adapter: bool, tmp_path) -> None:
    """There the sink was one parameter, its start in it, and the record was of version 1."""
    import json

    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file

    zoo.build().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    rm.apply(model, LearnedSink(), calibration=zoo.tokens(rows=16))
    perturb(model)
    ids = zoo.tokens()
    if adapter:
        config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["ropemods"], init_lora_weights=False)
        model = get_peft_model(model, config)
    wanted = model(ids).logits
    model.save_pretrained(tmp_path / "saved")
    weights = tmp_path / "saved" / ("adapter_model.safetensors" if adapter else "model.safetensors")
    state = load_file(weights)
    starts = [name for name in state if name.endswith(".start")]
    assert len(starts) == 2
    for name in starts:
        state[name.removesuffix("start") + "logit"] += state.pop(name)
    save_file(state, weights, metadata={"format": "pt"})
    record = tmp_path / "saved" / ("ropemods.json" if adapter else "config.json")
    described = json.loads(record.read_text())
    (described if adapter else described["ropemods"])["version"] = 1
    record.write_text(json.dumps(described))
    assert torch.equal(rm.from_pretrained(tmp_path / "saved").eval()(ids).logits, wanted)


def test_the_order_of_the_modifications_does_not_matter() -> None:
    mods = [AdaptiveTemperature(), LearnedSink(init=0.3, read_bos=True), UnrotatedBos()]
    ids = zoo.tokens()
    one, other = (rm.apply(zoo.build("llama"), *order)(ids).logits for order in (mods, mods[::-1]))
    close(one, other, 1e-6)


@pytest.mark.parametrize("other", [UnrotatedBos(), ReplacedBos()])
def test_what_a_closed_column_cancels_is_refused(other) -> None:
    with pytest.raises(ValueError, match=r"LearnedSink closes .*read_bos=True"):
        rm.apply(zoo.build("llama"), LearnedSink(), other)
    with pytest.raises(ValueError, match="LearnedSink closes"):
        rm.apply(zoo.build("llama"), other, LearnedSink())


def test_attention_dropout_is_refused_where_the_kernels_cannot_do_it() -> None:
    """At `apply`, not at the first training step; a checkpoint still loads to be read from."""
    with pytest.raises(ValueError, match=r"attention dropout of 0.1.*attention_dropout = 0.*'eager'"):
        rm.apply(zoo.build("llama", "sdpa", attention_dropout=0.1), LearnedSink())
    rm.apply(zoo.build("llama", "sdpa", attention_dropout=0.1), AdaptiveTemperature())
    rm.apply(zoo.build("llama", "eager", attention_dropout=0.1), LearnedSink())


def test_a_model_trained_with_dropout_is_read_on_the_fused_path(tmp_path) -> None:
    model, ids = rm.apply(zoo.build("llama", "eager", attention_dropout=0.1), LearnedSink()), zoo.tokens()
    model.save_pretrained(tmp_path)
    close(rm.from_pretrained(tmp_path, attn_implementation="sdpa")(ids).logits, model(ids).logits, 2e-5)


def test_bad_options_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="a number or 'calibrated'"):
        LearnedSink(init="guess")
    with pytest.raises(ValueError, match="read_bos must be true or false"):
        LearnedSink(read_bos="no")
