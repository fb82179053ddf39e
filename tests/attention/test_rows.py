"""Both fast paths against the oracle, over random shapes, masks and terms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ropemods.attention import eager, reference, sdpa
from ropemods.attention.rows import BosColumn, Rows, Temperature, dot_with_bos, wide

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
        "sink": st.booleans(),
        "seed": st.integers(0, 10**6),
    }
)


def problem(case: dict, dtype: torch.dtype) -> tuple[Rows, dict]:
    """Random inputs rounded to `dtype`, and what the oracle wants to know of them."""
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
    column = BosColumn(
        torch.zeros(batch, keys, dtype=torch.bool).scatter(1, bos, True),
        own,
        logit,
        torch.tensor(math.log(weight) if weight else -math.inf, dtype=torch.float64),
    )
    spare = case["temperature"] == "spare"
    rule = Temperature(torch.tensor([reference.PAPER], dtype=torch.float64), torch.tensor(1.0), None, spare)
    sink = normal(heads).to(wide(dtype)) if case["sink"] else None
    with_column = case["bos"] != "none" or spare
    rows = Rows(
        q,
        k,
        v,
        mask=mask,
        causal=causal,
        scale=scale,
        bos=column if with_column else None,
        temperature=rule if case["temperature"] else None,
        sink_H=sink,
    )
    asked = {
        "visible_BTS": seen,
        "scale": scale,
        "bos_BT": bos if with_column else None,
        "bos_logit_BHT": logit.double() if with_column else None,
        "bos_weight_BT": torch.where(own, 1.0, torch.tensor(weight, dtype=torch.float64)) if with_column else None,
        "sink_H": None if sink is None else sink.double(),
        "temperature_rule": reference.temperature if case["temperature"] else None,
        "spare_bos": spare,
    }
    return rows, asked


def with_gradients(rows: Rows, attend, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients for q, k, v and the sink, in fp64."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in rows[:3]]
    sink = None if rows.sink_H is None else rows.sink_H.detach().to(wide(dtype)).requires_grad_()
    out = attend(rows._replace(q_BHTD=leaves[0], k_BGSD=leaves[1], v_BGSD=leaves[2], sink_H=sink))
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    wanted = [*leaves, *([] if sink is None else [sink])]
    grads = torch.autograd.grad((out.double() * weight).sum(), wanted)
    return [out.detach().double(), *[g.double() for g in grads]]


def oracle(rows: Rows, asked: dict) -> list[Tensor]:
    def attend(wide_rows: Rows) -> Tensor:
        sink = {} if wide_rows.sink_H is None else {"sink_H": wide_rows.sink_H}
        return reference.attention(*wide_rows[:3], **(asked | sink))

    return with_gradients(rows, attend, torch.float64)


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=120, deadline=None)
@given(case=cases)
def test_fp64_output_and_gradients_equal_the_oracle(path: str, case: dict) -> None:
    rows, asked = problem(case, torch.float64)
    found = with_gradients(rows, lambda r: PATHS[path].attend(r)[0], torch.float64)
    for actual, wanted in zip(found, oracle(rows, asked), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bos", ["none", "rescored", "closed"])
@pytest.mark.parametrize("temperature", [None, "all", "spare"])
@pytest.mark.parametrize("sink", [False, True])
def test_error_is_at_most_twice_that_of_stock_attention(path, dtype, bos, temperature, sink) -> None:
    """Root mean square over many rows; stock attention is given the same tempered and rescored logits to compute."""
    case = {
        "batch": 2, "groups": 2, "repeats": 2, "queries": 48, "past": 0, "dim": 16, "mask": "causal",
        "magnitude": 1.0, "bos": bos, "temperature": temperature, "sink": sink, "seed": 7,
    }  # fmt: skip
    rows, asked = problem(case, dtype)
    with torch.no_grad():
        exact = reference.attention(*(t.double() for t in rows[:3]), **asked)
        found = PATHS[path].attend(rows)[0].double()
        # Stock attention whose queries are β times as long has logits, and so rounding, of the same size.
        beta = 1.0 if temperature is None else PATHS[path].tempered(rows).beta_BHT.unsqueeze(-1)
        q = (rows.q_BHTD * beta).to(dtype)
        stock = torch.nn.functional.scaled_dot_product_attention(
            q, rows.k_BGSD, rows.v_BGSD, is_causal=True, enable_gqa=True
        )
        exact_stock = reference.attention(
            (rows.q_BHTD.double() * beta), rows.k_BGSD.double(), rows.v_BGSD.double(),
            visible_BTS=asked["visible_BTS"], scale=rows.scale,
        )  # fmt: skip
    error = (found - exact).pow(2).mean().sqrt()
    stock_error = (stock.double() - exact_stock).pow(2).mean().sqrt()
    assert error <= 2 * stock_error


@pytest.mark.parametrize("path", PATHS)
def test_a_row_that_sees_nothing_gives_zeros_and_finite_gradients(path: str) -> None:
    q, k, v = (torch.randn(1, 2, 4, 8) for _ in range(3))
    mask = torch.ones(4, 4).tril().bool()
    mask[0] = False
    rule = Temperature(torch.tensor([reference.PAPER]), torch.tensor(1.0), None, False)
    rows = Rows(q, k, v, mask=mask[None, None], causal=False, scale=0.3, temperature=rule)
    found = with_gradients(rows, lambda r: PATHS[path].attend(r)[0], torch.float32)
    assert found[0][:, :, 0].abs().max() == 0
    assert all(t.isfinite().all() for t in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_closed_column_stays_closed_beside_logits_of_minus_ten_thousand(dtype: torch.dtype) -> None:
    q, k = torch.full((1, 1, 3, 16), -100.0).to(dtype), torch.full((1, 1, 3, 16), 25.0).to(dtype)
    k[:, :, 0] = -25.0  # the BOS would have a logit of +1e4
    v = torch.tensor([1.0, 2.0, 2.0]).to(dtype)[None, None, :, None].expand(1, 1, 3, 16)
    first = torch.tensor([[True, False, False]])
    bos = BosColumn(first, first, torch.full((1, 1, 3), 1e4), torch.tensor(-math.inf))
    out, _ = sdpa.attend(Rows(q, k, v, mask=None, causal=True, scale=0.25, bos=bos))
    assert out[0, 0, :, 0].tolist() == [1.0, 2.0, 2.0]


def test_nan_stays_in_its_rows() -> None:
    # Longer than one vector of keys: below that, torch's own CPU kernel loses the NaN.
    q, k, v = (torch.randn(1, 2, 40, 8) for _ in range(3))
    q[0, 0, 3] = torch.nan
    rule = Temperature(torch.tensor([reference.PAPER]), torch.tensor(1.0), None, False)
    for path in PATHS.values():
        out = path.attend(Rows(q, k, v, mask=None, causal=True, scale=0.3, temperature=rule))[0]
        assert out.isnan().any(-1).nonzero().tolist() == [[0, 0, 3]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"softcap": 5.0}, "soft cap .* attn_implementation='eager'"),
        ({"dropout": 0.1, "sink_H": torch.zeros(2)}, "attention_dropout = 0"),
    ],
)
def test_what_the_fused_path_cannot_do_names_what_can(change: dict, message: str) -> None:
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    with pytest.raises(ValueError, match=message):
        sdpa.attend(Rows(q, k, v, mask=None, causal=True, scale=0.3)._replace(**change))
