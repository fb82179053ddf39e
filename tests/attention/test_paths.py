"""Which kernels run, who says so, and that what cannot run is never replaced without a word."""

from __future__ import annotations

import pytest
import torch

import ropemods as rm
from ropemods.attention import paths, sdpa
from ropemods.attention.rows import Rows
from tests import zoo
from tests.attention.test_rows import problem

CPU = torch.device("cpu")
CASE = {
    "batch": 2, "groups": 1, "repeats": 2, "queries": 12, "past": 0, "dim": 16, "mask": "padded", "magnitude": 1.0,
    "bos": "rescored", "temperature": "all", "slots": "sink", "seed": 5,
}  # fmt: skip


def test_stock_kernels_run_where_nothing_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(paths.VARIABLE, raising=False)
    assert paths.chosen(CPU) == "flash"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert paths.chosen(torch.device("cuda")) == "flash"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("Triton", "must be one of flash, triton, triton-rows, flex"),
        ("triton", "our kernels run on CUDA.*flash can run there"),
        ("triton-rows", "our kernels run on CUDA.*flash can run there"),
        ("flex", "for CPUs without the log-sum-exp; flash can run there"),
    ],
)
def test_what_cannot_run_is_an_error_that_names_what_can(asked, message, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(paths.VARIABLE, asked)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=message):
        paths.chosen(CPU)
    with pytest.raises(ValueError, match=message):
        sdpa.attend(problem(CASE, torch.float32))


@pytest.mark.parametrize("path", ["triton", "triton-rows"])
@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)])
def test_on_cuda_our_kernels_run_where_they_can_and_only_when_asked_for(
    path, capability, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setenv(paths.VARIABLE, path)
    if capability < (8, 0):
        with pytest.raises(ValueError, match=r"compute capability 8\.0"):
            paths.chosen(cuda)
    else:
        assert paths.chosen(cuda) == path


@pytest.mark.skipif(torch.cuda.is_available(), reason="makes its inputs on the CPU")
@pytest.mark.parametrize("path", ["triton", "triton-rows"])
@pytest.mark.parametrize("mask", ["causal", "padded", "additive"])
def test_every_path_gives_the_same_rows(path: str, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    rows = problem(CASE | {"mask": mask}, torch.float32)
    by_flash = sdpa.attend(rows)[0]
    monkeypatch.setenv(paths.VARIABLE, path)
    torch.testing.assert_close(sdpa.attend(rows)[0], by_flash, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="makes its inputs on the CPU")
def test_a_soft_cap_runs_on_our_kernels_and_is_refused_by_stock_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    rows = Rows(q, k, v, mask=None, causal=True, scale=0.3, softcap=2.0)
    with pytest.raises(ValueError, match="ROPEMODS_KERNEL=triton"):
        sdpa.attend(rows)
    monkeypatch.setenv(paths.VARIABLE, "triton")
    s = 2 * torch.tanh(q @ k.transpose(2, 3) * 0.3 / 2)
    s = s.masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), -torch.inf)
    torch.testing.assert_close(sdpa.attend(rows)[0], s.softmax(-1) @ v, rtol=1e-5, atol=1e-5)


def test_the_summary_names_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("llama")
    rm.apply(model, rm.LearnedSink())
    monkeypatch.delenv(paths.VARIABLE, raising=False)
    assert "attention: sdpa, kernels: flash" in rm.summary(model)
    monkeypatch.setenv(paths.VARIABLE, "triton")
    assert "kernels: triton " in rm.summary(model)
    rm.remove(model)
    rm.apply(model, rm.TruncatedRoPE(keep=0.5))
    assert "kernels" not in rm.summary(model)
