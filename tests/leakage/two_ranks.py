"""The same measurement on one rank and on two real processes over gloo.

Every sequence's logits follow from its number alone, which is also its one token: so each rank can make
those of its own share. The numbers of sequences are odd, so a rank must fill up its batches.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ropemods.leakage.crops import Crops
from ropemods.leakage.protocol import Protocol
from ropemods.leakage.sums import Sums
from tests import forked
from tests.leakage.synthetic import band_of

PROTOCOL = Protocol(sequences=24, length=32, groups=8, early=(8, 16), grid_rows=12, batch_size=2)
LAYERS, HEADS = 2, 3


def crops() -> Crops:
    p = PROTOCOL
    numbers = torch.arange(p.sequences)[:, None].expand(-1, p.length).contiguous()
    folds = torch.tensor([n for n, fold in enumerate(p.folds()) for _ in fold])
    return Crops(
        protocol=p,
        tokens_NT=numbers,
        groups_N=torch.arange(p.groups).repeat_interleave(p.per_group),
        folds_N=folds.repeat_interleave(p.per_group),
        documents=8,
        source="synthetic",
        digest="0" * 12,
    )


def logits(number: int, layer: int) -> Tensor:
    """Causal logits [H, T, S] of a sequence."""
    T, source = PROTOCOL.length, torch.Generator().manual_seed(1000 * layer + number)
    s_HTS = torch.randn(HEADS, T, T, generator=source)
    s_HTS += 2 * torch.sin(torch.arange(T) / 3.0)[:, None] * torch.cos(torch.arange(T) / 2.0)
    return s_HTS.masked_fill(~torch.ones(T, T).tril().bool(), -torch.inf)


def measure(share: Crops, *, distributed: bool) -> tuple[Sums, int]:
    """The merged sums, and how many batches it took."""
    sums, batches = Sums(PROTOCOL, distributed=distributed), 0
    grid = list(PROTOCOL.grid())
    for fold in share.folds():
        for tokens_BT, groups_B in fold:
            batches += 1
            for layer in range(LAYERS):
                s = torch.stack([logits(int(n), layer) for n in tokens_BT[:, 0]])
                log_Z = s.logsumexp(-1)
                a = (s - log_Z[..., None]).exp()
                sums.add(
                    layer,
                    groups_B,
                    band_BHTW=band_of(s, PROTOCOL.window),
                    lse_BHT=log_Z,
                    bos_mass_BHT=a[..., 0],
                    bos_logit_BHT=s[..., 0],
                    position1_mass_BHT=a[..., 1],
                    entropy_BHT=-(a * a.clamp(min=1e-30).log()).sum(-1),
                    rows_BHRS=s[:, :, grid],
                )
                q = s[..., :8].clamp(min=-9.0)
                sums.add_usage(layer, groups_B, q_BHTD=q, k_BGTD=q[:, :1])
            sums.add_loss(groups_B, tokens_BT[:, 1:].float() / 7 + 1)
        sums.close_fold()
    sums.merge()
    return sums, batches


def rank_main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    try:
        sums, batches = measure(crops().shard(rank, world), distributed=True)
        torch.save({**sums.state(), "batches": torch.tensor(batches)}, folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def on_two_ranks(folder: Path) -> list[dict[str, Tensor]]:
    forked.run(rank_main, folder, ranks=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
