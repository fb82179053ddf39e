"""The contexts hold what they ask for, and the answers are where they are looked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from evals import claim, retrieval

PROTOCOL = retrieval.PROTOCOL["nano"]
VALUES = range(retrieval.FIRST + PROTOCOL["keys"], retrieval.FIRST + PROTOCOL["keys"] + PROTOCOL["values"])


@pytest.mark.parametrize("length", [8, 31, 32, 4 * PROTOCOL["length"]])
def test_recall_asks_for_pairs_that_were_shown(length: int) -> None:
    tokens_BT, answer_BT = retrieval.contexts("recall", 5, length, PROTOCOL, torch.Generator().manual_seed(0))
    pairs = (length - 2) // 4
    assert tokens_BT.shape == (5, 4 * pairs + 2) and tokens_BT.shape[1] <= length
    for tokens, answer in zip(tokens_BT.tolist(), answer_BT.tolist(), strict=True):
        assert tokens[0] == retrieval.BOS and tokens[2 * pairs + 1] == retrieval.SEPARATOR
        shown = dict(zip(tokens[1 : 2 * pairs : 2], tokens[2 : 2 * pairs + 1 : 2], strict=True))
        assert len(shown) == pairs and set(shown.values()) <= set(VALUES)
        places = [n for n, here in enumerate(answer) if here]
        assert len(places) == pairs and {tokens[n - 1] for n in places} <= set(shown)
        assert all(tokens[n] == shown[tokens[n - 1]] for n in places)


def test_what_was_asked_for_may_be_asked_for_again() -> None:
    """Else a model need not recall: the values that are left can be told by elimination."""
    tokens_BT, answer_BT = retrieval.contexts("recall", 50, 32, PROTOCOL, torch.Generator().manual_seed(0))
    asked = [tokens[:-1][answer[1:]].tolist() for tokens, answer in zip(tokens_BT, answer_BT, strict=True)]
    assert any(keys[-1] in keys[:-1] for keys in asked) and any(keys[-1] not in keys[:-1] for keys in asked)


@pytest.mark.parametrize("length", [8, 32, 4 * PROTOCOL["length"]])
def test_the_passkey_stands_once_and_is_asked_for_last(length: int) -> None:
    tokens_BT, answer_BT = retrieval.contexts("passkey", 40, length, PROTOCOL, torch.Generator().manual_seed(0))
    assert tokens_BT.shape == (40, length)
    for tokens, answer in zip(tokens_BT.tolist(), answer_BT.tolist(), strict=True):
        assert tokens[0] == retrieval.BOS and answer == [False] * (length - 1) + [True]
        first, last = (n for n, token in enumerate(tokens) if token == retrieval.MARKER)
        assert last == length - 2 and tokens[first + 1] == tokens[-1] and tokens[-1] in VALUES
        assert sum(token in VALUES for token in tokens) == 2


def test_accuracy_is_that_of_the_answers() -> None:
    """A model that always says one value is right as often as it is asked for."""

    class Constant(torch.nn.Module):
        def forward(self, input_ids, use_cache):
            logits = torch.zeros(*input_ids.shape, 200)
            logits[..., VALUES[0]] = 1
            return type("Out", (), {"logits": logits})

    found = retrieval.accuracy(Constant(), 0, PROTOCOL | {"test_contexts": 400})
    assert found["recall"]["4"] == pytest.approx(100 / PROTOCOL["values"], abs=1)
    assert 0 < found["passkey"]["1"] < 20


def test_the_program_runs_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"seeds": [0, 1], "steps": 3, "warmup": 1, "hidden_size": 16, "intermediate_size": 16, "test_contexts": 4}
    monkeypatch.setitem(retrieval.PROTOCOL, "nano", PROTOCOL | small)
    path = claim.run("retrieval", "nano", tmp_path, results=tmp_path / "r", kept=tmp_path / "k", say=str)
    found = json.loads(path.read_text())
    assert set(found["accuracy"]) == {*retrieval.TRAINED, *retrieval.PUT_ON}
    assert "stock (not learned)" in retrieval.section(found) and len(retrieval.learned(found)) == 4
