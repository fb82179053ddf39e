"""Adapters beside modifications, PEFT's and transformers' own: saved whole or refused, on the embedding too."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from peft.utils import hotswap
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

import ropemods as rm
from ropemods.model import adapter_card
from tests import zoo
from tests.contract import close


@pytest.fixture
def base(tmp_path) -> str:
    zoo.build().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def loaded(base: str, *mods: rm.Mod, **options) -> PreTrainedModel:
    return rm.apply(AutoModelForCausalLM.from_pretrained(base).eval(), *mods, **options)


def lora(*, keep: bool = True, **options) -> LoraConfig:
    options = {"target_modules": ["q_proj"], "init_lora_weights": False} | options
    return LoraConfig(r=2, modules_to_save=["ropemods"] if keep else None, **options)


def test_an_adapter_of_transformers_own_is_saved_with_the_record(base, tmp_path) -> None:
    model, ids = loaded(base, rm.LearnedSink(), calibration=zoo.tokens()), zoo.tokens()
    model.add_adapter(lora())
    wanted = model.eval()(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    close(rm.from_pretrained(tmp_path / "adapter").eval()(ids).logits, wanted, 1e-6)
    for stock in (AutoModelForCausalLM.from_pretrained, lambda p: PeftModel.from_pretrained(zoo.build(), p)):
        with pytest.raises(
            ValueError, match=r"was trained with LearnedSink\(\) at strength 1.*ropemods.from_pretrained"
        ):
            stock(tmp_path / "adapter")


def native(model: PreTrainedModel, config: LoraConfig) -> PreTrainedModel:
    model.add_adapter(config)
    return model


def second(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    wrapped = get_peft_model(model, lora(), "first")
    wrapped.add_adapter("default", config)
    wrapped.set_adapter("default")
    return wrapped


@pytest.mark.parametrize("made", [get_peft_model, native, second], ids=lambda made: made.__name__)
def test_an_adapter_that_was_not_told_of_the_parameters_keeps_them_and_says_so(made, base, tmp_path) -> None:
    ids = zoo.tokens()
    with pytest.warns(UserWarning, match="'ropemods' was added to modules_to_save of the adapter 'default'"):
        model = made(loaded(base, rm.LearnedSink(), calibration=ids), lora(keep=False))
    trained = [part for name, part in model.named_parameters() if "ropemods.modules_to_save.default" in name]
    assert trained and all(part.requires_grad for part in trained)
    with torch.no_grad():
        for part in trained:
            part.add_(1.0)
    wanted = model.eval()(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    close(rm.from_pretrained(tmp_path / "adapter").eval()(ids).logits, wanted, 1e-6)


def test_an_adapter_that_cannot_keep_the_parameters_is_refused_when_it_is_made(base) -> None:
    model = loaded(base, rm.LearnedSink(init=0.3))
    with pytest.raises(ValueError, match="a TrainableTokensConfig has no modules_to_save"):
        get_peft_model(model, TrainableTokensConfig(token_indices=[5]))


def test_an_adapter_of_the_unmodified_base_is_not_saved_as_one_of_the_modified(base, tmp_path) -> None:
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora(keep=False)).save_pretrained(tmp_path / "stock")
    model = PeftModel.from_pretrained(loaded(base, rm.LearnedSink(init=0.3)), tmp_path / "stock")
    with pytest.raises(ValueError, match=r"'default' neither trained nor saves.*modules_to_save=\['ropemods'\]"):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    with pytest.raises(ValueError, match=r"trained on a model without modifications.*merge_and_unload"):
        PeftModel.from_pretrained(loaded(base, rm.LearnedSink(init=0.3)), tmp_path / "stock", is_trainable=True)


def test_a_reloaded_model_without_its_adapter_is_the_modified_start(base, tmp_path) -> None:
    """Which is what trainers take for their reference, and what a new adapter begins with."""
    ids = zoo.tokens()
    model = loaded(base, rm.LearnedSink(), calibration=ids)
    start = model(ids).logits
    wrapped = get_peft_model(model, lora())
    with torch.no_grad():
        for name, part in wrapped.named_parameters():
            if "modules_to_save" in name:
                part.add_(1.0)
    wrapped.save_pretrained(tmp_path / "adapter")
    again = rm.from_pretrained(tmp_path / "adapter").eval()
    with again.disable_adapter():
        close(again(ids).logits, start, 1e-6)
    again.add_adapter("new", LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["ropemods"]))
    again.set_adapter("new")
    close(again.eval()(ids).logits, start, 1e-6)


@pytest.mark.parametrize("task", ["SEQ_CLS", None])
def test_an_adapter_of_a_classifier_is_loaded_on_a_classifier(task, base, tmp_path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["score", "ropemods"], task_type=task)
    wrapped, ids = get_peft_model(rm.apply(model, rm.LearnedSink(init=0.3)), config).eval(), zoo.tokens()
    wrapped.save_pretrained(tmp_path / "adapter")
    close(rm.from_pretrained(tmp_path / "adapter", num_labels=1).eval()(ids).logits, wrapped(ids).logits, 1e-6)


def test_adapters_of_other_modules_are_made_and_saved_as_ever(tmp_path) -> None:
    rm.apply(zoo.build(), rm.TruncatedRoPE(0.5))
    plain = torch.nn.Sequential(torch.nn.Linear(4, 4))
    get_peft_model(plain, LoraConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").is_file()


def test_a_dora_adapter_is_saved_and_reloaded(base, tmp_path) -> None:
    model, ids = loaded(base, rm.LearnedSink(init=0.3)), zoo.tokens()
    wrapped = get_peft_model(model, lora(use_dora=True)).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    close(rm.from_pretrained(tmp_path / "adapter").eval()(ids).logits, wrapped(ids).logits, 1e-6)


def test_a_second_modified_adapter_is_loaded_beside_the_first(base, tmp_path) -> None:
    ids, wanted = zoo.tokens(), {}
    for name, seed in (("first", 1), ("second", 2)):
        torch.manual_seed(seed)
        wrapped = get_peft_model(loaded(base, rm.LearnedSink(init=0.0)), lora()).eval()
        with torch.no_grad():
            for part in (p for n, p in wrapped.named_parameters() if "modules_to_save" in n):
                part.fill_(seed)
        wanted[name] = wrapped(ids).logits
        wrapped.save_pretrained(tmp_path / name)
    model = rm.from_pretrained(tmp_path / "first").eval()
    model.load_adapter(tmp_path / "second", "second")
    for name, adapter in (("first", "default"), ("second", "second")):
        model.set_adapter(adapter)
        close(model(ids).logits, wanted[name], 1e-6)


def test_an_adapter_of_other_modifications_is_not_loaded_beside(base, tmp_path) -> None:
    wrapped = get_peft_model(loaded(base, rm.TruncatedRoPE(0.5)), lora(keep=False))
    wrapped.save_pretrained(tmp_path / "truncated")
    stock = get_peft_model(zoo.build(), lora(keep=False))
    with pytest.raises(ValueError, match=r"TruncatedRoPE\(keep=0.5\) at strength 1, and this model has no modif"):
        stock.load_adapter(tmp_path / "truncated", "other")
    weaker = get_peft_model(loaded(base, rm.TruncatedRoPE(0.5), strength=0.5), lora(keep=False))
    with pytest.raises(ValueError, match=r"at strength 1, and this model has .* at strength 0.5"):
        weaker.load_adapter(tmp_path / "truncated", "other")
    assert list(weaker.peft_config) == ["default"]


EMBEDDING = {
    "lora": {"target_modules": ["embed_tokens", "q_proj"]},
    "tokens": {"trainable_token_indices": {"embed_tokens": [zoo.BOS, 7]}},
    "saved": {"modules_to_save": ["embed_tokens"]},
}


def adapted(model: PreTrainedModel, name: str) -> PeftModel:
    """With an adapter that has moved the embedding, at BOS too."""
    torch.manual_seed(0)
    wrapped = get_peft_model(model, LoraConfig(**({"target_modules": ["q_proj"], "r": 2} | EMBEDDING[name])))
    with torch.no_grad():
        for part in (p for n, p in wrapped.named_parameters() if p.requires_grad and "embed_tokens" in n):
            part.add_(0.3 * torch.randn(part.shape, generator=torch.Generator().manual_seed(0)))
    return wrapped.eval()


@pytest.mark.parametrize("name", EMBEDDING)
@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("by", ["zero", "mean"])
def test_an_adapter_on_the_embedding_leaves_the_promised_vector_at_bos(by, strength, name) -> None:
    ids, stock = zoo.tokens(), adapted(zoo.build(), name)
    model = rm.apply(zoo.build(), rm.ReplacedBos(by), strength=strength)
    promised = 0 if by == "zero" else zoo.build().get_input_embeddings().weight.mean(0)
    wrapped = adapted(model, name)
    before = wrapped(ids).logits
    embedding = wrapped.get_input_embeddings()(ids)
    stock_embedding = stock.get_input_embeddings()(ids)
    close(embedding[:, 0], (1 - strength) * stock_embedding[:, 0] + strength * promised, 1e-6)
    assert torch.equal(embedding[:, 1:], stock_embedding[:, 1:])
    with wrapped.disable_adapter():
        close(wrapped(ids).logits, rm.apply(zoo.build(), rm.ReplacedBos(by), strength=strength)(ids).logits, 1e-6)
    merged = wrapped.merge_and_unload()
    close(merged(ids).logits, before, 1e-5)
    close(copy.deepcopy(merged)(ids).logits, before, 1e-5)
    assert torch.equal(rm.remove(merged)(ids).logits, stock.merge_and_unload()(ids).logits)


def test_an_adapter_on_the_embedding_is_saved_and_reloaded(base, tmp_path) -> None:
    wrapped, ids = adapted(loaded(base, rm.ReplacedBos("zero")), "lora"), zoo.tokens()
    wanted = wrapped(ids).logits
    wrapped.save_pretrained(tmp_path / "adapter")
    close(rm.from_pretrained(tmp_path / "adapter").eval()(ids).logits, wanted, 1e-6)


def test_a_random_token_is_drawn_as_the_adapter_embeds_it() -> None:
    wrapped, ids = adapted(rm.apply(zoo.build(), rm.ReplacedBos("random_token")), "lora").train(), zoo.tokens()
    wrapped(ids)
    table = adapted(zoo.build(), "lora").get_input_embeddings()(torch.arange(zoo.VOCAB))
    drawn = wrapped.get_input_embeddings()(ids)[:, 0]
    assert all(torch.isclose(row, table, atol=1e-6).all(1).any() for row in drawn)


@pytest.mark.parametrize("mod", [rm.KeyedSink(trains="none"), rm.AnchoredBos()], ids=str)
def test_what_was_copied_or_calibrated_is_saved_though_nothing_of_it_trains(mod: rm.Mod, base, tmp_path) -> None:
    """Put on the base again it would have an offset that nobody chose, and say nothing."""
    model, ids = loaded(base, mod, calibration=zoo.tokens()), zoo.tokens()
    with pytest.warns(UserWarning, match="'ropemods' was added"):
        get_peft_model(model, lora(keep=False))
    with pytest.raises(ValueError, match="values of their own"):
        rm.apply(get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora(keep=False)), mod)
    wrapped = get_peft_model(loaded(base, mod, calibration=zoo.tokens()), lora()).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    close(rm.from_pretrained(tmp_path / "adapter").eval()(ids).logits, wrapped(ids).logits, 1e-6)


@pytest.mark.parametrize("mod", [rm.TruncatedRoPE(0.5), rm.LearnedSink(init=0.3)], ids=str)
def test_an_adapter_is_swapped_for_another_while_the_model_runs(mod: rm.Mod, base, tmp_path) -> None:
    ids, wanted = zoo.tokens(), {}
    for name, seed in (("first", 1), ("second", 2)):
        torch.manual_seed(seed)
        wrapped = get_peft_model(loaded(base, mod), lora()).eval()
        for parameter in (p for n, p in wrapped.named_parameters() if "learned_sink" in n and p.requires_grad):
            parameter.data.normal_()
        wrapped.save_pretrained(tmp_path / name)
        wanted[name] = wrapped(ids).logits
    model = rm.from_pretrained(tmp_path / "first").eval()
    hotswap.hotswap_adapter(model, str(tmp_path / "second"), "default", torch_device="cpu")
    close(model(ids).logits, wanted["second"], 1e-6)
    hotswap.hotswap_adapter(model, str(tmp_path / "first"), "default", torch_device="cpu")
    close(model(ids).logits, wanted["first"], 1e-6)
    stock = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora())
    with pytest.raises(ValueError, match=r"trained with .* at strength 1, and this model has no modification"):
        hotswap.hotswap_adapter(stock, str(tmp_path / "second"), "default", torch_device="cpu")
    close(model(ids).logits, wanted["first"], 1e-6)


def test_an_adapter_of_the_unmodified_base_is_not_swapped_in_beside_what_another_one_learned(base, tmp_path) -> None:
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora()).save_pretrained(tmp_path / "stock")
    model = get_peft_model(loaded(base, rm.LearnedSink(init=0.3)), lora())
    with pytest.raises(ValueError, match=r"trained with no modification, and this model has LearnedSink"):
        hotswap.hotswap_adapter(model, str(tmp_path / "stock"), "default", torch_device="cpu")


def test_adapters_are_weighed_against_each_other_where_the_modifications_have_no_values_of_their_own(base) -> None:
    wrapped = get_peft_model(loaded(base, rm.TruncatedRoPE(0.5)), lora()).eval()
    before = wrapped(zoo.tokens()).logits
    wrapped.add_adapter("second", lora())
    wrapped.add_weighted_adapter(["default", "second"], [1.0, 0.0], "mixed", combination_type="cat")
    wrapped.set_adapter("mixed")
    close(wrapped(zoo.tokens()).logits, before, 1e-5)


def snippet(folder: Path) -> PreTrainedModel:
    """The model that the Python in a folder's card gives, run as it stands there."""
    made: dict = {}
    (lines,) = [part.split("```")[0] for part in (folder / "README.md").read_text().split("```python\n")[1:]]
    exec(lines, made)
    return made["model"].eval()


