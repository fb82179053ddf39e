"""The penalty's program: its readings are `estimate`'s, its batches are as said, a cell needs no tokenizer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from evals import gains, penalty
from evals.measured import upper_layers
from evals.penalty_bench import FAR, LENGTH, LONG, Arm, Bench, crops_of, early, protocols
from ropemods.leakage.capture import capture
from ropemods.leakage.estimate import estimate
from ropemods.model.observation import observing

P = {
    "learning_rate": 1e-3, "warmup": 2, "batch": 4, "groups": 16, "rows": 16, "crops": 32, "far": 2, "measure_batch": 16
}  # fmt: skip
VOCABULARY = 61


class Letters:
    """A tokenizer of letters."""

    bos_token_id = 1

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [2 + ord(letter) % (VOCABULARY - 2) for letter in text]}


def words(draw: np.random.Generator) -> str:
    return "".join(map(chr, draw.integers(64, 128, 20_000)))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A tiny model, and arrays as `prepare` writes them."""
    folder = tmp_path_factory.mktemp("penalty")
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=VOCABULARY, max_position_embeddings=FAR, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    draw = np.random.default_rng(0)
    sizes = {"train": (16, LENGTH), "train_long": (2, LONG), "far": (2, FAR)}
    for name, shape in (sizes | dict.fromkeys(protocols(P), (32, LENGTH))).items():
        tokens = draw.integers(2, VOCABULARY, shape).astype(np.uint16)
        tokens[:, 0] = 1
        np.save(folder / f"{name}.npy", tokens)
    gains.prepare(folder, [words(draw)], [words(draw)], Letters(), count=3)
    return Bench(folder, folder / "model", P, torch.device("cpu"))


def test_readings_are_those_of_the_report(bench: Bench) -> None:
    protocol = protocols(P)["report"]
    with observing(bench.fresh().eval()) as observation:
        sums, _ = capture(observation, crops_of(bench.tokens("report"), protocol), protocol)
    for name, term in estimate(sums).terms.items():
        ours, theirs = early(sums, name), upper_layers(term)
        assert ours["value"] == pytest.approx(theirs["value"], rel=1e-5), name
        assert ours["replicates"] == pytest.approx(theirs["replicates"], rel=1e-3, abs=1e-9), name


def test_batches_are_the_same_text_for_every_arm_of_a_seed(bench: Bench) -> None:
    plain, mixed = (list(bench.batches(Arm(10.0, steps=2, unigram=share), 3)) for share in (0.0, 0.5))
    for one, other in zip(plain, mixed, strict=True):
        (ids, labels), (more, more_labels) = one[0], other[0]
        assert torch.equal(ids, more[:4]) and torch.equal(labels, more_labels[:4]) and len(more) == 8
        assert (more_labels[4:] == -100).all() and (more[4:, 0] == 1).all()
    parts = next(bench.batches(Arm(steps=1, long=True), 3))
    assert [tuple(ids.shape) for ids, _ in parts] == [(2, LENGTH), (1, LONG)]


def test_a_cell_trains_measures_and_is_compared_with_its_control(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    arm = Arm(10.0, steps=3, total=1.0, mods=("keyed", "log"))
    plan = [(Arm(steps=3), (0,)), (arm, (0,))]
    monkeypatch.setitem(penalty.PLANS, "nano", plan)
    done = {name: job() for name, job in penalty.jobs_of(bench, "nano").items()}
    one, other = done["control 3 seed 0"], done[f"{arm.name} seed 0"]
    assert arm.name == "keyed log w10 t1 3"
    assert (
        other["loss"][0] == pytest.approx(one["loss"][0], rel=0.02)
        and one["leakage"] == [0, 0, 0]
        and other["leakage"][1] != 0
    )
    found = penalty.collected(done, "nano")
    row = found["arms"][arm.name]
    assert set(row["instruments"]) == {"search", "report", "other", "unigram"}
    assert row["instruments"]["report"]["mask_change"]["value"] != 0
    assert penalty.table(found).count("\n") == 4


def test_a_passage_stands_at_several_places_and_a_key_is_told_once(bench: Bench) -> None:
    rows = np.load(bench.folder / f"{gains.PASSAGES}.npy")
    assert rows.shape == (3, 1 + gains.BEFORE[-1] + gains.TAIL) and (rows[:, 0] == 1).all()
    said = Letters()(gains.SAID)["input_ids"]
    for length in gains.LENGTHS:
        for row in np.load(bench.folder / f"{gains.PASSKEYS}_{length}.npy").tolist():
            asked = said + row[-gains.ANSWER :]
            assert len(row) == length and row[-len(asked) :] == asked
            assert sum(row[n : n + len(asked)] == asked for n in range(length)) == 2
    found = gains.measure(bench.fresh().eval(), bench.folder, batch=2)
    model = bench.fresh().eval()
    ids = torch.from_numpy(rows[:, -gains.TAIL - gains.BEFORE[0] :].astype(np.int64))
    ids = torch.cat((torch.ones(3, 1, dtype=torch.long), ids), 1)
    nll = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].mT, ids[:, 1:], reduction="none")
    assert len(found["spread"]) == 3 and all(x > 0 for x in found["spread"])
    assert abs(float(nll[:, -gains.SCORED :].mean()) - np.mean(found["passage"])) < 0.2
