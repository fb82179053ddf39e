"""What `suggest` tries: the model stays as it was, changes are paired, the choice follows them, the recipe reads."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import yaml
from torch import Tensor

import ropemods as rm
from ropemods import mods
from ropemods.leakage.documents import read_documents
from ropemods.leakage.tries import menu, tried
from ropemods.report.records import Estimate
from ropemods.report.tried_recipe import recipe as written
from ropemods.report.tries import Tries, relative
from ropemods.training.recipe_file import from_values
from tests import zoo
from tests.leakage.fake_tries import fake_tries
from tests.leakage.small import PROTOCOL, documents, tokenizer


@pytest.fixture
def strangers() -> Iterator[type[rm.Mod]]:
    """A modification of a user's own: registered, with two settings worth trying, one of which no model takes."""

    @dataclasses.dataclass(frozen=True)
    class Halved(rm.Mod):
        kind: ClassVar[str] = "halved"
        by: float = 1.0

        @classmethod
        def worth_trying(cls) -> tuple[rm.Mod, ...]:
            return cls(by=0.5), cls(by=-1.0)

        def frequencies(self, inv_freq_F: Tensor, alpha: float) -> Tensor:
            if self.by < 0:
                raise ValueError("halved: by is above 0; give it a positive number")
            return inv_freq_F * (1 - alpha * (1 - self.by))

    rm.register(Halved)
    yield Halved
    del mods._registered["halved"]


def shorter(monkeypatch: pytest.MonkeyPatch, *menu: rm.Mod) -> None:
    monkeypatch.setattr("ropemods.leakage.tries.menu", lambda: menu)


def test_what_is_worth_trying_is_little_and_told_apart() -> None:
    for kind in mods.MODS:
        found = kind.worth_trying()
        assert len(found) <= 3 and all(type(mod) is kind for mod in found)
    names = [str(mod) for mod in menu()]
    assert len(names) == len(set(names))


def test_a_setting_that_cannot_be_guessed_is_not_tried() -> None:
    @dataclasses.dataclass(frozen=True)
    class Needy(rm.Mod):
        kind: ClassVar[str] = "needy"
        by: float

    @dataclasses.dataclass(frozen=True)
    class Fussy(Needy):
        by: float = 0.0

        def __post_init__(self) -> None:
            raise ValueError("by is above 0")

    assert Needy.worth_trying() == Fussy.worth_trying() == ()


