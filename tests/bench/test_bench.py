"""The benchmark: what it times is right, what it writes is complete, and what it cannot do it says."""

from __future__ import annotations

import json
import xml.etree.ElementTree
from pathlib import Path

import pytest
import torch

from ropemods import clock
from ropemods.bench.bench_tables import table
from ropemods.bench.cases import KINDS, Problem, Shape, subjects
from ropemods.bench.grid import Plan, survey
from tests.cli.program import refused, run

SUBJECTS = subjects()
TINY = {"head_dim": 8, "heads": 4, "group_ratio": 2, "dtype": "float32"}


def tiny(length: int = 12) -> Shape:
    return Shape(length=length, **TINY)


def test_every_subject_is_measured_in_every_kind_on_every_path() -> None:
    rows = survey(Plan(shapes=(tiny(), tiny(20)), paths=("flash", "eager"), subjects=SUBJECTS, pairs=1))
    asked = {(s.name, p, k) for s in SUBJECTS for p in ("flash", "eager") for k in KINDS if s.mods or p == "flash"}
    asked -= {("scale invariant", "flash", kind) for kind in KINDS}  # stock kernels know no distances
    assert {(row.subject, row.path, row.kind) for row in rows} == asked
    assert len(rows) == 2 * len(asked)
    assert all(row.ratio.low <= row.ratio.median <= row.ratio.high for row in rows)
    assert len(table(rows).splitlines()) == 2 + len(rows)


def test_eager_attention_is_left_out_where_its_memory_would_not_fit() -> None:
    rows = survey(Plan(shapes=(tiny(),), paths=("flash", "eager"), pairs=1, longest_eager=11))
    assert {row.path for row in rows} == {"flash"}


def test_the_ratio_is_taken_within_pairs_and_warm_up_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [0.0], [0, 0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(clock.time, "process_time", lambda: now[0])

    def first() -> None:
        calls[0] += 1
        # The machine slows down from pair to pair, and everything in it.
        now[0] += 100.0 if calls[0] <= clock.WARM_UP else calls[0]

    def second() -> None:
        calls[1] += 1
        now[0] += (5 if calls[1] == clock.WARM_UP + 1 else 2) * calls[1]

    found = clock.ratio(first, second, pairs=5, device="cpu", patience=1000.0)
    assert (found.median, found.low, found.high) == (2.0, 2.0, 5.0)
    assert found.first_ms == 1000 * (clock.WARM_UP + 3)


def test_a_long_call_is_timed_in_fewer_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    for name in ("perf_counter", "process_time"):
        monkeypatch.setattr(clock.time, name, lambda: now[0])

    def call() -> None:
        now[0] += 2.0

    assert clock.ratio(call, call, pairs=9, device="cpu", patience=1.0).pairs == clock.FEWEST
    assert clock.ratio(call, call, pairs=9, device="cpu", patience=20.0).pairs == 5
    assert clock.ratio(call, call, pairs=9, device="cpu", patience=1000.0).pairs == 9


def test_peak_memory_is_what_is_held_at_once_and_not_what_is_made() -> None:
    def call() -> None:
        kept = torch.zeros(1000)
        for _ in range(5):
            torch.zeros(5000)
        del kept

    assert clock.peak_bytes(call, "cpu") == 4 * (1000 + 5000)


def test_decoding_may_have_heads_of_its_own() -> None:
    shape = Shape(length=20, head_dim=8, heads=8, group_ratio=4, dtype="float32")
    rows = survey(Plan(shapes=(tiny(),), decode_shapes=(shape,), kinds=("forward", "decode"), pairs=1))
    assert {(row.kind, row.shape) for row in rows} == {("forward", tiny()), ("decode", shape)}


def test_floors_are_those_of_the_products() -> None:
    plain, read = (next(s for s in SUBJECTS if s.name == name) for name in ("sink", "temperature"))
    assert [read.floor("flash", kind) for kind in KINDS] == [2.0, 2.0, 1.0]
    assert [plain.floor("flash", kind) for kind in KINDS] == [1.0, 1.0, 1.0]
    assert read.floor("triton", "training") == (4 + 7) / 7 and read.floor("triton", "forward") == 1.5
    assert read.floor("eager", "training") is None


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_a_training_step_gives_no_gradient_to_what_is_not_asked_for(subject) -> None:
    problem = Problem(tiny(), "training", "cpu")
    problem.modified(subject, "flash" if problem.takes(subject, "flash") else "eager")()
    assert problem.q.grad is None


def test_the_command_writes_rows_versions_and_a_picture(tmp_path: Path) -> None:
    folder = tmp_path / "bench"
    run(f"bench --lengths 16 32 --heads 4 --head_dims 8 --group_ratios 2 --pairs 1 --output {folder}")
    written = json.loads((folder / "bench.json").read_text())
    assert written["versions"]["torch"] == torch.__version__
    assert {row["shape"]["length"] for row in written["rows"]} == {16, 32}
    assert len((folder / "bench.md").read_text().splitlines()) == 2 + len(written["rows"])
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- table -->\nold\n<!-- end of table -->\nbelow\n")
    run(f"bench --redraw {folder}/bench.json --output {tmp_path}/again --page {page}")
    for name in ("bench.json", "bench.md", "bench.svg"):
        assert (tmp_path / "again" / name).read_text() == (folder / name).read_text()
    assert (folder / "bench.md").read_text() in page.read_text() and "old" not in page.read_text()
    picture = xml.etree.ElementTree.fromstring((folder / "bench.svg").read_text())
    assert "temperature" in "".join(picture.itertext())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--heads 6 --group_ratios 4", "must be a multiple of every --group_ratios"),
        ("--pairs 0", "pairs must be 1 or more"),
        ("--lengths 0", "must be 1 or more"),
        ("--kinds backward", "forward, training or decode"),
        ("--decode_heads 8 3", "--decode_heads must be query heads and key/value heads"),
    ],
)
def test_what_it_cannot_measure_it_says(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(f"bench {words}", capsys)
