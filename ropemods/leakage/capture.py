"""One streaming pass: the model reads crops, its attention is observed, and running sums are kept.

    with observing(model) as observation:
        sums = capture(observation, crops, protocol)

Nothing that grows with T² is made, and nothing is kept of a batch but its sums, so memory is O(T) a head. Where whole
rows are read (the grid), a batch is taken in parts that bound the working memory.

Every rank runs the same number of forward passes, filled up with sequences that count for nothing, because a model that
is spread over ranks needs all of them in each.

Shapes: B batch, H query heads, T queries, S keys, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ropemods.attention.rows import Rows
from ropemods.leakage import reading
from ropemods.leakage.crops import Crops
from ropemods.leakage.progress_bar import progress_bar
from ropemods.leakage.protocol import Protocol
from ropemods.leakage.sums import Sums
from ropemods.model.attention_function import observed
from ropemods.model.attention_layers import AttentionSite
from ropemods.model.non_finite import first_non_finite
from ropemods.model.observation import Observation
from ropemods.mods.base import Call, Layout

AT_ONCE = 1 << 20
"""Numbers in the grid rows that are worked on together: 4 MiB in float32, which caches hold better than a batch."""
LOGITS_AT_ONCE = 1 << 24
"""Vocabulary logits whose loss is taken together."""
ON_DEVICE = 1 << 30
"""Bytes of sums that are kept on an accelerator; more go to main memory."""


def ranks() -> tuple[int, int]:
    """(rank, world size); (0, 1) in a single process."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


