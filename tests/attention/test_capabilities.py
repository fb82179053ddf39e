"""The table of what each path can compute is true: what it refuses has a way out, and what it allows runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ropemods.attention import capabilities, eager, flex, paths, sdpa
from ropemods.attention.capabilities import ASKED, LIMITS, PATHS
from ropemods.attention.reference import PAPER
from ropemods.attention.rows import Rows
from ropemods.attention.terms import Column, EntropyScale, KeyBias, OffsetBias, RowScale, Slot
from tests.attention.test_paths import CPU

REPOSITORY = Path(__file__).resolve().parents[2]
BATCH, HEADS, TOKENS, DIM = 1, 2, 5, 16
FIRST = torch.arange(TOKENS)[None] == 0


def plain(grown: bool = False) -> Rows:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(BATCH, HEADS, TOKENS, DIM, generator=generator).requires_grad_(grown) for _ in range(3))
    return Rows(q, k, v, mask=None, causal=True, scale=DIM**-0.5)


def added_mask(grown: bool) -> torch.Tensor:
    hidden = torch.ones(TOKENS, TOKENS).triu(1).bool()
    return torch.zeros(1, 1, TOKENS, TOKENS).masked_fill(hidden, -torch.inf).requires_grad_(grown)


def numbers(*shape: int) -> torch.Tensor:
    return torch.linspace(0.5, 1.5, torch.Size(shape).numel()).view(shape)


ASK: dict[str, Callable[[Rows], Rows]] = {
    "row scale": lambda rows: rows.plus(RowScale(numbers(BATCH, HEADS, TOKENS), None)),
    "entropy scale": lambda rows: rows.plus(EntropyScale(torch.tensor([PAPER]), torch.tensor(1.0))),
    "column": lambda rows: rows.plus(Column(FIRST, FIRST, numbers(BATCH, HEADS, TOKENS), torch.tensor(-0.3))),
    "slot": lambda rows: rows.plus(Slot(numbers(HEADS))),
    "slot by row": lambda rows: rows.plus(Slot(numbers(BATCH, HEADS, TOKENS), numbers(HEADS, rows.v_BGSD.shape[3]))),
    "key bias": lambda rows: rows.plus(KeyBias(numbers(BATCH, HEADS, TOKENS))),
    "offset bias": lambda rows: rows.plus(OffsetBias(numbers(1, TOKENS), numbers(HEADS, TOKENS))),
    "soft cap": lambda rows: rows._replace(softcap=2.0),
    "dropout": lambda rows: rows._replace(dropout=0.1),
    "gradients": lambda rows: rows._replace(q_BHTD=rows.q_BHTD.detach().requires_grad_()),
    "gradient of the mask": lambda rows: rows._replace(mask=added_mask(True), causal=False),
    "fp64 or mixed": lambda rows: rows._replace(q_BHTD=rows.q_BHTD.double()),
    "wide heads": lambda rows: rows._replace(**{x: getattr(rows, x).repeat(1, 1, 1, 17) for x in rows._fields[:3]}),
    "wide values": lambda rows: rows._replace(v_BGSD=torch.cat((rows.v_BGSD, rows.v_BGSD), -1)),
    "CPU": lambda rows: rows,
    "CUDA": lambda rows: rows,
    "another device": lambda rows: rows,
}
TERMS = [name for name in ASK if name not in ("CPU", "CUDA", "another device", "gradients", "gradient of the mask")]


def asking(*names: str) -> Rows:
    rows = plain()
    for name in names:
        rows = ASK[name](rows)
    return rows


def device_of(names: tuple[str, ...], otherwise: str) -> str:
    places = {"CPU": "cpu", "CUDA": "cuda", "another device": "xpu"}
    return next((places[name] for name in names if name in places), otherwise)


def test_each_thing_is_asked_for_in_one_way() -> None:
    assert set(ASK) == set(ASKED)


@pytest.mark.parametrize("limit", LIMITS, ids=lambda each: f"{each.paths[-1]}: {' + '.join(each.together)}")
def test_a_limit_is_what_it_says_and_nothing_less(limit) -> None:
    elsewhere = "cpu" if "CUDA" in limit.together else "cuda"
    device = device_of(limit.together, elsewhere)
    for path in limit.paths:
        rows = asking(*limit.together)
        found = capabilities.limit(path, rows, device)
        assert found is not None and set(found.together) <= set(limit.together)
        said = capabilities.refusal(path, limit, rows, CPU)
        assert "attn_implementation='eager'" in said and capabilities.limit("eager", rows, device) is None
        proposed = {other for other in paths.PATHS if f"{paths.VARIABLE}={other}" in said.partition("on CUDA set")[0]}
        assert all(capabilities.limit(other, rows, "cpu") is None for other in proposed - {path})
        for left_out in limit.together:
            rest = tuple(name for name in limit.together if name != left_out)
            assert capabilities.limit(path, asking(*rest), device_of(rest, elsewhere)) is not limit


@pytest.mark.parametrize("path", [path for path in PATHS if path != "eager"])
@pytest.mark.parametrize("names", [*itertools.combinations(TERMS, 1), *itertools.combinations(TERMS, 2)], ids="+".join)
def test_what_no_limit_names_runs_and_what_one_names_is_refused(
    path: str, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every pair of terms, on every path that a CPU can be made to run."""
    rows = asking(*sorted(names, key=lambda name: "wide" not in name))
    if "fp64 or mixed" in names:
        rows = rows._replace(k_BGSD=rows.k_BGSD.double(), v_BGSD=rows.v_BGSD.double())
    if path.startswith("triton"):
        pytest.importorskip("triton")
    monkeypatch.setenv(paths.VARIABLE, path)
    if path == "flex":  # uncompiled, since torch does not compile it for CPUs
        monkeypatch.setattr(paths, "obstacle", lambda path, device: None)
        monkeypatch.setattr(flex, "_compiled", lambda: flex.torch_flex.flex_attention)
        torch._dynamo.reset()  # it traces all the same, and trips over what it kept of score functions that are gone
    if capabilities.limit(path, rows, "cpu") is not None:
        with pytest.raises(ValueError, match=r"was asked for on .* attn_implementation='eager'"):
            sdpa.attend(rows)
        return
    with torch.no_grad():
        found, wanted = sdpa.attend(rows)[0], eager.attend(rows)[0]
    assert found.shape == wanted.shape and bool(torch.isfinite(found).all())
    if "dropout" not in names:  # eager is given none here, and others draw at random
        torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-4)


def test_a_mask_that_is_trained_beside_a_sink_is_refused_where_it_would_get_no_gradient() -> None:
    rows = asking("slot", "gradient of the mask")
    with pytest.raises(ValueError, match=r"a slot .* beside a gradient of the mask .* attn_implementation='eager'"):
        sdpa.attend(rows)
    eager.attend(rows)[0].sum().backward()
    assert rows.mask is not None and rows.mask.grad is not None


def test_a_backward_of_flex_attention_on_a_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gradients on a CPU .* no backward on a CPU.*ROPEMODS_KERNEL=flash"):
        capabilities.check("flex", asking("gradients"))


def test_the_readme_has_the_table() -> None:
    head, *lines = capabilities.table()
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))
    assert table in (REPOSITORY / "README.md").read_text(encoding="utf-8"), f"README.md is to have\n{table}"
