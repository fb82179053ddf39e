"""A third of transformers' RoPE architectures through every check of the sweep, and one that nobody has seen before.

The third is chosen by a hash of the type's name; `make sweep` runs all of them. The README's line on architectures is
the one that the last whole sweep's file gives.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from evals import architectures, tiny_models
from evals.architecture_checks import CHECKS, Subject, check_all, outcome
from evals.tiny_configs import BOS, EOS, PAD, VOCAB
from tests.new_architecture import TideConfig, TideForCausalLM

ROOT = Path(__file__).parents[1]
CHOSEN = [kind for kind in tiny_models.rope_types() if architectures.third(kind) == 0]


def test_the_third_is_about_a_third() -> None:
    count = len(tiny_models.rope_types())
    assert count / 4 < len(CHOSEN) < count / 2


@pytest.mark.parametrize("kind", CHOSEN)
def test_an_architecture_passes_every_check_or_refuses_with_a_reason(kind: str) -> None:
    row = check_all(lambda: tiny_models.config_of(kind))
    failed = {name: entry["reason"] for name, entry in row.items() if entry["outcome"] == "fail"}
    assert not failed
    assert all(entry["reason"] for entry in row.values() if entry["outcome"] != "pass")


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_new_architecture_needs_no_change_here(backend: str) -> None:
    """It turns the last channels of a head, pairwise and clockwise, in every second layer; the others see a window."""
    AutoConfig.register("tide", TideConfig, exist_ok=True)
    AutoModelForCausalLM.register(TideConfig, TideForCausalLM, exist_ok=True)

    def config() -> TideConfig:
        made = TideConfig(vocab_size=VOCAB, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
        made._attn_implementation = backend
        return made

    row = check_all(config)
    assert {name: entry for name, entry in row.items() if entry["outcome"] != "pass"} == {}


@pytest.mark.parametrize(
    ("check", "damage"),
    [
        ("truncated rope", "ropemods.mods.truncated_rope.TruncatedRoPE.frequencies"),
        ("adaptive temperature", "ropemods.mods.adaptive_temperature.TemperatureStage.forward"),
        ("learned sink", "ropemods.mods.learned_sink.LearnedSinkStage.forward"),
        ("unrotated bos", "ropemods.mods.unrotated_bos.UnrotatedBosStage.forward"),
        ("replaced bos", "ropemods.mods.replaced_bos.ReplacedBosStage.forward"),
    ],
)
def test_a_modification_that_does_nothing_fails_its_check(check: str, damage: str, monkeypatch) -> None:
    monkeypatch.setattr(damage, lambda self, value, *context: value)
    found = outcome(CHECKS[check], Subject(tiny_models.config_of("llama")))
    assert found["outcome"] == "fail"


@pytest.mark.parametrize(
    ("kind", "check"),
    [
        ("mimo_v2_flash", "keyed sink"),  # its keys are wider than its values
        ("zamba2", "output gate"),  # its attention is given twice the model's width
    ],
)
def test_widths_are_the_layer_s_own(kind: str, check: str) -> None:
    assert outcome(CHECKS[check], Subject(tiny_models.config_of(kind)))["outcome"] == "pass"


def test_a_factor_by_offset_is_refused_where_keys_are_not_the_tokens() -> None:
    found = outcome(CHECKS["scale invariant"], Subject(tiny_models.config_of("deepseek_v4")))
    assert found["outcome"] == "refused" and "how far back a key stands is not known" in found["reason"]


def test_layer_0_that_knows_its_position_is_noticed(monkeypatch) -> None:
    """Logits that grow with the query's position; the reason is found where the model makes them so, and only there."""
    measurement = CHECKS["measurement"]
    subject = Subject(tiny_models.config_of("llama"))
    position = torch.arange(64).float()

    def grow(module, args, output):
        return output * (1 + 0.2 * position[: output.shape[1], None])

    attention = subject.model.model.layers[0].self_attn
    attention.q_proj.register_forward_hook(grow)
    assert "made from absolute position" in measurement(subject)
    monkeypatch.setattr("evals.architecture_measure.position_in_layer_0", lambda model: None)
    assert outcome(measurement, subject)["outcome"] == "fail"


def test_verdicts() -> None:
    def row(*outcomes: str) -> architectures.Row:
        return {str(n): {"outcome": each, "reason": "so"} for n, each in enumerate(outcomes)}

    wanted = {
        "pass": row("pass", "pass"),
        "but for stock": row("pass", "stock"),
        "partly": row("pass", "refused", "stock"),
        "refused": row("refused", "refused"),
        "not built": row("stock", "stock"),
        "fail": row("pass", "refused", "fail"),
    }
    assert {name: architectures.verdict(each) for name, each in wanted.items()} == {name: name for name in wanted}


def test_types_that_are_run_again_are_put_in_and_noted() -> None:
    entry = {"outcome": "pass", "reason": ""}
    whole = {"versions": {"torch": "1"}, "types": {"a": {"x": {"outcome": "fail", "reason": "so"}}, "b": {"x": entry}}}
    found = architectures.updated(whole, {"versions": {"torch": "1"}, "types": {"a": {"x": entry}}})
    assert found["types"] == {"a": {"x": entry}, "b": {"x": entry}} and found["run_again"] == [["a"]]
    with pytest.raises(ValueError, match="run all types"):
        architectures.updated(whole, {"versions": {"torch": "2"}, "types": {}})


@pytest.mark.parametrize("name", sorted(path.stem for path in architectures.RESULTS.glob("architectures*.json")))
def test_the_files_agree_with_each_other_and_with_the_readme(name: str) -> None:
    report = json.loads((architectures.RESULTS / f"{name}.json").read_text())
    assert (architectures.RESULTS / f"{name}.md").read_text() == architectures.markdown(report)
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert architectures.summary(report) in readme
    assert not re.search(r"/(home|root|tmp|opt|usr|var|mnt|work)/", json.dumps(report)), "a path of some machine"
