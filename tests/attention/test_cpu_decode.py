"""Decoding on a CPU: few rows against `eager` in fp64, and an error no larger than a stock kernel's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ropemods.attention import cpu_decode, eager, sdpa
from ropemods.attention.rows import Rows
from ropemods.attention.terms import Slot
from tests.attention.test_rows import cases, problem


def widened(rows: Rows) -> Rows:
    mask = rows.mask if rows.mask is None or rows.mask.dtype == torch.bool else rows.mask.double()
    q, k, v = (x.double() for x in rows[:3])
    return rows._replace(q_BHTD=q, k_BGSD=k, v_BGSD=v, mask=mask)


@settings(max_examples=150, deadline=None)
@given(
    case=cases,
    queries=st.integers(1, cpu_decode.ROWS),
    past=st.sampled_from([0, 3, 40]),
    known=st.booleans(),
    biased=st.booleans(),
    softcap=st.sampled_from([None, 3.0]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_rows_and_denominators_equal_fp64(case, queries, past, known, biased, softcap, dtype) -> None:
    mask = "biased" if biased else case["mask"]
    rows = problem(case | {"queries": queries, "past": past, "mask": mask}, dtype)
    rows = rows._replace(softcap=softcap)
    rows = eager.tempered(rows) if known else rows
    with torch.no_grad():
        assert cpu_decode.fits(rows)
        out, log_z = cpu_decode.attend(rows, want_lse=True)
        wanted, _, wanted_log_z = eager.attend(widened(rows))
    assert out.dtype == dtype
    tolerance = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(out.double(), wanted, rtol=tolerance, atol=tolerance)
    wide = min(tolerance, 2e-5)  # the denominator is not rounded to the inputs' precision
    torch.testing.assert_close(log_z.double(), wanted_log_z, rtol=wide, atol=wide)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_run_by_run(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_decode, "RUN", 7)
    q, k, v = (torch.randn(1, heads, keys, 16).to(dtype) for heads, keys in ((4, 1), (2, 30), (2, 30)))
    with torch.no_grad():
        out, _ = cpu_decode.attend(Rows(q, k, v, mask=None, causal=False, scale=0.25))
        exact = eager.attend(Rows(q.double(), k.double(), v.double(), mask=None, causal=False, scale=0.25))[0]
        stock = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.25, enable_gqa=True)
    assert (out.double() - exact).norm() <= 2 * (stock.double() - exact).norm()


class WidestKeys(TorchDispatchMode):
    """Remembers the most keys that were in fp32 at once."""

    keys = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32 and result.shape[-1] == 16:
            self.keys = max(self.keys, result.shape[-2])
        return result


def test_half_precision_keys_are_never_widened_whole() -> None:
    q, k = (torch.randn(1, 2, keys, 16).bfloat16() for keys in (1, 8192))
    with torch.no_grad(), WidestKeys() as seen:
        cpu_decode._scores(q, k, 0.25)
    assert seen.keys == cpu_decode.RUN


def test_where_there_are_gradients_others_run() -> None:
    q, k, v = (torch.randn(1, 2, keys, 16) for keys in (1, 20, 20))
    rows = Rows(q, k, v, mask=None, causal=False, scale=0.25)
    assert cpu_decode.fits(rows) and not cpu_decode.fits(rows._replace(q_BHTD=q.clone().requires_grad_()))
    assert not cpu_decode.fits(rows._replace(slots=(Slot(torch.zeros(2, requires_grad=True)),)))
    assert not cpu_decode.fits(rows._replace(dropout=0.1))
    sink = torch.zeros(2, requires_grad=True)
    sdpa.attend(rows._replace(slots=(Slot(sink),)))[0].sum().backward()
    assert sink.grad is not None and sink.grad.abs().sum() > 0


def test_nan_stays_in_its_row_and_rows_that_see_nothing_are_zero() -> None:
    q, k, v = (torch.randn(1, 2, keys, 16) for keys in (4, 20, 20))
    q[0, 1, 2] = torch.nan
    mask = torch.ones(1, 1, 4, 20, dtype=torch.bool)
    mask[:, :, 0] = False
    case = {"batch": 1, "groups": 1, "repeats": 2, "queries": 4, "past": 0, "dim": 16, "mask": "causal",
            "magnitude": 1.0, "bos": "none", "temperature": "all", "slots": "", "seed": 0}  # fmt: skip
    rule = problem(case, torch.float32).entropy_scale
    out, log_z = cpu_decode.attend(
        Rows(q, k, v, mask=mask, causal=False, scale=0.25, entropy_scale=rule), want_lse=True
    )
    assert out.isnan().any(-1).nonzero().tolist() == [[0, 1, 2]]
    assert (out[:, :, 0] == 0).all() and (log_z[:, :, 0] == float("-inf")).all()


def test_opcheck_and_a_whole_compilation() -> None:
    case = {"batch": 1, "groups": 1, "repeats": 2, "queries": 1, "past": 9, "dim": 16, "mask": "padded",
            "magnitude": 1.0, "bos": "closed", "temperature": "spare", "slots": "sink", "seed": 0}  # fmt: skip
    rows = problem(case, torch.float32)
    recorded = []
    with pytest.MonkeyPatch.context() as patched:
        operator = cpu_decode._attend_few
        patched.setattr(cpu_decode, "_attend_few", lambda *given: recorded.append(given) or operator(*given))
        wanted = cpu_decode.attend(rows)[0]
    torch.library.opcheck(torch.ops.ropemods.attend_few, recorded[0])

    def decode(q: torch.Tensor) -> torch.Tensor:
        return sdpa.attend(rows._replace(q_BHTD=q))[0]

    with torch.no_grad():
        compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(rows.q_BHTD), wanted)
