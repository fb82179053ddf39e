"""Both fast paths against the oracle, over random shapes, masks and terms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ropemods.attention import eager, reference, sdpa
from ropemods.attention.rows import Rows, dot_with_bos, wide
from ropemods.attention.terms import Column, EntropyScale, KeyBias, OffsetBias, RowScale, Slot

PATHS = {"eager": eager, "sdpa": sdpa}

cases = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 2),
        "groups": st.sampled_from([1, 2]),
        "repeats": st.sampled_from([1, 2, 3]),
        "queries": st.integers(1, 14),  # on both sides of cpu_decode.ROWS
        "past": st.sampled_from([0, 0, 3]),
        "dim": st.sampled_from([2, 5, 8, 16]),
        "mask": st.sampled_from(["causal", "padded", "window", "additive"]),
        "magnitude": st.sampled_from([0.3, 1.0, 4.0]),
        "bos": st.sampled_from(["none", "rescored", "weighted", "closed"]),
        "temperature": st.sampled_from([None, "all", "spare"]),
        "scaled": st.sampled_from([None, "all", "spare"]),
        "slots": st.sampled_from(["", "sink", "row", "valued", "sink row valued"]),
        "seed": st.integers(0, 10**6),
    }
)


CASE = {
    "batch": 1, "groups": 1, "repeats": 2, "queries": 5, "past": 0, "dim": 8, "mask": "causal", "magnitude": 1.0,
    "bos": "none", "temperature": None, "slots": "", "seed": 0,
}  # fmt: skip


def problem(case: dict, dtype: torch.dtype) -> Rows:
    """Random inputs rounded to `dtype`."""
    generator = torch.Generator().manual_seed(case["seed"])

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    batch, groups, queries, dim = case["batch"], case["groups"], case["queries"], case["dim"]
    heads, keys = groups * case["repeats"], queries + case["past"]
    q = case["magnitude"] * normal(batch, heads, queries, dim)
    k, v = normal(batch, groups, keys, dim), normal(batch, groups, keys, dim)
    index = torch.arange(queries)[:, None] + case["past"]
    seen = (torch.arange(keys) <= index).expand(batch, queries, keys).clone()
    bos = torch.zeros(batch, queries, dtype=torch.long)
    if case["mask"] == "padded" and keys > 2:
        seen[0, :, :2] = False
        bos[0] = 2
    if case["mask"] == "window":
        seen &= torch.arange(keys) > index - 3
    causal = case["mask"] == "causal" and case["past"] == 0 and queries > 1
    mask = None if causal or (case["mask"] == "causal" and queries == 1) else seen[:, None]
    if mask is not None and case["mask"] in ("additive", "biased"):
        # Biased as ALiBi is, which the oracle here does not know: finite values among those that hide.
        values = normal(*mask.shape) if case["mask"] == "biased" else torch.zeros(mask.shape)
        mask = values.to(dtype).masked_fill(~mask, -torch.inf)
    scale = dim**-0.5
    k_bos = k.gather(2, bos[:, None, :, None].expand(batch, groups, queries, dim))
    logit = dot_with_bos(q, k_bos, scale) * (0.5 if case["bos"] != "none" else 1.0)
    weight = {"none": 1.0, "rescored": 1.0, "weighted": 0.3, "closed": 0.0}[case["bos"]]
    own = index.squeeze(1)[None] == bos
    column = Column(
        torch.zeros(batch, keys, dtype=torch.bool).scatter(1, bos, True),
        own,
        logit,
        torch.tensor(math.log(weight) if weight else -math.inf, dtype=torch.float64),
    )
    spare = case["temperature"] == "spare"
    rule = EntropyScale(torch.tensor([reference.PAPER], dtype=torch.float64), torch.tensor(1.0), None, spare)
    beta = 1 + 0.3 * normal(batch, heads, queries).to(wide(dtype))
    scale_of_rows = RowScale(beta, None if case.get("scaled") == "spare" else beta)
    slots = {
        "sink": Slot(normal(heads).to(wide(dtype))),
        "row": Slot(normal(batch, heads, queries).to(wide(dtype))),
        "valued": Slot(normal(batch, heads, queries).to(wide(dtype)), normal(heads, dim).to(wide(dtype))),
    }
    with_column = case["bos"] != "none" or spare
    return Rows(
        q,
        k,
        v,
        mask=mask,
        causal=causal,
        scale=scale,
        column=column if with_column else None,
        entropy_scale=rule if case["temperature"] else None,
        row_scale=scale_of_rows if case.get("scaled") else None,
        slots=tuple(slots[name] for name in case["slots"].split()),
    )


def grown(rows: Rows, dtype: torch.dtype) -> tuple[Rows, list[Tensor]]:
    """`rows` with what has gradients as leaves, in `dtype` or as wide as it is reasoned about in."""
    leaves: list[Tensor] = []

    def leaf(x: Tensor | None, to: torch.dtype | None = None) -> Tensor | None:
        if x is not None:
            leaves.append(x.detach().to(to or wide(dtype)).requires_grad_())
        return None if x is None else leaves[-1]

    q, k, v = (leaf(x, dtype) for x in rows[:3])
    slots = tuple(Slot(leaf(slot.logit), leaf(slot.value_HD)) for slot in rows.slots)
    if rows.row_scale is not None:
        beta = leaf(rows.row_scale.beta_BHT)
        rows = rows._replace(row_scale=RowScale(beta, None if rows.row_scale.column_BHT is None else beta))
    return rows._replace(q_BHTD=q, k_BGSD=k, v_BGSD=v, slots=slots), leaves


def with_gradients(rows: Rows, attend, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients, in fp64."""
    rows, leaves = grown(rows, dtype)
    out = attend(rows)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    grads = torch.autograd.grad((out.double() * weight).sum(), leaves)
    return [out.detach().double(), *[g.double() for g in grads]]