class Observer:
    """Adds what each attention layer shows of a batch to the sums."""

    def __init__(
        self,
        observation: Observation,
        sums: Sums,
        *,
        everything: bool = True,
        change: Callable[[int, Rows, Tensor], Tensor | None] | None = None,
        reindex: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """`everything`: curves, grid rows and usage too; else residual and total alone.

        `change(layer, rows, lse)` may return what to add to the heads' output: an intervention. `reindex` may reorder
        the queries of the band: a control.
        """
        self.sums, self.protocol = sums, sums.protocol
        self.everything, self.change, self.reindex = everything, change, reindex
        self.layout = observation.layout
        self.tables = observation.tables
        self.order = {id(site): n for n, site in enumerate(observation.sites)}
        self.groups_B = torch.empty(0, dtype=torch.long)
        self.narrow: set[int] = set()
        self._checked: set[int] = set()
        self._pass: tuple[Tensor, set[int]] = self.groups_B, set()
        """A batch, and the layers that have read it."""

    def __call__(self, site: AttentionSite, rows: Rows, call: Call, lse_BHT: Tensor | None) -> Tensor | None:
        layer = self.order[id(site)]
        assert lse_BHT is not None
        if self._pass[0] is not self.groups_B:
            self._pass = self.groups_B, set()
        if layer in self._pass[1]:
            raise ValueError(
                f"leakage is not defined in attention layer {layer} of this model: it makes several attention calls in "
                "one forward pass, and a report has one map a layer"
            )
        self._pass[1].add(layer)
        if layer not in self._checked:
            self._check(layer, rows)
        (B, H, T, _), step = rows.q_BHTD.shape, rows.q_BHTD.shape[0]
        if self.everything:
            step = max(1, AT_ONCE // (H * self.protocol.grid_rows * T))
        for start in range(0, B, step):
            chosen = slice(start, start + step)
            self._add(layer, self.groups_B[chosen], reading.part(rows, chosen), lse_BHT[chosen])
        return None if self.change is None else self.change(layer, rows, lse_BHT)

    def _add(self, layer: int, groups_B: Tensor, rows: Rows, lse_BHT: Tensor) -> None:
        band_BHTW, lse_BHT = reading.local(rows, lse_BHT, self.protocol)
        if self.reindex is not None:
            band_BHTW = self.reindex(band_BHTW)
        if not self.everything:
            self.sums.add(layer, groups_B, band_BHTW=band_BHTW, lse_BHT=lse_BHT)
            return
        whole = reading.whole(rows, lse_BHT, self.protocol)
        self.sums.add(layer, groups_B, band_BHTW=band_BHTW, lse_BHT=lse_BHT, **whole._asdict())
        layout, table = self.layout, self.tables[layer]
        turned = layout is not None and table is not None
        self.sums.add_usage(
            layer,
            groups_B,
            q_BHTD=rows.q_BHTD,
            k_BGTD=rows.k_BGSD,
            rotary_dim=2 * table.live().shape[-1] if turned and table is not None else 0,
            start=layout.start if turned and isinstance(layout, Layout) else 0,
            interleaved=turned and isinstance(layout, Layout) and layout.interleaved,
        )

    def _check(self, layer: int, rows: Rows) -> None:
        problem = reading.complaint(rows)
        if problem is not None:
            raise ValueError(f"leakage is not defined in attention layer {layer} of this model: {problem}")
        if reading.hidden_offsets(rows, self.protocol.window):
            self.narrow.add(layer)
        self._checked.add(layer)

    def notes(self) -> list[str]:
        if not self.narrow:
            return []
        return [
            f"layers {sorted(self.narrow)} see fewer than the {self.protocol.window} offsets that are compared: their "
            "logits at hidden offsets are part of the leakage, though no attention flows there"
        ]


@torch.no_grad()
def capture(
    observation: Observation,
    crops: Crops,
    protocol: Protocol,
    *,
    model: nn.Module | None = None,
    everything: bool = True,
    progress: str | None = None,
    **options: Any,
) -> tuple[Sums, list[str]]:
    """Complete sums over all crops of a protocol, on every rank the same, and notes about them.

    `model` is what is called where that is not the transformers model itself (a PEFT model, say). `progress` names the
    bar that rank 0 shows on a terminal; None shows none. `options` go to `Observer`.
    """
    rank, world = ranks()
    model = observation.model if model is None else model
    sums = Sums(protocol, distributed=world > 1, device=_home(observation, protocol))
    observer = Observer(observation, sums, everything=everything, **options)
    wrong_BT = None
    with observed(observer, of=observation.model, want_lse=True):
        for tokens_BT in read(crops.shard(rank, world), protocol, sums, observer, progress=progress):
            # The logits have no name, so that they are gone before the next batch needs as much again.
            if everything:
                sums.add_loss(observer.groups_B, losses(forward(model, tokens_BT), tokens_BT))
                if wrong_BT is None and not sums.loss.isfinite().all():
                    wrong_BT = tokens_BT
            else:
                forward(model, tokens_BT)
    sums.merge()
    notes = observer.notes()
    if not sums.loss.isfinite().all():  # on every rank, for the sums are those of all
        notes.append(_not_finite(model, sums, crops.tokens_NT[:1] if wrong_BT is None else wrong_BT))
    return sums, notes


def _not_finite(model: nn.Module, sums: Sums, tokens_BT: Tensor) -> str:
    """A note on where NaN or infinity comes from, if it comes from some of a layer's heads; else an error."""
    places = [first_non_finite(model, lambda: forward(model, tokens_BT))]
    if ranks()[1] > 1:
        here, places = places[0], [None] * ranks()[1]
        dist.all_gather_object(places, here)
    where = next((place for place in places if place), "a module that could not be found")
    heads = (store.good_heads() for _, store in sorted(sums.layers.items()))
    first_bad = next((good for good in heads if not good.all()), None)
    if first_bad is not None and first_bad.any():  # its other heads can be measured
        return f"the loss, like all that later layers read, is not finite: NaN or infinity first appears in {where}"
    raise ValueError(
        f"this model gives logits that are not finite: NaN or infinity first appears in {where}. Measure in float32, "
        "or load or train the weights again"
    )


def read(crops: Crops, protocol: Protocol, sums: Sums, observer: Observer, *, progress: str | None) -> Iterator[Tensor]:
    """The batches of every fold, each fold closed after its last one."""
    total = sum(len(batches) for batches in crops.folds(protocol.batch_size))
    with progress_bar(total, progress, "batch", shown=progress is not None and ranks()[0] == 0) as bar:
        for batches in crops.folds(protocol.batch_size):
            for tokens_BT, groups_B in batches:
                observer.groups_B = groups_B
                yield tokens_BT
                bar.update()
            sums.close_fold()


def forward(model: nn.Module, tokens_BT: Tensor, **more: Any) -> Tensor:
    """The logits (B, T, V) of whole sequences, without a cache."""
    device = getattr(model, "device", torch.device("cpu"))
    if device.type != "meta":
        tokens_BT = tokens_BT.to(device)
    return model(input_ids=tokens_BT, use_cache=False, **more).logits


def losses(logits_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
    """−log p of every token but the first (B, T − 1), without a copy of all logits."""
    wanted_BT = tokens_BT[:, 1:].to(logits_BTV.device)
    step = max(1, LOGITS_AT_ONCE // logits_BTV.shape[-1])
    rows = []
    for logits_TV, wanted_T in zip(logits_BTV[:, :-1], wanted_BT, strict=True):
        pairs = zip(logits_TV.split(step), wanted_T.split(step), strict=True)
        rows.append(torch.cat([nn.functional.cross_entropy(x.float(), y, reduction="none") for x, y in pairs]))
    return torch.stack(rows)


def _home(observation: Observation, protocol: Protocol) -> torch.device | None:
    """Where sums are kept: with the layer, unless an accelerator would have to hold too much of them."""
    heads = sum(site.heads for site in observation.sites)
    size = 4 * protocol.groups * protocol.length * (protocol.window + 1) * heads
    return torch.device("cpu") if size > ON_DEVICE else None
