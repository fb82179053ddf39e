"""A program's run is resumable, says what made it, and never takes up another protocol's cells."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from evals import claim
from evals.intervals import over_seeds, t_quantile


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A program of two cells that counts how often they run."""
    module = types.ModuleType("evals.counted")
    module.PROTOCOL = {"nano": {"seeds": [3, 4], "steps": 2}, "small": {"seeds": [3], "steps": 9}}
    module.ran = []

    def run(scale: str, data: Path, cells: claim.Cells) -> dict[str, Any]:
        def job(seed: int) -> dict[str, int]:
            module.ran.append(seed)
            if seed == getattr(module, "broken", None):
                raise RuntimeError("interrupted")
            return {"steps": module.PROTOCOL[scale]["steps"], "seed": seed}

        return {"cells": cells({f"seed {s}": lambda s=s: job(s) for s in module.PROTOCOL[scale]["seeds"]})}

    module.run = run
    monkeypatch.setitem(sys.modules, "evals.counted", module)
    monkeypatch.setattr(claim, "PROGRAMS", ("counted",))
    return module


def started(tmp_path: Path, scale: str = "nano") -> dict[str, Any]:
    path = claim.run("counted", scale, tmp_path, results=tmp_path / "results", kept=tmp_path / "kept", say=str)
    return json.loads(path.read_text())


def test_an_interrupted_run_goes_on_where_it_stopped(program: types.ModuleType, tmp_path: Path) -> None:
    program.broken = 4
    with pytest.raises(RuntimeError, match="interrupted"):
        started(tmp_path)
    assert not (tmp_path / "results" / "counted.json").exists()
    del program.broken
    found = started(tmp_path)
    assert program.ran == [3, 4, 4]
    assert found["cells"] == {"seed 3": {"steps": 2, "seed": 3}, "seed 4": {"steps": 2, "seed": 4}}


def test_a_cell_that_another_process_holds_is_left_to_it(tmp_path: Path) -> None:
    """The other holds "a"; so "b" runs first, and "a" is read when the other has written it."""
    ran, said = [], []
    (tmp_path / "cells").mkdir()
    other = claim.held(tmp_path / "cells" / "a.lock", wait=False)
    assert other.__enter__()

    def b() -> int:
        ran.append("b")
        (tmp_path / "cells" / "a.json").write_text(json.dumps({"cell": "a", "seconds": 2.0, "result": 7}))
        other.__exit__(None, None, None)
        return 8

    cells = claim.Cells(tmp_path / "cells", say=said.append)
    assert cells({"a": lambda: ran.append("a"), "b": b}) == {"a": 7, "b": 8}
    assert ran == ["b"] and said[-1].endswith("a: kept") and cells.seconds >= 2.0


def test_workers_share_the_cells(tmp_path: Path) -> None:
    """Two real processes: every cell runs once, and both come to the same result."""
    script = (
        "import os, sys, time\nfrom pathlib import Path\nfrom evals.claim import Cells\n"
        "here = Path(sys.argv[1]).parent\n(here / f'{os.getpid()}.ready').touch()\n"
        "while len(list(here.glob('*.ready'))) < 2:\n    time.sleep(0.01)\n"  # one may take seconds longer to start
        "def job(n):\n    time.sleep(0.2)\n    return [n, os.getpid()]\n"
        "found = Cells(Path(sys.argv[1]))({str(n): lambda n=n: job(n) for n in range(6)})\n"
        "print(sorted(map(tuple, found.values())))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "cells")]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [worker.communicate(timeout=120)[0].splitlines() for worker in workers]
    assert told[0][-1] == told[1][-1] and len({pid for _, pid in ast.literal_eval(told[0][-1])}) == 2
    ran = [line for lines in told for line in lines[:-1] if not line.endswith("kept")]
    assert len(ran) == 6


def test_cells_of_another_protocol_are_not_taken_up(program: types.ModuleType, tmp_path: Path) -> None:
    before = started(tmp_path)
    program.PROTOCOL["nano"]["steps"] = 5
    after = started(tmp_path)
    assert after["cells"]["seed 3"]["steps"] == 5
    assert before["protocol_hash"] != after["protocol_hash"]


def test_a_result_says_what_made_it(program: types.ModuleType, tmp_path: Path) -> None:
    found = started(tmp_path)
    assert set(claim.ADDED) <= set(found)
    assert found["command"] == "python -m evals run counted --scale nano --data DATA"
    assert found["protocol_hash"] == claim.hash_of(found["protocol"]) and found["seeds"] == [3, 4]


def test_scales_have_files_of_their_own(program: types.ModuleType, tmp_path: Path) -> None:
    assert started(tmp_path)["cells"]["seed 3"]["steps"] == 2
    assert started(tmp_path, "small")["cells"]["seed 3"]["steps"] == 9
    assert {path.name for path in (tmp_path / "results").iterdir()} == {"counted.json", "counted.small.json"}


def test_mistakes_are_told(program: types.ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no scale 'huge'; its protocol is written for nano, small"):
        started(tmp_path, "huge")
    with pytest.raises(ValueError, match="no program 'other'; there are counted"):
        claim.run("other", "nano", tmp_path)
    program.run = lambda *_: {"seconds": 1}
    with pytest.raises(ValueError, match="seconds"):
        started(tmp_path)


def test_cells_with_the_same_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="share the file a_b"):
        claim.Cells(tmp_path, say=str)({"a b": lambda: 1, "a/b": lambda: 2})


@pytest.mark.parametrize("name", claim.PROGRAMS)
def test_every_program_keeps_to_the_contract(name: str) -> None:
    module = importlib.import_module(f"evals.{name}")
    assert module.__doc__ and len(module.__doc__) > 400, "its docstring is the claim, the protocol, what is against it"
    for scale in module.PROTOCOL:
        assert claim.protocol(module, scale)["seeds"]
    assert all(callable(getattr(module, part)) for part in ("run", "section", "learned"))


@pytest.mark.parametrize(("degrees", "wanted"), [(1, 12.7062), (2, 4.3027), (9, 2.2622), (200, 1.9719)])
def test_quantiles_are_those_of_the_tables(degrees: int, wanted: float) -> None:
    assert t_quantile(degrees) == pytest.approx(wanted, abs=1e-4)


def test_an_interval_over_seeds_needs_two() -> None:
    found = over_seeds([1.0, 2.0, 3.0])
    assert found["value"] == 2 and found["high"] - 2 == pytest.approx(4.3027 / 3**0.5, abs=1e-4)
    with pytest.raises(ValueError, match="two or more"):
        over_seeds([1.0])