def test_the_menu_is_tried_and_the_model_comes_back_as_it_was(
    strangers: type[rm.Mod], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert strangers(by=0.5) in menu()
    shorter(monkeypatch, rm.TruncatedRoPE(0.5), rm.LearnedSink(), *strangers.worth_trying())
    model = zoo.build("llama")
    before, record = model(zoo.tokens()).logits, model.config.to_dict()
    suggestion = rm.suggest(model, tokenizer(), documents(), 64, sequences=8, crop=64, progress=False, trying=PROTOCOL)
    found = suggestion.tries
    assert isinstance(found, Tries)
    assert torch.equal(model(zoo.tokens()).logits, before) and model.config.to_dict() == record
    assert [each.name for each in found.tries] == ["TruncatedRoPE(keep=0.5)", "LearnedSink()", f"{strangers(by=0.5)}"]
    assert [each.in_recipes for each in found.tries] == [True, True, False]
    (refused,) = found.refused
    assert "give it a positive number" in refused.why
    _, sink, halved = found.tries
    assert sink.masses["bos_mass"].value < 0.01  # BOS is closed to later queries
    assert halved.changes["loss"].value != 0 and halved.time.value > 0
    assert "Tried, untrained" in suggestion.to_markdown() and refused.why in suggestion.to_markdown()


def test_a_change_is_that_of_two_measurements_and_is_paired(monkeypatch: pytest.MonkeyPatch) -> None:
    mod = rm.TruncatedRoPE(0.5)
    shorter(monkeypatch, mod)
    (found,) = tried(zoo.build("llama"), tokenizer(), read_documents(documents()), PROTOCOL, progress=False).tries
    before = rm.measure(zoo.build("llama"), tokenizer(), documents(), PROTOCOL, progress=False)
    after = rm.measure(rm.apply(zoo.build("llama"), mod), tokenizer(), documents(), PROTOCOL, progress=False)
    change = rm.compare(before, after).headline.find("held_out_loss")
    assert change is not None and change.ratio is not None
    loss = found.changes["loss"]
    assert (loss.value, loss.low, loss.high) == pytest.approx(
        (change.ratio.value - 1, change.ratio.low - 1, change.ratio.high - 1), abs=1e-6
    )


def test_a_change_against_what_may_be_0_is_none() -> None:
    assert relative(Estimate(1.0, 0.5, 1.5), Estimate(0.1, -0.1, 0.3)) is None


@pytest.mark.parametrize(
    ("changes", "chosen", "says"),
    [
        ({"a": (0.0, -10, 0), "b": (0.5, -20, -5), "c": (0.0, 5, 0)}, "b", "b lowers the early residual most"),
        ({"a": (0.0, -10, 0), "b": (0.07, -20, 19)}, "a", "a lowers the early residual most"),
        ({"a": (1.5, -50, 0), "b": (0.0, 3, 0)}, None, "may cost 1% of the loss; a lowers it most"),
        ({"a": (0.0, -0.5, 0), "b": (0.0, 3, 0)}, None, "no modification of the menu lowers"),
        ({}, None, "no modification of the menu lowers"),
    ],
)
def test_the_choice_follows_what_was_measured(changes: dict, chosen: str | None, says: str) -> None:
    found = fake_tries(**changes)
    assert (found.chosen.name if found.chosen else None) == chosen
    assert says in found.reason and ("nothing helps" in found.reason) == (chosen is None)


def test_a_residual_that_is_not_above_its_noise_is_told_and_nothing_is_chosen() -> None:
    found = fake_tries(residual=-0.01, a=(0.0, -50, 0))
    assert found.chosen is None and "not above its noise" in found.reason
    assert "n/a" in found.to_markdown()


@pytest.mark.parametrize(
    "found",
    [
        fake_tries(a=(0.0, -10, 0)),
        fake_tries(a=(0.0, 10, 0)),
        fake_tries(own=(0.0, -10, 0)),
        dataclasses.replace(fake_tries(a=(0.0, -10, 0)), text_tokens=3000),
    ],
    ids=["a mod", "none", "not by its place", "short text"],
)
def test_the_recipe_is_one_and_says_why(found: Tries) -> None:
    text = written(found, {"model_name_or_path": "model", "data": "books.jsonl", "column": "body"})
    recipe = from_values(yaml.safe_load(text), source="r.yaml")
    ours = found.chosen is not None and found.chosen.in_recipes
    assert recipe.mods == ((rm.TruncatedRoPE(0.5),) if ours else ())
    assert ("untrained" in recipe.options.arms) == ours and recipe.penalty is not None
    assert recipe.options.column == "body" and recipe.options.bos_token_id == 1
    said = text.replace("\n# ", " ")
    assert found.reason in said
    assert ("a recipe cannot import it" in said) == (found.chosen is not None and not ours)


def test_it_is_written_with_the_suggestion_and_a_page_needs_tries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorter(monkeypatch, rm.TruncatedRoPE(0.5))
    given = (zoo.build("llama"), tokenizer(), documents(), 64)
    options = {"sequences": 8, "crop": 64, "progress": False}
    suggestion = rm.suggest(*given, **options, trying=PROTOCOL)
    record = json.loads(suggestion.to_json(tmp_path / "s.json").read_text())
    assert record["tries"]["tries"][0]["name"] == "TruncatedRoPE(keep=0.5)"
    assert "TruncatedRoPE(keep=0.5)" in suggestion.to_html(tmp_path / "s.html").read_text()
    with pytest.raises(ValueError, match="trying=True"):
        rm.suggest(*given, **options).to_html(tmp_path / "t.html")
    suggestion.to_recipe(tmp_path / "r.yaml", model="m", data="d")
    assert yaml.safe_load((tmp_path / "r.yaml").read_text())["data"] == "d"


def test_a_model_that_is_modified_already_is_refused() -> None:
    model = rm.apply(zoo.build("llama"), rm.TruncatedRoPE(0.5))
    with pytest.raises(ValueError, match=r"ropemods\.remove"):
        rm.suggest(model, tokenizer(), documents(), 64, sequences=8, crop=64, progress=False, trying=PROTOCOL)
