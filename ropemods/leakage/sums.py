"""Running sums of one measurement: what a forward pass adds to, and what ranks add up.

A `Sums` knows nothing of transformers. For every layer and batch it is handed logits and row
statistics, and keeps sums over sequences, by group of documents where an interval is wanted:

    sums = Sums(protocol)
    for batches in folds:                     # Protocol.folds, in order
        for groups_B, ... in batches:
            for layer in ...:
                sums.add(layer, groups_B, band_BHTW=..., lse_BHT=..., rows_BHRS=...)
            sums.add_loss(groups_B, nll_BT)
        sums.close_fold()
    sums.merge()                              # many ranks become one

Of each sequence two maps are needed, r(i, δ) = s_{i,i−δ} − logsumexp_{δ′∈W} s_{i,i−δ′} (residual) and
log m_i = logsumexp_{δ∈W} s_{i,i−δ} − log Z_i, the mass inside the window; total is their sum.
Whole rows, on a grid, go to `mask.py`.

Memory per layer and head, in bytes: 4 · K · T · (w + 1) for the two maps and 16 · R · S for the mask term.
A group −1 counts for nothing: it fills up the batches of a rank that has fewer sequences.

A head with a NaN or an infinity is left out of every mean and named in `notes`; the others go on.

Shapes: B batch, H query heads, G key heads, K groups, T queries, W window, I queries i ≥ w,
R grid rows, S keys, D head dim, F rotary frequencies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ropemods.leakage import mask
from ropemods.leakage.layer_sums import CHECKED, CURVES, LayerSums, keep
from ropemods.leakage.logits import pair_norms
from ropemods.leakage.protocol import Protocol


class Sums:
    """Sums over sequences for each layer; see the module's docstring."""

    def __init__(
        self,
        protocol: Protocol,
        *,
        distributed: bool = False,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """`distributed` adds up over the ranks of `process_group` (None: all).

        `device` is where sums are kept: None keeps each layer's where its logits are.
        """
        self.protocol = protocol
        self.fold = 0
        self.merged = False
        self.layers: dict[int, LayerSums] = {}
        self.loss = torch.zeros(2, protocol.groups, dtype=torch.float64)  # nats, tokens
        self._distributed = distributed
        self._process_group = process_group
        self._device = None if device is None else torch.device(device)
        self._geometry: dict[int, mask.Geometry] = {}

    @torch.no_grad()
    def add(
        self,
        layer: int,
        groups_B: Tensor | Sequence[int],
        *,
        band_BHTW: Tensor,
        lse_BHT: Tensor,
        bos_mass_BHT: Tensor | None = None,
        bos_logit_BHT: Tensor | None = None,
        position1_mass_BHT: Tensor | None = None,
        entropy_BHT: Tensor | None = None,
        rows_BHRS: Tensor | None = None,
        row_extra_BHR: Tensor | None = None,
    ) -> None:
        """Add one layer's statistics of one batch.

        band: logits s[i, i−δ] (`banded_logits`). lse: log Z over all that is in the denominator.
        rows: whole rows of logits at `protocol.grid()`, −inf on hidden keys; row_extra: a further
        logit in their denominator, as a learned sink has. A curve that is None is not defined.
        """
        self._expect_shapes(band_BHTW, lse_BHT, rows_BHRS)
        sums = self._layer(layer, band_BHTW.device)
        w = self.protocol.window
        groups_B, chosen = self._counted(groups_B, band_BHTW.device)
        band_BHIW, lse_BHI = band_BHTW[chosen, :, w:].float(), lse_BHT[chosen, :, w:].float()
        given = (bos_mass_BHT, bos_logit_BHT, position1_mass_BHT, entropy_BHT)
        curves = {k: x[chosen].float() for k, x in zip(CURVES, given, strict=True) if x is not None}
        rows = None if rows_BHRS is None else rows_BHRS[chosen].float()
        good_BH = sums.gate(band_BHTW=band_BHIW, lse_BHT=lse_BHI, curves=curves, rows_BHRS=rows)

        log_window_BHI = band_BHIW.logsumexp(-1)
        residual_BHIW = band_BHIW - log_window_BHI[..., None]
        sums.add_by_group("residual", groups_B, keep(residual_BHIW, good_BH))
        sums.add_by_group("log_m", groups_B, keep(log_window_BHI - lse_BHI, good_BH))
        sums.add_by_group("count", groups_B, torch.ones_like(groups_B, dtype=torch.float32))
        for name, curve_BHT in curves.items():
            curve_BHT = keep(curve_BHT, good_BH)
            sums.add(name, curve_BHT.sum(0))
            if name.endswith("_mass"):
                sums.add_by_group(f"{name}_by_group", groups_B, curve_BHT[:, :, w:].mean(-1))
        if rows_BHRS is not None and rows is not None and self.protocol.mask_term:
            geometry = self._layer_geometry(layer, rows_BHRS)
            extra = None if row_extra_BHR is None else row_extra_BHR[chosen].float()
            mask.add_rows(sums, self.fold, groups_B, keep(rows, good_BH), extra, geometry)

    @torch.no_grad()
    def add_usage(
        self,
        layer: int,
        groups_B: Tensor | Sequence[int],
        *,
        q_BHTD: Tensor,
        k_BGTD: Tensor,
        rotary_dim: int | None = None,
        start: int = 0,
        interleaved: bool = False,
    ) -> None:
        """Add how much every rotary frequency and every channel of queries and keys is used.

        `start` is the first rotated channel; `rotary_dim` 0 means no rotation: channels only. The BOS is left
        out, because its key is often many times larger than any other.
        """
        sums = self._layer(layer, q_BHTD.device)
        groups_B, chosen = self._counted(groups_B, q_BHTD.device)
        for name, x in (("query", q_BHTD), ("key", k_BGTD)):
            x = x[chosen, :, 1:].float()
            if rotary_dim != 0:
                norms = pair_norms(x[..., start:], rotary_dim=rotary_dim, interleaved=interleaved)
                sums.add(f"{name}_pairs", norms.sum((0, 2)))
            sums.add(f"{name}_channels", x.abs().sum((0, 2)))
        sums.add("usage_tokens", torch.tensor([float(len(groups_B) * (q_BHTD.shape[2] - 1))]))

    @torch.no_grad()
    def add_loss(self, groups_B: Tensor | Sequence[int], nll_BT: Tensor) -> None:
        """Add the negative log-likelihoods of a batch's tokens: the held-out loss, for free."""
        groups_B, chosen = self._counted(groups_B, nll_BT.device)
        groups_B, nll_B = groups_B.cpu(), nll_BT[chosen].double().sum(1).cpu()
        self.loss[0].index_add_(0, groups_B, nll_B)
        self.loss[1].index_add_(0, groups_B, torch.full_like(nll_B, nll_BT.shape[1]))

    @torch.no_grad()
    def close_fold(self) -> None:
        """End a fold of `Protocol.folds`: what it learned is fixed for the next. All ranks call it."""
        folds = self.protocol.folds()
        if self.fold >= len(folds):
            raise RuntimeError(f"all {len(folds)} folds of this measurement are closed already")
        for layer, geometry in sorted(self._geometry.items()):
            mask.close_fold(self.layers[layer], self.fold, self.protocol, geometry, self._reduce)
        self.fold += 1

    @torch.no_grad()
    def merge(self) -> None:
        """Add up over ranks, once, after the last fold. Afterwards every rank holds the whole."""
        if self.merged:
            raise RuntimeError("these sums are merged already; merging again would count twice")
        for _, sums in sorted(self.layers.items()):
            for name in sorted(set(sums.tensors) - set(mask.FIXED)):
                sums.tensors[name] = self._reduce(sums[name])
        self.loss = self._reduce(self.loss)
        self.merged = True

    def state(self) -> dict[str, Tensor]:
        """Everything as named tensors (safetensors can hold them); `load` takes them back."""
        named = {f"{n}.{k}": v for n, sums in self.layers.items() for k, v in sums.tensors.items()}
        return {**named, "loss": self.loss, "progress": torch.tensor([self.fold, self.merged])}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from the `state()` of sums that follow the same protocol."""
        self.layers, self._geometry = {}, {}
        for key in sorted(state.keys() - {"loss", "progress"}):
            layer, name = key.split(".", 1)
            sums = self._layer(int(layer), state[key].device)
            sums.tensors[name] = state[key].clone()
            if name == "mask.visible":
                self._geometry[int(layer)] = mask.Geometry(self.protocol, sums[name])
        self.loss = state["loss"].clone()
        self.fold, self.merged = int(state["progress"][0]), bool(state["progress"][1])

    def notes(self) -> list[str]:
        """One line for each head that was left out, and what was wrong with it."""
        lines = []
        for layer, sums in sorted(self.layers.items()):
            for head, bad_Q in enumerate(sums["bad"].T.tolist()):
                found = ", ".join(name for name, n in zip(CHECKED, bad_Q, strict=True) if n)
                if found:
                    lines.append(
                        f"layer {layer}, head {head}: NaN or infinity in {found} of "
                        f"{max(bad_Q):.0f} of {self.protocol.sequences} sequences; "
                        "left out of every mean"
                    )
        return lines

    def _layer(self, layer: int, device: torch.device) -> LayerSums:
        if layer not in self.layers:
            self.layers[layer] = LayerSums(self.protocol.groups, self._device or device)
        return self.layers[layer]

    def _layer_geometry(self, layer: int, rows_BHRS: Tensor) -> mask.Geometry:
        """The layer's grid; which keys are hidden is read off the first batch."""
        if layer not in self._geometry:
            if self.fold:
                raise RuntimeError(
                    f"layer {layer}: whole rows came first in fold {self.fold}; the mask term "
                    "needs them from the first fold on"
                )
            # Hidden is what is −inf in every sequence and head; a NaN is not hidden.
            visible_RS = (rows_BHRS != -torch.inf).flatten(0, 1).any(0)
            self._geometry[layer] = mask.Geometry(self.protocol, visible_RS)
            self.layers[layer].tensors["mask.visible"] = visible_RS
        return self._geometry[layer]

    def _counted(self, groups_B: Tensor | Sequence[int], device: torch.device) -> tuple[Tensor, slice | Tensor]:
        """The groups that count, and how to pick their sequences from a batch (a view if all do)."""
        groups_B = torch.as_tensor(groups_B).long()
        folds = self.protocol.folds()
        if self.merged or self.fold >= len(folds):
            raise RuntimeError("these sums are complete; start a new Sums for another measurement")
        open_fold = folds[self.fold]
        wrong = [g for g in groups_B.tolist() if g != -1 and g not in open_fold]
        if wrong:
            raise ValueError(
                f"group {wrong[0]} came while fold {self.fold} (groups {open_fold.start} to "
                f"{open_fold.stop - 1}) is open: read the folds in order and close each"
            )
        groups_B = groups_B.to(device)
        counts_B = groups_B >= 0
        return groups_B[counts_B], slice(None) if counts_B.all() else counts_B

    def _reduce(self, x: Tensor) -> Tensor:
        if not self._distributed:
            return x
        home = x.device
        # NCCL adds up on GPUs only; sums kept on the CPU make the trip there and back.
        if home.type == "cpu" and dist.get_backend(self._process_group) == "nccl":
            x = x.cuda()
        x = x.contiguous()
        dist.all_reduce(x, group=self._process_group)
        return x.to(home)

    def _expect_shapes(self, band: Tensor, lse: Tensor, rows: Tensor | None) -> None:
        p, (B, H) = self.protocol, band.shape[:2]
        wanted = {"band": (B, H, p.length, p.window), "lse": (B, H, p.length)}
        found = {"band": tuple(band.shape), "lse": tuple(lse.shape)}
        if rows is not None and p.mask_term:
            wanted["rows"], found["rows"] = (B, H, p.grid_rows, p.length), tuple(rows.shape)
        for name, shape in wanted.items():
            if found[name] != shape:
                raise ValueError(f"{name}: the protocol asks for {shape}, found {found[name]}")
