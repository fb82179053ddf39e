"""What is measured: an attention call with each modification that acts on one, and stock attention to hold it against.

What changes a table or an embedding row is not here: the attention call is stock's.

Floors are in the matrix products of one causal call: stock attention has 2 forward and 5 backward. What each path has
beside them, or in their place, is written at `PRODUCTS`. In decoding, what counts is how often keys and values are
read, and every path reads them once.

Shapes: B batch, H query heads, G key/value heads, T queries, S keys, D head dim.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ropemods import clock
from ropemods.attention import capabilities, eager, paths, sdpa
from ropemods.attention.rows import Rows
from ropemods.mods import Mod, kinds
from ropemods.mods.base import Call, Layout, Site, Stage
from ropemods.mods.probe import rows_with

KINDS = ("forward", "training", "decode")
"""`training` is forward and backward; `decode` is one query that reads a cache."""
PATHS = (*paths.PATHS, "eager")
PRODUCTS: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "flash": ((2, 5), (4, 10)),
    "flex": ((2, 7), (4, 14)),
    "triton": ((2, 7), (3, 7)),
    "triton-rows": ((2, 5), (3, 9)),
}
"""Products forward and backward, without and with an entropy to read. Backwards without atomics read the queries'
side and the keys' side apart: 7 products, or 4 where there are no values. The fused kernel has one more forward where
a backward follows, for ∂O/∂β."""
STOCK_PRODUCTS = 2, 5


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Modifications at strength 1 on one path."""

    name: str
    mods: tuple[Mod, ...]
    terms: frozenset[str] = frozenset()
    """What they add to a row, as `Rows.names` has it."""

    @property
    def entropy(self) -> bool:
        """Whether a row's entropy has to be known before the row can be computed."""
        return "EntropyScale" in self.terms

    def floor(self, path: str, kind: str) -> float | None:
        """The least ratio that the mathematics allows on the kernels of this path; None where none is known."""
        if path == "eager":
            return None
        if kind == "decode" or not self.mods:
            return 1.0
        forward, backward = PRODUCTS[path][self.entropy]
        if kind == "forward":
            return forward / STOCK_PRODUCTS[0]
        return (forward + (path == "triton" and self.entropy) + backward) / sum(STOCK_PRODUCTS)


def subjects() -> tuple[Subject, ...]:
    """Stock attention against itself, and every modification that is known and acts on an attention call."""
    found = [Subject(name="stock again", mods=())]
    for kind in kinds().values():
        for name, mods in kind.timed().items():
            terms = rows_with(mods, head_dim=8, dtype=torch.float32).names()
            if terms:
                found.append(Subject(name=name, mods=mods, terms=frozenset(terms)))
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of one call. In decoding `length` is that of the cache."""

    length: int
    head_dim: int
    heads: int
    group_ratio: int
    """Query heads to a key/value head."""
    dtype: str

    def __post_init__(self) -> None:
        if min(self.length, self.head_dim, self.heads, self.group_ratio) < 1:
            raise ValueError(f"lengths, head dims, heads and group ratios must be 1 or more, not {self}")
        if self.heads % self.group_ratio:
            raise ValueError(
                f"{self.heads} heads cannot share key/value heads {self.group_ratio} at a time; "
                "--heads must be a multiple of every --group_ratios"
            )


class Problem:
    """Random inputs of one shape, and the calls that are timed on them."""

    def __init__(self, shape: Shape, kind: str, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        dtype, self.kind = getattr(torch, shape.dtype), kind
        self.site = Site(0, shape.heads, shape.head_dim, shape.heads * shape.head_dim, shape.head_dim)
        queries = 1 if kind == "decode" else shape.length

        def normal(heads: int, rows: int) -> Tensor:
            x = torch.randn(1, heads, rows, shape.head_dim, generator=generator)
            return x.to(device, dtype).requires_grad_(kind == "training")

        groups = shape.heads // shape.group_ratio
        self.q = normal(shape.heads, queries)
        self.k, self.v = normal(groups, shape.length), normal(groups, shape.length)
        self.d_out = torch.randn(self.q.shape, generator=generator).to(device, dtype)
        self.scale = shape.head_dim**-0.5
        frequencies = shape.head_dim // 2
        self.call = Call(
            bos_column_BN=torch.zeros(1, 1, dtype=torch.long, device=device),
            bos_distance_BT=torch.arange(shape.length, device=device)[None, -queries:],
            bos_is_self_BT=(torch.arange(shape.length, device=device) == 0)[None, -queries:],
            position_BT=torch.arange(shape.length, device=device)[None, -queries:],
            inv_freq_F=torch.logspace(0, -4, frequencies, device=device),
            layout=Layout(interleaved=False, start=0),
        )

    def stock(self) -> Callable[[], None]:
        """`scaled_dot_product_attention` on whichever kernel it picks, and on a GPU on the fastest for this call."""
        return self._step(self._attend if self.backend is None else partial(self._on, self.backend), [])

    @functools.cached_property
    def backend(self) -> SDPBackend | None:
        """The fastest of a GPU's kernels. None leaves the choice to torch."""
        if self.q.device.type != "cuda":
            return None
        times = {}
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            step = self._step(partial(self._on, backend), [])
            with contextlib.suppress(RuntimeError):  # a kernel that does not take this call
                step()
                times[backend] = min(clock.seconds(step, "cuda") for _ in range(3))
        return min(times, key=lambda each: times[each])

    def _on(self, backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return self._attend()

    def _attend(self) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            self.q,
            self.k,
            self.v,
            is_causal=self.kind != "decode",
            scale=self.scale,
            enable_gqa=self.q.shape[1] != self.k.shape[1],
        )

    def takes(self, subject: Subject, path: str) -> bool:
        """Whether the path can compute it; stock attention has no eager form here."""
        if not subject.mods:
            return path != "eager"
        return capabilities.limit(path, self._rows(self._stages(subject)), self.q.device.type) is None

    def _stages(self, subject: Subject) -> list[Stage]:
        stages = [stage for mod in subject.mods if (stage := mod.stage(self.site)) is not None]
        for stage in stages:
            stage.to(self.q.device).set_strength(1.0)
        return stages

    def _rows(self, stages: list[Stage]) -> Rows:
        rows = Rows(self.q, self.k, self.v, mask=None, causal=self.kind != "decode", scale=self.scale)
        for stage in stages:
            rows = stage(rows, self.call)
        return rows

    def modified(self, subject: Subject, path: str) -> Callable[[], None]:
        if not subject.mods:
            return self.stock()
        stages = self._stages(subject)
        parameters = [parameter for stage in stages for parameter in stage.parameters()]
        backend = eager if path == "eager" else sdpa

        def attend() -> Tensor:
            rows = self._rows(stages)
            with contextlib.nullcontext() if path == "eager" else paths.using(path):
                return backend.attend(rows)[0]

        return self._step(attend, parameters)

    def _step(self, attend: Callable[[], Tensor], parameters: list[Tensor]) -> Callable[[], None]:
        leaves = [self.q, self.k, self.v, *parameters]

        def step() -> None:
            if self.kind == "training":
                torch.autograd.grad(attend(), leaves, self.d_out)
            else:
                with torch.no_grad():
                    attend()

        return step
