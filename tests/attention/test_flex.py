"""FlexAttention against `eager`: written out everywhere, compiled where there is a compiler for it.

On a CPU torch has its forward and no backward; on CUDA the gradients are tested too.
"""

from __future__ import annotations

import pytest
import torch

from ropemods.attention import eager, flex, paths, sdpa
from ropemods.attention.rows import Rows
from tests.attention.test_rows import problem
from tests.attention.test_triton_attend import DEVICE, assert_equal, everything, moved

CASE = {
    "batch": 2, "groups": 1, "repeats": 2, "queries": 40, "past": 0, "dim": 16, "mask": "causal", "magnitude": 1.0,
    "bos": "weighted", "temperature": "spare", "slots": "sink", "seed": 5,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _traced_anew() -> None:
    """Uncompiled it traces all the same, and trips over what it kept of score functions that are gone."""
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"temperature": "all", "bos": "rescored", "mask": "padded"},
        {"temperature": "all", "bos": "none", "mask": "additive", "queries": 7, "past": 3},
        {"temperature": None, "bos": "closed", "mask": "window", "slots": ""},
    ],
    ids=str,
)
def test_rows_and_denominators_equal_those_of_eager(change: dict) -> None:
    rows = problem(CASE | change, torch.float32)
    with torch.no_grad():
        out, log_z = flex.attend(rows, compiled=False)
        wanted, _, wanted_log_z = eager.attend(rows)
    torch.testing.assert_close(out, wanted, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(log_z, wanted_log_z, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("queries", [1, 128, 300])
def test_blocks_of_causal_rows(queries: int) -> None:
    q, k, v = (torch.randn(1, 2, queries, 16) for _ in range(3))
    rows = Rows(q, k, v, mask=None, causal=True, scale=0.25, softcap=3.0)
    with torch.no_grad():
        found = flex.attend(rows, compiled=False)[0]
    torch.testing.assert_close(found, eager.attend(rows)[0], rtol=2e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cpu", reason="torch compiles it for CPUs without the log-sum-exp")
@pytest.mark.parametrize("mask", ["causal", "padded"])
def test_compiled_it_is_the_same(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = problem(CASE | {"mask": mask}, torch.float32)
    monkeypatch.setenv(paths.VARIABLE, "flex")
    ours, _ = moved(rows, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(sdpa.attend(ours)[0].cpu(), eager.attend(rows)[0], rtol=2e-5, atol=2e-5)


@pytest.mark.skipif(DEVICE == "cpu", reason="torch has no backward of FlexAttention for CPUs")
def test_gradients_equal_those_of_eager() -> None:
    rows = problem(CASE, torch.float32)
    ours, leaves = moved(rows, torch.float32)
    exact, wide_leaves = moved(rows, torch.float64)
    assert_equal(everything(flex.attend, ours, leaves), everything(eager.attend, exact, wide_leaves), 1e-4)
