"""The reference model that TRL's trainers make for themselves: the modified start, or an error before any step."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch

import ropemods as rm
from tests import zoo
from tests.contract import close

pytest.importorskip("trl", reason="TRL is not installed, so its reference models are not tried")

from transformers import AutoModelForCausalLM

from tests.trl.trainers import WITH_REFERENCE, logits, lora, make, modified, save_base, tokenizer

EACH_TIME = ("dpo", "grpo")
TRAINERS = [t if t in EACH_TIME else pytest.param(t, marks=pytest.mark.slow) for t in WITH_REFERENCE]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("trainer", WITH_REFERENCE)
def test_a_model_that_was_modified_in_memory_has_no_reference_and_the_error_says_how_it_gets_one(
    trainer, base, tmp_path
) -> None:
    with pytest.raises(ValueError, match=r"ref_model=copy.deepcopy\(model\).*\(GRPO, RLOO\).*ropemods.from_pretrained"):
        make(trainer, modified(base), tmp_path, beta=0.1)


def test_a_modified_checkpoint_that_a_trainer_loads_itself_is_refused(base, tmp_path) -> None:
    modified(base).save_pretrained(tmp_path / "modified")
    with pytest.raises(ValueError, match=r"load it with ropemods\.from_pretrained"):
        make("sft", str(tmp_path / "modified"), tmp_path)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_model_from_a_modified_checkpoint_has_itself_as_its_reference(trainer, base, tmp_path) -> None:
    modified(base).save_pretrained(tmp_path / "start")
    tokenizer().save_pretrained(tmp_path / "start")
    start = rm.from_pretrained(tmp_path / "start").eval()(zoo.tokens()).logits
    run = make(trainer, rm.from_pretrained(tmp_path / "start"), tmp_path, beta=0.1)
    run.train()
    assert torch.equal(logits(run, run.ref_model), start)
    assert not torch.allclose(logits(run, run.model), start, atol=1e-3)
    assert not torch.allclose(start, AutoModelForCausalLM.from_pretrained(base)(zoo.tokens()).logits, atol=1e-3)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_an_adapter_has_the_modified_start_as_its_reference(trainer, base, tmp_path) -> None:
    model = modified(base)
    start = model.eval()(zoo.tokens()).logits
    run = make(trainer, model, tmp_path, beta=0.1, peft_config=lora())
    run.train()
    assert run.ref_model is None  # the model itself, without its adapter
    with run.accelerator.unwrap_model(run.model).disable_adapter():
        close(logits(run, run.model), start, 1e-6)
    assert not torch.allclose(logits(run, run.model), start, atol=1e-3)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_an_adapter_that_is_trained_on_has_itself_as_its_reference(trainer, base, tmp_path) -> None:
    """What was calibrated is in buffers, and TRL copies the parameters."""
    from peft import get_peft_model

    model = modified(base, "sft", rm.LearnedSink(), calibration=zoo.tokens(4, 16))
    get_peft_model(model, lora(init_lora_weights=False)).save_pretrained(tmp_path / "adapter")
    start = rm.from_pretrained(tmp_path / "adapter").eval()(zoo.tokens()).logits
    run = make(trainer, rm.from_pretrained(tmp_path / "adapter", is_trainable=True), tmp_path, beta=0.1)
    run.train()
    bare = run.accelerator.unwrap_model(run.model)
    bare.set_adapter("ref")
    close(logits(run, run.model), start, 1e-6)
    bare.set_adapter("default")
    assert not torch.allclose(logits(run, run.model), start, atol=1e-3)


@pytest.mark.parametrize("options", [{"ref_model": True}, {"precompute_ref_log_probs": True}], ids=str)
def test_a_reference_at_another_strength_than_the_schedule_starts_at_is_refused(options, base, tmp_path) -> None:
    model = modified(base)
    options = {name: copy.deepcopy(model) if name == "ref_model" else value for name, value in options.items()}
    run = make("dpo", model, tmp_path, callbacks=[rm.StrengthSchedule(steps=2)], **options)
    with pytest.raises(ValueError, match="with truncated_rope at strength 1, and this schedule starts training at 0"):
        run.train()


def test_a_schedule_that_would_move_the_reference_says_so(base, tmp_path) -> None:
    schedule = {"callbacks": [rm.StrengthSchedule(steps=2)]}
    with pytest.warns(UserWarning, match="its strength moves along"):
        make("dpo", modified(base, strength=0.0), tmp_path, peft_config=lora(), **schedule).train()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*its strength moves along")
        make("dpo", modified(base, strength=0.0), tmp_path, **schedule).train()
        make("grpo", modified(base, strength=0.0), tmp_path, peft_config=lora(), beta=0.0, **schedule).train()


@pytest.mark.parametrize("trainer", ["grpo", "rloo"])
def test_sampling_from_a_vllm_that_has_the_unmodified_model_is_refused(trainer, base, tmp_path) -> None:
    options = {"beta": 0.0, "use_vllm": True}
    with pytest.raises(ValueError, match="use_vllm=True would sample from the model without TruncatedRoPE"):
        make(trainer, modified(base), tmp_path, **options)
    with pytest.raises(ImportError, match="vLLM is not available"):
        make(trainer, rm.remove(modified(base)), tmp_path, **options)