def widened(rows: Rows) -> Rows:
    return rows._replace(**{name: getattr(rows, name).double() for name in ("q_BHTD", "k_BGSD", "v_BGSD")})


def oracle(rows: Rows) -> list[Tensor]:
    return with_gradients(rows, reference.attention, torch.float64)


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=120, deadline=None)
@given(case=cases)
def test_fp64_output_and_gradients_equal_the_oracle(path: str, case: dict) -> None:
    rows = problem(case, torch.float64)
    found = with_gradients(rows, lambda r: PATHS[path].attend(r)[0], torch.float64)
    for actual, wanted in zip(found, oracle(rows), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bos", ["none", "rescored", "closed"])
@pytest.mark.parametrize("temperature", [None, "all", "spare"])
@pytest.mark.parametrize("slots", ["", "sink", "valued"])
def test_error_is_at_most_twice_that_of_stock_attention(path, dtype, bos, temperature, slots) -> None:
    """Root mean square over many rows; stock attention is given the same tempered and rescored logits to compute."""
    case = {
        "batch": 2, "groups": 2, "repeats": 2, "queries": 48, "past": 0, "dim": 16, "mask": "causal",
        "magnitude": 1.0, "bos": bos, "temperature": temperature, "slots": slots, "seed": 7,
    }  # fmt: skip
    rows = problem(case, dtype)
    with torch.no_grad():
        exact = reference.attention(widened(rows))
        found = PATHS[path].attend(rows)[0].double()
        # Stock attention whose queries are β times as long has logits, and so rounding, of the same size.
        beta = 1.0 if temperature is None else PATHS[path].tempered(rows).row_scale.beta_BHT.unsqueeze(-1)
        plain = Rows((rows.q_BHTD * beta).to(dtype), *rows[1:5], scale=rows.scale)
        stock = torch.nn.functional.scaled_dot_product_attention(*plain[:3], is_causal=True, enable_gqa=True)
        exact_stock = reference.attention(widened(plain)._replace(q_BHTD=rows.q_BHTD.double() * beta))
    error = (found - exact).pow(2).mean().sqrt()
    stock_error = (stock.double() - exact_stock).pow(2).mean().sqrt()
    assert error <= 2 * stock_error


@settings(max_examples=60, deadline=None)
@given(case=cases)
def test_biases_of_keys_and_offsets_equal_the_oracle(case: dict) -> None:
    rows = problem(case, torch.float64)
    generator = torch.Generator().manual_seed(case["seed"])
    heads, keys = rows.q_BHTD.shape[1], rows.k_BGSD.shape[2]
    shapes = (1, heads, keys), (heads, keys), (1, keys)
    c, a, m = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    rows = (
        rows.plus(KeyBias(c)).plus(KeyBias(c[:, :1])).plus(OffsetBias(1 + 0.2 * a, m)).plus(OffsetBias(1 - 0.1 * m, a))
    )
    found = with_gradients(rows, lambda r: eager.attend(r)[0], torch.float64)
    for actual, wanted in zip(found, oracle(rows), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)


def test_two_of_a_term_are_one() -> None:
    beta = torch.rand(2, 1, 2, 5)
    rows = problem(CASE, torch.float64)
    both = rows.plus(RowScale(beta[0], beta[0])).plus(RowScale(beta[1], None))
    assert torch.equal(both.row_scale.beta_BHT, beta[0] * beta[1]) and torch.equal(both.row_scale.column_BHT, beta[0])
    assert len(rows.plus(Slot(torch.zeros(2))).plus(Slot(torch.zeros(2))).slots) == 2


@pytest.mark.parametrize("path", PATHS)
def test_a_row_that_sees_nothing_gives_zeros_and_finite_gradients(path: str) -> None:
    q, k, v = (torch.randn(1, 2, 4, 8) for _ in range(3))
    mask = torch.ones(4, 4).tril().bool()
    mask[0] = False
    rule = EntropyScale(torch.tensor([reference.PAPER]), torch.tensor(1.0))
    rows = Rows(q, k, v, mask=mask[None, None], causal=False, scale=0.3, entropy_scale=rule)
    found = with_gradients(rows, lambda r: PATHS[path].attend(r)[0], torch.float32)
    assert found[0][:, :, 0].abs().max() == 0
    assert all(t.isfinite().all() for t in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_closed_column_stays_closed_beside_logits_of_minus_ten_thousand(dtype: torch.dtype) -> None:
    q, k = torch.full((1, 1, 3, 16), -100.0).to(dtype), torch.full((1, 1, 3, 16), 25.0).to(dtype)
    k[:, :, 0] = -25.0  # the BOS would have a logit of +1e4
    v = torch.tensor([1.0, 2.0, 2.0]).to(dtype)[None, None, :, None].expand(1, 1, 3, 16)
    first = torch.tensor([[True, False, False]])
    bos = Column(first, first, torch.full((1, 1, 3), 1e4), torch.tensor(-math.inf))
    out, _ = sdpa.attend(Rows(q, k, v, mask=None, causal=True, scale=0.25, column=bos))
    assert out[0, 0, :, 0].tolist() == [1.0, 2.0, 2.0]


def test_nan_stays_in_its_rows() -> None:
    # Longer than one vector of keys: below that, torch's own CPU kernel loses the NaN.
    q, k, v = (torch.randn(1, 2, 40, 8) for _ in range(3))
    q[0, 0, 3] = torch.nan
    rule = EntropyScale(torch.tensor([reference.PAPER]), torch.tensor(1.0))
    for path in PATHS.values():
        out = path.attend(Rows(q, k, v, mask=None, causal=True, scale=0.3, entropy_scale=rule))[0]
        assert out.isnan().any(-1).nonzero().tolist() == [[0, 0, 3]]