@pytest.mark.parametrize("native", [False, True], ids=["peft", "transformers"])
def test_the_card_in_an_adapter_folder_loads_it_and_has_metadata_that_the_hub_reads(base, tmp_path, native) -> None:
    model, ids = loaded(base, rm.TruncatedRoPE(0.5), rm.LearnedSink(), calibration=zoo.tokens()), zoo.tokens()
    if native:
        model.add_adapter(lora())
        folders = {"": model}
    else:
        model = get_peft_model(model, lora())
        model.add_adapter("second", lora())
        folders = {"": model, "second": model}
    model.save_pretrained(tmp_path / "out")
    for name in folders:
        folder = tmp_path / "out" / name
        if name:
            model.set_adapter(name)
        close(snippet(folder)(ids).logits, model.eval()(ids).logits, 1e-6)
        card = ModelCard.load(folder / "README.md", ignore_metadata_errors=False)
        assert card.data.library_name == "peft" and "ropemods" in card.data.tags
        assert base not in card.data.to_yaml()  # a folder here has no page there
        assert "- TruncatedRoPE(keep=0.5), strength 1" in card.text and "More Information Needed" not in card.text


def test_what_somebody_wrote_in_an_adapters_card_stays(base, tmp_path) -> None:
    model = get_peft_model(loaded(base, rm.TruncatedRoPE(0.5)), lora(keep=False))
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n\nIt is good.\n")
    for strength in (1.0, 0.5):
        rm.set_strength(model, strength)
        model.save_pretrained(folder)
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "mit" and card.text.count("# Mine\n\nIt is good.") == 1
    assert card.text.count(adapter_card.LOADING) == 1 and "strength 0.5" in card.text and "strength 1" not in card.text
    assert card.text.count("### Framework versions") == 1
    snippet(folder)


def test_the_base_of_an_adapters_card_is_one_that_has_a_page(tmp_path) -> None:
    adapter_card.write(tmp_path, [rm.TruncatedRoPE(0.5)], {"truncated_rope": 1.0}, "HuggingFaceTB/SmolLM2-135M")
    assert ModelCard.load(tmp_path / "README.md").data.base_model == "HuggingFaceTB/SmolLM2-135M"
    adapter_card.write(tmp_path, [rm.TruncatedRoPE(0.5)], {"truncated_rope": 1.0}, str(tmp_path / "gone"))
    assert ModelCard.load(tmp_path / "README.md").data.base_model is None
