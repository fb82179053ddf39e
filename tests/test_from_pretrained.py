"""`rm.from_pretrained` takes what transformers' own takes: where the checkpoint lies, its config, its loading info."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, PreTrainedModel

import ropemods as rm
from tests import zoo


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, PreTrainedModel]:
    """A modified checkpoint in the folder `inside` of one that holds nothing else, and its model."""
    model = rm.apply(zoo.build(), rm.TruncatedRoPE(0.5), rm.LearnedSink(init=0.5))
    model.save_pretrained(tmp_path / "inside")
    return tmp_path, model


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    with torch.no_grad():
        return torch.equal(a.eval()(zoo.tokens()).logits, b.eval()(zoo.tokens()).logits)


def test_a_checkpoint_in_a_subfolder(saved: tuple[Path, PreTrainedModel]) -> None:
    folder, model = saved
    assert same(rm.from_pretrained(folder, subfolder="inside"), model)


def test_an_adapter_in_a_subfolder(saved: tuple[Path, PreTrainedModel]) -> None:
    from peft import LoraConfig, get_peft_model

    folder, _ = saved
    base = rm.from_pretrained(folder / "inside")
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["ropemods"], init_lora_weights=False)
    wrapped = get_peft_model(base, lora)
    wrapped.save_pretrained(folder / "adapter")
    back = rm.from_pretrained(folder, subfolder="adapter", base_model_name_or_path=folder / "inside")
    assert same(back, wrapped)


def test_a_config_in_place_of_the_checkpoints_own(saved: tuple[Path, PreTrainedModel]) -> None:
    folder, model = saved
    config = AutoConfig.from_pretrained(folder / "inside")
    config.use_cache = False
    before = config.to_dict()
    back = rm.from_pretrained(folder / "inside", config=config)
    assert same(back, model) and back.config.use_cache is False
    assert config.to_dict() == before
    assert back.config.ropemods == model.config.ropemods


def test_a_config_of_another_model_is_refused(saved: tuple[Path, PreTrainedModel]) -> None:
    folder, _ = saved
    with pytest.raises(ValueError, match=r"records no modifications, and .*start from the checkpoint's own config"):
        rm.from_pretrained(folder / "inside", config=zoo.build().config)
    other = AutoConfig.from_pretrained(folder / "inside")
    other.ropemods["mods"][0]["keep"] = 0.25
    with pytest.raises(ValueError, match=r"'keep': 0\.25.*'keep': 0\.5"):
        rm.from_pretrained(folder / "inside", config=other)
    with pytest.raises(TypeError, match="config= takes a config, found str"):
        rm.from_pretrained(folder / "inside", config="inside")


def test_the_loading_info_beside_the_model(saved: tuple[Path, PreTrainedModel]) -> None:
    folder, model = saved
    back, info = rm.from_pretrained(folder / "inside", output_loading_info=True)
    assert same(back, model) and not info["missing_keys"] and not info["unexpected_keys"]


def test_loads_in_several_threads_leave_transformers_as_it_was(saved: tuple[Path, PreTrainedModel]) -> None:
    """Without a lock the second or third round ends with a `tie_weights` that ties nothing, for every later load."""
    folder, model = saved
    tie_weights = PreTrainedModel.tie_weights
    for _ in range(8):
        with ThreadPoolExecutor(3) as pool:
            loaded = list(pool.map(lambda _: rm.from_pretrained(folder / "inside"), range(3)))
    assert PreTrainedModel.tie_weights is tie_weights
    assert all(same(each, model) for each in loaded)


def test_a_name_that_cannot_be_looked_up_is_named_with_the_file() -> None:
    with pytest.raises(OSError, match=r"^nobody/nothing: there is no such folder here.*look for the config\.json"):
        rm.from_pretrained("nobody/nothing")
