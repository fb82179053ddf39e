"""Causal rows with a BOS column on a CPU kernel that does not see it: against the oracle, and as an operator."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ropemods.attention import cpu_column, eager, sdpa
from ropemods.attention.rows import Rows
from ropemods.attention.slots import Slots
from ropemods.attention.terms import Column, Slot
from tests.attention.test_rows import oracle, problem, with_gradients
from tests.attention.test_triton_attend import assert_equal, everything, moved

cases = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 2),
        "groups": st.sampled_from([1, 2]),
        "repeats": st.sampled_from([1, 3]),
        "queries": st.integers(9, 40),
        "past": st.just(0),
        "dim": st.sampled_from([2, 5, 16]),
        "mask": st.just("causal"),
        "magnitude": st.sampled_from([0.3, 1.0, 4.0]),
        "bos": st.sampled_from(["rescored", "weighted", "closed"]),
        "temperature": st.sampled_from([None, "all", "spare"]),
        "scaled": st.sampled_from([None, "all"]),
        "slots": st.sampled_from(["", "sink", "sink row valued"]),
        "seed": st.integers(0, 10**6),
    }
)


@settings(max_examples=60, deadline=None)
@given(case=cases)
def test_fp64_output_and_gradients_equal_the_oracle(case: dict) -> None:
    rows = problem(case, torch.float64)
    assert cpu_column.fits(rows)
    found = with_gradients(rows, lambda r: sdpa.attend(r)[0], torch.float64)
    for actual, wanted in zip(found, oracle(rows), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(case=cases, columns=st.lists(st.integers(0, 8), min_size=2, max_size=2))
def test_wherever_the_bos_stands_and_for_every_gradient(case: dict, columns: list[int]) -> None:
    """Against `eager`, with the gradients of the column's logits and of the temperature's coefficients too."""
    rows = problem(case, torch.float64)
    batch, queries = rows.q_BHTD.shape[0], rows.q_BHTD.shape[2]
    column_B1 = torch.tensor(columns[:batch])[:, None]
    assert rows.column is not None
    position = torch.arange(queries)[None]
    rows = rows._replace(column=rows.column._replace(is_bos_BS=position == column_B1, is_self_BT=position == column_B1))
    ours, leaves = moved(rows, torch.float64, "cpu")
    exact, other_leaves = moved(rows, torch.float64, "cpu")
    assert cpu_column.fits(ours)
    assert_equal(everything(sdpa.attend, ours, leaves), everything(eager.attend, exact, other_leaves), 1e-9)


def column_of_first(batch: int, keys: int, logit: Tensor) -> Column:
    first = (torch.arange(keys) == 0).expand(batch, -1)
    return Column(first, first, logit, torch.tensor(float("-inf")))


@pytest.mark.parametrize("sink", [None, torch.zeros(2)])
def test_logits_of_ten_thousand(sink: Tensor | None) -> None:
    """The column far above every key, far below, and closed."""
    q, k, v = (torch.randn(1, 2, 12, 8) for _ in range(3))
    for height, closed in ((1e4, False), (-1e4, False), (1e4, True)):
        column = column_of_first(1, 12, torch.full((1, 2, 12), height))
        if not closed:
            column = column._replace(log_weight=torch.tensor(0.0))
        rows = Rows(
            q, k, v, mask=None, causal=True, scale=0.3, column=column, slots=() if sink is None else (Slot(sink),)
        )
        found = with_gradients(rows, lambda r: sdpa.attend(r)[0], torch.float32)
        wanted = with_gradients(rows, lambda r: eager.attend(r)[0], torch.float32)
        for actual, expected in zip(found, wanted, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_several_bos_without_a_mask_are_an_error() -> None:
    rows = problem(
        {"batch": 1, "groups": 1, "repeats": 1, "queries": 12, "past": 0, "dim": 8, "mask": "causal", "magnitude": 1.0,
         "bos": "closed", "temperature": None, "slots": "", "seed": 0}, torch.float32
    )  # fmt: skip
    assert rows.column is not None
    two = rows.column._replace(is_bos_BS=torch.arange(12)[None] % 6 == 0)
    with pytest.raises(ValueError, match="packed sequences need a mask"):
        sdpa.attend(rows._replace(column=two))


def test_nan_stays_in_its_rows() -> None:
    q, k, v = (torch.randn(1, 2, 40, 8) for _ in range(3))
    q[0, 0, 3] = torch.nan
    rows = Rows(q, k, v, mask=None, causal=True, scale=0.3, column=column_of_first(1, 40, torch.zeros(1, 2, 40)))
    assert sdpa.attend(rows)[0].isnan().any(-1).nonzero().tolist() == [[0, 0, 3]]


def operands() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    shapes = (1, 4, 12, 8), (1, 2, 12, 8), (1, 2, 12, 8), (1, 4, 12), (1, 1, 4, 12), (1, 4, 8)
    return tuple(torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)


FIRST = (torch.arange(12) == 0)[None]


def both(q: Tensor, k: Tensor, v: Tensor, logit: Tensor, slot: Tensor, value: Tensor) -> Tensor:
    entropy = cpu_column.row_entropy(q, k, FIRST, logit, scale=0.3)
    return cpu_column.attend(q * entropy.unsqueeze(-1), k, v, FIRST, logit, Slots(slot, value), scale=0.3)[0]


def test_opcheck_finds_nothing() -> None:
    q, k, v, logit, slot, value = operands()
    for slots in ((None, None), (slot, None), (slot, value)):
        torch.library.opcheck(torch.ops.ropemods.attend_apart, (q, k, v, FIRST, logit, *slots, 0.3))
    torch.library.opcheck(torch.ops.ropemods.entropy_apart, (q, k, FIRST, logit, 0.3))


def test_compiled_whole_and_recomputed_it_gives_the_same_gradients() -> None:
    leaves = operands()
    wanted = torch.autograd.grad(both(*leaves).square().sum(), leaves)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for again in (compiled(*leaves), checkpoint(both, *leaves, use_reentrant=False)):
        for found, expected in zip(torch.autograd.grad(again.square().sum(), leaves), wanted, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
