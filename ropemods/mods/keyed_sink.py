"""KeyedSink: the sink is a place of its own in every row, with the key and the value that BOS had.

A head decides row by row whether to park on the sink, so the sink's logit is a function of the query, which the one
number of `learned_sink` cannot be. BOS at position 0 sees nothing but itself: its key and value in every layer are
constants of the model. Copied into a slot, they do what BOS did without anything standing at position 0, and the token
itself can be closed to all later queries. Position 1 sees the slot too, and so does not become the next sink.

    z_i = scale · ⟨R(−(i − offset)) q_i, κ⟩ + c          (i the query's position; κ unrotated, as position 0's key is)
    out_i = (Σ_j w_ij e^{s_ij} v_j + strength · e^{z_i} ν) / (Σ_j w_ij e^{s_ij} + strength · e^{z_i})

with w = 1 − strength for the BOS column and 1 elsewhere, one κ, ν and c for each head. At the start the model is what
it was but for the offset, which is the same for every query (`anchored_bos` says how it is chosen). With value=False
the slot brings nothing, as a sink in the denominator. What trains ("all", "logit" for c alone, "none") are departures
from the copied values, which is where weight decay pulls them.

In a layer with a window BOS leaves the rows that are further from it; the slot stays, so those rows have a sink that
they did not have. The BOS goes on reading itself, and no slot. Strength 0 is the stock softmax.
Cost: one product for each query and head, an elementwise pass over the output, and the closed column's eight channels.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ropemods.attention.plain_row import PlainRow, rotate
from ropemods.attention.rows import Rows, soft_capped
from ropemods.attention.terms import Slot
from ropemods.mods.base import Call, Mod, Site, Stage
from ropemods.mods.bos_column import bos_closed, check_offset, first_offset, offset_of_least_change, turned


@dataclasses.dataclass(frozen=True)
class KeyedSink(Mod):
    """A slot in every row with BOS's key and value, and BOS closed."""

    kind: ClassVar[str] = "keyed_sink"

    value: bool = True
    offset: int | Literal["calibrated"] = "calibrated"
    trains: Literal["all", "logit", "none"] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_offset(self.kind, self.offset)

    @property
    def needs_bos(self) -> bool:
        return True

    @property
    def needs_layout(self) -> bool:
        return True

    @property
    def copies_bos(self) -> bool:
        return True

    @property
    def closes_bos(self) -> bool:
        return True

    @property
    def has_parameters(self) -> bool:
        return self.trains != "none"

    @property
    def calibrates(self) -> bool:
        return self.offset == "calibrated"

    def stage(self, site: Site) -> Stage:
        return KeyedSinkStage(self, site)


class KeyedSinkStage(Stage):
    copied_key: Tensor
    copied_value: Tensor
    offset: Tensor

    def __init__(self, mod: KeyedSink, site: Site) -> None:
        super().__init__()
        self.mod = mod
        self.register_buffer("offset", first_offset(mod.offset))
        self.register_buffer("copied_key", torch.zeros(site.heads, site.key_dim))
        if mod.value:
            self.register_buffer("copied_value", torch.zeros(site.heads, site.head_dim))
        if mod.has_parameters:
            self.logit = nn.Parameter(torch.zeros(site.heads))
        if mod.trains == "all":
            self.key = nn.Parameter(torch.zeros_like(self.copied_key))
            if mod.value:
                self.value = nn.Parameter(torch.zeros_like(self.copied_value))

    @torch.no_grad()
    def read_bos(self, rows: Rows, call: Call) -> None:
        repeats = rows.q_BHTD.shape[1] // rows.k_BGSD.shape[1]
        self.copied_key.copy_(rows.k_BGSD[0, :, 0].repeat_interleave(repeats, 0))
        if self.mod.value:
            self.copied_value.copy_(rows.v_BGSD[0, :, 0].repeat_interleave(repeats, 0))

    def calibrate(self, rows: Rows, call: Call) -> None:
        if self.mod.calibrates:
            self.offset.fill_(offset_of_least_change(rows, call))

    def forward(self, rows: Rows, call: Call) -> Rows:
        assert call.position_BT is not None
        query_BHTD = turned(rows, call, call.position_BT - self.offset)
        strength = self.strength.to(query_BHTD.dtype)
        rows = bos_closed(rows, call, strength)
        assert rows.column is not None
        key_HD, value_HD = self.key_and_value(query_BHTD.dtype)
        logit = soft_capped((query_BHTD * key_HD[:, None]).sum(-1) * rows.scale, rows.softcap)
        logit = logit + self.departure(logit.dtype)[:, None] + strength.log()
        logit = logit.masked_fill(rows.column.is_self_BT[:, None], float("-inf"))
        return rows.plus(Slot(logit, value_HD))

    def naive(self, row: PlainRow, call: Call) -> None:
        assert call.position_BT is not None
        if row.is_bos:
            return
        row.close_bos(self.alpha)
        query_D = row.query_D
        if call.inv_freq_F is not None:
            turn = (call.position_BT[row.at[::2]] - self.offset).double()
            query_D = rotate(query_D, -turn * call.inv_freq_F.double(), call.layout)
        head = row.at[1]
        key_HD, value_HD = self.key_and_value(torch.float64)
        logit = row.capped(row.scale * (query_D * key_HD[head]).sum()) + self.departure(torch.float64)[head]
        row.slots.append((logit + math.log(self.alpha), None if value_HD is None else value_HD[head]))

    def key_and_value(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """κ and ν (H, D)."""
        key_HD = self.copied_key.to(dtype)
        value_HD = self.copied_value.to(dtype) if self.mod.value else None
        if self.mod.trains == "all":
            key_HD = key_HD + self.key.to(dtype)
            value_HD = None if value_HD is None else value_HD + self.value.to(dtype)
        return key_HD, value_HD

    def departure(self, dtype: torch.dtype) -> Tensor:
        """c (H)."""
        return self.logit.to(dtype) if self.mod.has_parameters else torch.zeros_like(self.copied_key[:, 0], dtype=dtype)

    def learned(self) -> str:
        return f"the slot scored {int(self.offset)} back"
