"""The entropy of an attention call on the row-statistics kernel: every term a row may have."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from ropemods.attention import eager, paths, sdpa
from ropemods.attention.triton.entropy import entropy
from tests.attention.test_rows import problem

INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="makes its inputs on the CPU")


@INTERPRETED
@settings(max_examples=16, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    mask=st.sampled_from(["causal", "padded", "window", "additive"]),
    bos=st.sampled_from(["none", "rescored", "weighted", "closed"]),
    temperature=st.sampled_from(["all", "spare"]),
    past=st.sampled_from([0, 3]),
    queries=st.integers(1, 14),
    seed=st.integers(0, 10**6),
)
def test_beta_and_its_gradients_equal_those_of_fp64(mask, bos, temperature, past, queries, seed) -> None:
    case = {
        "batch": 2, "groups": 1, "repeats": 2, "queries": queries, "past": past, "dim": 16, "mask": mask,
        "magnitude": 1.0, "bos": bos, "temperature": temperature, "slots": "", "seed": seed,
    }  # fmt: skip
    rows = problem(case, torch.float32)
    assert rows.entropy_scale is not None
    rule, results = rows.entropy_scale, []
    for dtype in (torch.float32, torch.float64):
        q, k = (x.detach().to(dtype).requires_grad_() for x in (rows.q_BHTD, rows.k_BGSD))
        mask_ = rows.mask if rows.mask is None or rows.mask.dtype == torch.bool else rows.mask.to(dtype)
        column = None if rows.column is None else rows.column._replace(logit_BHT=rows.column.logit_BHT.to(dtype))
        these = rows._replace(q_BHTD=q, k_BGSD=k, mask=mask_, column=column)
        beta = rule.beta(entropy(these)) if dtype == torch.float32 else eager.tempered(these).row_scale.beta_BHT
        results.append([beta, *torch.autograd.grad(beta.sum(), (q, k))])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


@INTERPRETED
def test_it_is_asked_for_by_name_and_then_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    case = {
        "batch": 1, "groups": 1, "repeats": 2, "queries": 12, "past": 0, "dim": 16, "mask": "causal",
        "magnitude": 1.0, "bos": "none", "temperature": "all", "slots": "sink", "seed": 5,
    }  # fmt: skip
    rows = problem(case, torch.float32)
    by_flash = sdpa.attend(rows)[0]
    monkeypatch.setenv(paths.VARIABLE, "triton-rows")
    ran = []
    monkeypatch.setattr("ropemods.attention.triton.entropy.row_stats", lambda *a, **k: ran.append(a) or stats(*a, **k))
    from ropemods.attention.triton.row_stats import row_stats as stats

    torch.testing.assert_close(sdpa.attend(rows)[0], by_flash, rtol=1e-5, atol=1e-5)
    assert len(ran) == 1
