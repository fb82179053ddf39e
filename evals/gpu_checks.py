"""Every kernel path on this machine against fp64, at sizes that models have.

A case is an attention call with a temperature, a sink and a BOS column, in one of the patterns that models ask for.
Output and gradients are compared with `eager` in fp64, and may be twice as far off as stock attention is in the same
dtype on the same pattern: its queries are β times as long, so that its logits and their rounding are as large.

Shapes: B batch, H query heads, G key/value heads, T queries, S keys, D head dim.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ropemods.attention import eager, paths, sdpa
from ropemods.attention.rows import Rows
from ropemods.attention.terms import Column, EntropyScale, Slot
from ropemods.mods.adaptive_temperature import PUBLISHED

PATTERNS = ("causal", "grouped", "window", "capped", "padded", "packed", "decode")
DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (64, 128, 256)


@dataclass(frozen=True, kw_only=True)
class Case:
    path: str
    pattern: str
    dtype: str
    head_dim: int
    length: int

    @property
    def name(self) -> str:
        return f"correct/{self.path}/{self.pattern}/{self.dtype}/{self.head_dim}"


def cases(able: tuple[str, ...], *, length: int, head_dims: tuple[int, ...] = HEAD_DIMS) -> list[Case]:
    """Those that the paths of this machine take; the widest heads in one dtype, since they take longest to compile."""
    made = itertools.product(able, PATTERNS, DTYPES, head_dims)
    return [
        Case(path=path, pattern=pattern, dtype=dtype, head_dim=dim, length=length)
        for path, pattern, dtype, dim in made
        if not (path in ("flash", "triton-rows") and pattern == "capped")  # stock kernels have no cap
        and not (dim > 128 and dtype != DTYPES[0])
    ]


def rows_of(case: Case, device: str) -> Rows:
    source = torch.Generator().manual_seed(case.length)
    dtype, length = getattr(torch, case.dtype), case.length
    queries = 1 if case.pattern == "decode" else length
    heads, groups = (8, 2) if case.pattern in ("grouped", "decode") else (4, 4)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source).to(device, dtype)

    q, k, v = normal(2, heads, queries, case.head_dim), *(normal(2, groups, length, case.head_dim) for _ in range(2))
    index = torch.arange(length, device=device)
    seen_TS = index[:, None] >= index
    bos_BT = torch.zeros(2, queries, dtype=torch.long, device=device)
    mask = None
    if case.pattern == "window":
        mask = (seen_TS & (index[:, None] - index < length // 3))[None, None].expand(2, 1, -1, -1)
    elif case.pattern == "padded":
        start_B = torch.tensor([0, length // 5], device=device)
        mask = seen_TS & (index >= start_B[:, None, None])
        mask = (mask | (index[:, None] == index))[:, None]  # padding sees itself, as in transformers
        bos_BT = start_B[:, None].expand(2, queries)
    elif case.pattern == "packed":
        segment = (index >= length // 3).long() + (index >= length // 2).long()
        mask = (seen_TS & (segment[:, None] == segment))[None, None].expand(2, 1, -1, -1)
        starts = torch.tensor([0, -(-length // 3), -(-length // 2)], device=device)
        bos_BT = starts[segment].expand(2, queries)
    position_T = index[-queries:]
    is_bos = torch.zeros(2, length, dtype=torch.bool, device=device).scatter(1, bos_BT, True)
    column = Column(
        is_bos_BS=is_bos,
        is_self_BT=position_T[None] == bos_BT,
        logit_BHT=torch.randn(2, heads, queries, generator=source).to(device),
        log_weight=torch.tensor(math.log(0.3), device=device),
    )
    rule = EntropyScale(torch.tensor([PUBLISHED], device=device), torch.tensor(1.0, device=device))
    return Rows(
        q,
        k,
        v,
        mask=mask,
        causal=mask is None and queries > 1,
        scale=case.head_dim**-0.5,
        softcap=20.0 if case.pattern == "capped" else None,
        column=column,
        entropy_scale=rule,
        slots=(Slot(torch.randn(heads, generator=source).to(device)),),
    )


def leaves_of(rows: Rows, dtype: torch.dtype) -> tuple[Rows, list[Tensor]]:
    """`rows` with q, k, v in another precision, and these as leaves with gradients."""
    made = [x.detach().to(dtype).requires_grad_() for x in rows[:3]]
    mask = rows.mask
    rest: dict[str, Any] = {}
    if dtype == torch.float64 and rows.column is not None:
        rest = {
            "column": rows.column._replace(logit_BHT=rows.column.logit_BHT.double()),
            "slots": tuple(slot._replace(logit=slot.logit.double()) for slot in rows.slots),
        }
    return rows._replace(q_BHTD=made[0], k_BGSD=made[1], v_BGSD=made[2], mask=mask, **rest), made


def everything(attend: Callable[[Rows], tuple[Tensor, ...]], rows: Rows, leaves: list[Tensor]) -> list[Tensor]:
    """Output and the gradients of q, k and v, in fp64."""
    out = attend(rows)[0]
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.device, out.dtype)
    return [x.detach().double() for x in (out, *torch.autograd.grad(out, leaves, d_out))]


def stock(rows: Rows) -> tuple[Tensor]:
    repeats = rows.q_BHTD.shape[1] // rows.k_BGSD.shape[1]
    k, v = (x.repeat_interleave(repeats, 1) for x in rows[1:3])
    attend = torch.nn.functional.scaled_dot_product_attention
    return (attend(rows.q_BHTD, k, v, attn_mask=rows.mask, is_causal=rows.causal, scale=rows.scale),)


def check(case: Case, device: str) -> dict[str, Any]:
    """The relative errors of output, dq, dk and dv, ours and stock's, and whether ours are at most twice stock's."""
    rows = rows_of(case, device)
    dtype = getattr(torch, case.dtype)
    exact, exact_leaves = leaves_of(rows, torch.float64)
    wanted = everything(eager.attend, exact, exact_leaves)
    resolved = eager.tempered(exact).row_scale
    assert resolved is not None
    beta = resolved.beta_BHT
    with paths.using(case.path):
        found = everything(lambda rows: sdpa.attend(rows), *leaves_of(rows, dtype))
    plain = Rows((rows.q_BHTD * beta.detach().unsqueeze(-1)).to(dtype), *rows[1:5], scale=rows.scale)
    by_stock = everything(stock, *leaves_of(plain, dtype))
    exact_stock = everything(eager.attend, *leaves_of(plain, torch.float64))
    ours = [error(x, y) for x, y in zip(found, wanted, strict=True)]
    theirs = [error(x, y) for x, y in zip(by_stock, exact_stock, strict=True)]
    return {"ours": ours, "stock": theirs, "holds": all(a <= 2 * b for a, b in zip(ours, theirs, strict=True))}


def error(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()
