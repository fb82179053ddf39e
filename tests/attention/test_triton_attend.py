"""The fused kernels: every row and gradient against the fp64 oracle, and never twice as far off as stock attention.

Compiled where there is a GPU, in Triton's interpreter where there is none.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from ropemods.attention import eager
from ropemods.attention.rows import Rows
from ropemods.attention.terms import RowScale, Slot
from ropemods.attention.triton import launch, path
from ropemods.attention.triton.attend import attend
from ropemods.attention.triton.blocks import Blocks
from ropemods.attention.triton.launch import Column, Rule
from ropemods.attention.triton.spans import packed_spans, spans
from tests.attention.test_rows import problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Blocks(32, 16)

cases = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 2),
        "groups": st.sampled_from([1, 2]),
        "repeats": st.sampled_from([1, 2]),
        "queries": st.integers(1, 35),
        "past": st.sampled_from([0, 0, 3]),
        "dim": st.sampled_from([2, 16, 20]),
        "mask": st.sampled_from(["causal", "padded", "window", "additive"]),
        "magnitude": st.sampled_from([0.3, 1.0, 4.0]),
        "bos": st.sampled_from(["none", "rescored", "weighted", "closed"]),
        "temperature": st.sampled_from([None, "all", "spare"]),
        "slots": st.sampled_from(["", "sink", "sink row", "valued", "row valued valued"]),
        "seed": st.integers(0, 10**6),
    }
)


def moved(rows: Rows, dtype: torch.dtype, device: str = DEVICE) -> tuple[Rows, list[Tensor]]:
    """`rows` in another precision, and everything in them that has a gradient."""

    def leaf(x: Tensor | None, to: torch.dtype = dtype) -> Tensor | None:
        return None if x is None else x.detach().to(device, to).requires_grad_()

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v = leaf(rows.q_BHTD), leaf(rows.k_BGSD), leaf(rows.v_BGSD)
    slots = tuple(Slot(leaf(slot.logit, wide), leaf(slot.value_HD, wide)) for slot in rows.slots)
    bos, rule, beta = rows.column, rows.entropy_scale, leaf(rows.row_scale and rows.row_scale.beta_BHT, wide)
    if bos is not None:
        logit = leaf(bos.logit_BHT, wide)
        bos = bos._replace(is_bos_BS=bos.is_bos_BS.to(device), is_self_BT=bos.is_self_BT.to(device), logit_BHT=logit)
        bos = bos._replace(log_weight=bos.log_weight.to(device))
    if rule is not None:
        coefficients = rule.coefficients_HC.expand(rows.q_BHTD.shape[1], -1).contiguous()
        rule = rule._replace(coefficients_HC=leaf(coefficients, wide), strength=rule.strength.to(device))
    mask = rows.mask
    if mask is not None:
        mask = mask.to(device) if mask.dtype == torch.bool else mask.to(device, dtype)
    assert q is not None and k is not None and v is not None
    result = rows._replace(q_BHTD=q, k_BGSD=k, v_BGSD=v, mask=mask, column=bos, entropy_scale=rule, slots=slots)
    if rows.row_scale is not None:
        result = result._replace(row_scale=RowScale(beta, None if rows.row_scale.column_BHT is None else beta))
    grown = [q, k, v, *itertools.chain(*slots), beta, bos and bos.logit_BHT, rule and rule.coefficients_HC]
    return result, [x for x in grown if x is not None]


def everything(function, rows: Rows, leaves: list[Tensor]) -> list[Tensor]:
    """The output and every gradient, in fp64."""
    out = function(rows)[0]
    generator = torch.Generator().manual_seed(0)
    d_out = torch.randn(out.shape, generator=generator).to(out.device, out.dtype)
    grads = torch.autograd.grad(out, leaves, d_out, allow_unused=True)
    return [
        out.detach().double(),
        *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)),
    ]


def assert_equal(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for actual, expected in zip(found, wanted, strict=True):
        size = expected.abs().max().item() + 1
        assert (actual.double() - expected.to(actual.device)).abs().max().item() <= tolerance * size


@settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.generate])
@given(case=cases, softcap=st.sampled_from([None, None, 3.0]), known=st.booleans())
def test_output_and_every_gradient_equal_fp64(case: dict, softcap: float | None, known: bool) -> None:
    """Against `eager` in fp64, which test_rows holds against the oracle; it has gradients for every term."""
    rows = problem(case, torch.float32)
    rows = rows._replace(softcap=softcap)
    if known:
        rows = eager.tempered(rows)
    ours, leaves = moved(rows, torch.float32)
    exact, wide_leaves = moved(rows, torch.float64)
    # Rounding of a logit as large as these is multiplied by the temperature and once more by the cap.
    assert_equal(everything(path.attend, ours, leaves), everything(eager.attend, exact, wide_leaves), 2e-5)


@settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.generate])
@given(case=cases, parts=st.integers(2, 4), queries=st.integers(1, 4), past=st.sampled_from([0, 12, 70]))
def test_split_over_the_keys_it_is_the_same(case: dict, parts: int, queries: int, past: int) -> None:
    rows = problem(case | {"queries": queries, "past": past}, torch.float32)
    ours, leaves = moved(rows, torch.float32)
    exact, wide_leaves = moved(rows, torch.float64)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(launch, "parts", lambda q, k: parts)
        found = everything(path.attend, ours, leaves)
    assert_equal(found, everything(eager.attend, exact, wide_leaves), 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "parts"), [("plain", 1), ("all", 1), ("spare", 1), ("spare", 3)])
def test_error_is_at_most_twice_that_of_stock_attention(dtype: torch.dtype, kind: str, parts: int) -> None:
    """Gradients too. Stock attention is given queries β times as long: logits, and so rounding, of the same size."""
    case = {
        "batch": 1, "groups": 2, "repeats": 2, "queries": 48, "past": 0, "dim": 16, "mask": "causal", "magnitude": 1.0,
        "bos": "none" if kind != "spare" else "closed", "temperature": None if kind == "plain" else kind,
        "slots": "" if kind == "plain" else "sink", "seed": 7,
    }  # fmt: skip
    rows = problem(case, dtype)
    exact_rows, wide_leaves = moved(rows, torch.float64)
    ours, leaves = moved(rows, dtype)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(launch, "parts", lambda q, k: parts)
        found = everything(path.attend, ours, leaves)
    wanted = everything(eager.attend, exact_rows, wide_leaves)
    beta = 1.0 if rows.entropy_scale is None else eager.tempered(exact_rows).row_scale.beta_BHT.detach().unsqueeze(-1)
    plain = Rows((rows.q_BHTD.to(DEVICE) * beta).to(dtype), *rows[1:3], mask=None, causal=True, scale=rows.scale)
    stock_rows, stock_leaves = moved(plain, dtype)
    exact_stock_rows, wide_stock_leaves = moved(plain, torch.float64)

    def stock(rows: Rows) -> tuple[Tensor]:
        k, v = (x.repeat_interleave(2, 1) for x in rows[1:3])
        return (torch.nn.functional.scaled_dot_product_attention(rows[0], k, v, is_causal=True, scale=rows.scale),)

    by_stock = everything(stock, stock_rows, stock_leaves)
    exact_stock = everything(eager_causal, exact_stock_rows, wide_stock_leaves)
    # Relative to their size, since a temperature makes gradients larger.
    for index in range(4):
        assert relative(found[index], wanted[index]) <= 2 * relative(by_stock[index], exact_stock[index]), index


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm()).item()


def eager_causal(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    return eager.attend(rows)


@pytest.mark.parametrize(("dim", "value_dim"), [(16, 16), (80, 80), (256, 256), (48, 24)])
def test_head_dims_to_256_at_the_default_blocks(dim: int, value_dim: int) -> None:
    generator = torch.Generator().manual_seed(dim)
    shapes = (1, 1, 40, dim), (1, 1, 40, dim), (1, 1, 40, value_dim)
    rows = Rows(*(torch.randn(s, generator=generator) for s in shapes), mask=None, causal=True, scale=dim**-0.5)
    ours, leaves = moved(rows, torch.float32)
    exact, wide_leaves = moved(rows, torch.float64)
    assert_equal(everything(path.attend, ours, leaves), everything(eager.attend, exact, wide_leaves), 2e-5)


def inputs(heads: int, groups: int, queries: int, keys: int, dim: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(queries)
    shapes = (1, heads, queries, dim), (1, groups, keys, dim), (1, groups, keys, dim)
    q, k, v = (torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes)
    return q, k, v


PAPER = torch.tensor([-0.037, 0.481, -2.3, 4.917, -1.791], device=DEVICE)


def rule(heads: int) -> Rule:
    return Rule(PAPER.expand(heads, -1).contiguous(), torch.tensor(1.0, device=DEVICE), float("inf"))


def test_packed_sequences_are_rows_of_their_own() -> None:
    lengths = [5, 1, 19, 8]
    q, k, v = inputs(2, 1, 33, 33)
    found = attend(q, k, v, packed_spans(lengths, device=DEVICE), scale=0.25, rule=rule(2), blocks=SMALL).out
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        own = spans(length, length, device=DEVICE)
        alone = attend(q[:, :, part], k[:, :, part], v[:, :, part], own, scale=0.25, rule=rule(2), blocks=SMALL).out
        torch.testing.assert_close(found[:, :, part], alone, rtol=1e-6, atol=1e-6)
        start += length


@pytest.mark.parametrize("parts", [1, 2])
def test_rows_that_see_nothing_are_zero_and_have_no_gradient(parts: int) -> None:
    q, k, v = (x.requires_grad_() for x in inputs(2, 1, 20, 32))
    where = spans(20, 32, offset=12, first_key_B=torch.tensor([18], device=DEVICE), device=DEVICE)
    found = attend(q, k, v, where, scale=0.25, rule=rule(2), blocks=SMALL, parts=parts)
    grads = torch.autograd.grad(found.out.sum(), (q, k, v))
    assert (found.out[:, :, :6] == 0).all() and (found.log_z[:, :, :6] == float("-inf")).all()
    assert (grads[0][:, :, :6] == 0).all() and all((g[:, :, :18] == 0).all() for g in grads[1:])
    assert all(x.isfinite().all() for x in (found.out, *grads)) and found.out[:, :, 6:].abs().min() > 0


@pytest.mark.parametrize("parts", [1, 2])
def test_nan_stays_in_its_row(parts: int) -> None:
    q, k, v = inputs(2, 1, 20, 32)
    q[0, 1, 4] = torch.nan
    q.requires_grad_()
    where = spans(20, 32, offset=12, device=DEVICE)
    found = attend(q, k, v, where, scale=0.25, rule=rule(2), blocks=SMALL, parts=parts)
    assert found.out.isnan().any(-1).nonzero().tolist() == [[0, 1, 4]]
    (dq,) = torch.autograd.grad(found.out.sum(), q)
    assert dq.isnan().any(-1).nonzero().tolist() == [[0, 1, 4]]


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("parts", [1, 2])
def test_logits_of_ten_thousand_neither_overflow_nor_blur(sign: int, parts: int) -> None:
    q = torch.full((1, 1, 1, 16), 100.0, device=DEVICE, requires_grad=True)
    k = torch.full((1, 1, 40, 16), sign * 25.0, device=DEVICE)
    k[:, :, 8:, 0] -= 1e-2  # 32 of the 40 keys have logits of 0.25 less than the other 8
    v = torch.linspace(-1, 1, 40, device=DEVICE)[None, None, :, None].expand(1, 1, 40, 16)
    everyone = spans(1, 40, causal=False, device=DEVICE)
    beta = torch.full((1, 1, 1), 1.5, device=DEVICE, requires_grad=True)
    found = attend(q, k, v, everyone, scale=0.25, beta_BHT=beta, blocks=SMALL, parts=parts)
    (d_beta,) = torch.autograd.grad(found.out[0, 0, 0, 0], beta)
    s = torch.tensor([0.0] * 8 + [-0.25] * 32, dtype=torch.float64)
    x = v[0, 0, :, 0].double().cpu()
    p = (1.5 * s).softmax(0)
    # What is left is the rounding of the logits themselves, 2^-10 at 1e4, times β.
    assert abs(found.out[0, 0, 0, 0].item() - (p * x).sum().item()) <= 2**-9
    assert abs(d_beta.item() - ((p * s * x).sum() - (p * s).sum() * (p * x).sum()).item()) <= 2**-9


def test_one_key_leaves_nothing_to_choose() -> None:
    q, k, v = inputs(2, 2, 1, 1)
    found = attend(q, k, v, spans(1, 1, device=DEVICE), scale=0.25, rule=rule(2), blocks=SMALL)
    torch.testing.assert_close(found.out, v, rtol=1e-6, atol=1e-6)
    assert (found.entropy == 0).all() and (found.beta == 1).all()


def test_the_same_input_gives_the_same_bits() -> None:
    case = {
        "batch": 1, "groups": 1, "repeats": 2, "queries": 40, "past": 0, "dim": 16, "mask": "causal", "magnitude": 1.0,
        "bos": "rescored", "temperature": "all", "slots": "sink", "seed": 5,
    }  # fmt: skip
    ours, leaves = moved(problem(case, torch.bfloat16), torch.bfloat16)
    runs = [everything(path.attend, ours, leaves) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def operands(given: str, parts: int) -> tuple:
    q, k, v = (x.requires_grad_() for x in inputs(2, 1, 4, 4))
    numbers = torch.randn(1, 2, 4, device=DEVICE)
    column = Column(None, None, None, None)
    read = Rule(None, None, float("inf"))
    beta = slot_logit = slot_value = mask = None
    if given == "everything":
        weight = torch.zeros(1, 4, device=DEVICE)
        is_bos = torch.tensor([[1, 0, 0, 0]], dtype=torch.uint8, device=DEVICE)
        column = Column(is_bos, numbers.clone().requires_grad_(), weight, weight.clone())
        read = rule(2)
        read.coefficients_HC.requires_grad_()
        slot_logit = torch.zeros(2, 1, 2, 4, device=DEVICE, requires_grad=True)
        slot_value = torch.ones(2, 2, 16, device=DEVICE, requires_grad=True)
        mask = torch.ones(1, 2, 4, 4, dtype=torch.bool, device=DEVICE).tril()
    elif given == "beta":
        beta = (1 + numbers.abs()).requires_grad_()
    where = spans(4, 4, device=DEVICE)
    return q, k, v, *where, mask, *column, 0.25, 0.0, False, slot_logit, slot_value, *read, beta, True, parts, 16, 16


@pytest.mark.parametrize("given", ["nothing", "everything", "beta"])
@pytest.mark.parametrize("parts", [1, 2])
def test_opcheck_finds_nothing(given: str, parts: int) -> None:
    torch.library.opcheck(torch.ops.ropemods.attend_rows, operands(given, parts))


def tempered(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v, spans(9, 9, device=DEVICE), scale=0.3, rule=rule(2), blocks=SMALL).out


def test_compiled_whole_and_recomputed_it_gives_the_same_gradients() -> None:
    leaves = [x.requires_grad_() for x in inputs(2, 1, 9, 9)]
    wanted = torch.autograd.grad(tempered(*leaves).square().sum(), leaves)
    compiled = torch.compile(tempered, fullgraph=True, backend="aot_eager")
    again = [
        torch.autograd.grad(compiled(*leaves).square().sum(), leaves),
        torch.autograd.grad(checkpoint(tempered, *leaves, use_reentrant=False).square().sum(), leaves),
    ]
    for grads in again:
        for found, expected in zip(grads, wanted, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_few_queries_and_many_keys_are_split_and_nothing_else_is() -> None:
    def choice(heads: int, groups: int, queries: int, keys: int) -> int:
        return launch.parts(torch.empty(1, heads, queries, 64), torch.empty(1, groups, keys, 64))

    assert choice(32, 8, 1, 8192) == 32 and choice(32, 8, 1, 100) == 1
    assert choice(32, 8, 512, 8192) == 1 and choice(8, 8, 4, 4096) > 1


def test_inference_keeps_nothing_for_a_backward() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(2, 1, 9, 9))
    where = spans(9, 9, device=DEVICE)
    assert attend(q, k, v, where, scale=0.3, rule=rule(2)).slope.shape == q.shape
    with torch.no_grad():
        assert attend(q, k, v, where, scale=0.3, rule=rule(2)).slope.numel() == 0
    assert attend(q, k, v, where, scale=0.3).slope.numel() == 0
