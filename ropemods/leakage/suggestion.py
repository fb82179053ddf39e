"""`suggest`: from what a model does, a proposal of what to modify.

    suggestion = ropemods.suggest(model, tokenizer, "books.jsonl", length=8192)
    print(suggestion.to_markdown())
    ropemods.apply(model, ropemods.TruncatedRoPE(suggestion.keep))

One short pass gives the usage of every rotary band, its share of the queries' and keys' norms, and the mass on BOS.

**keep** for `TruncatedRoPE`: the largest cut, from the lowest frequency up, in which every dropped band

- turns by at most `max_phase` radians over `length` tokens (a slow band says little about offsets, and what it says of
  far ones is most of what its rotation does),
- and all dropped bands together hold at most `max_usage` of the norms of queries and of keys.

No cut is proposed where the slowest band is already too fast. Both limits are a judgement; the table of bands is there
to make another.

**tries**, with `trying=True`: what each of a menu of modifications does to this model, untrained, in loss, leakage and
time, and what follows from it (`leakage/tries.py`, `report/tries.py`). It takes minutes, and ends in a recipe:

    suggestion = ropemods.suggest(model, tokenizer, "books.jsonl", trying=True)
    suggestion.to_recipe("suggested.yaml", model="path/of/the/model", data="books.jsonl")

**sink** for `LearnedSink`: per head, the logit at which a sink takes the mass that BOS had. It is what
`apply(..., calibration=…)` would choose.

These two are named here, and in the words of `ropemods.report.proposals`, because what is read off the model is a value
for an option that each alone has. The menu that is tried names none.

Shapes: B batch, L layers, H query heads, T queries, F rotary bands.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ropemods.attention.rows import Rows
from ropemods.leakage import curves
from ropemods.leakage.capture import capture
from ropemods.leakage.crops import make_crops
from ropemods.leakage.documents import read_documents
from ropemods.leakage.measurement import check_fit, wavelengths
from ropemods.leakage.protocol import Protocol
from ropemods.leakage.reading import bos_mass
from ropemods.leakage.tries import PROTOCOL, check_stock, tried
from ropemods.model import casts
from ropemods.model.observation import observing
from ropemods.model.wrappers import base_model, unwrapped
from ropemods.mods.learned_sink import sink_with_mass
from ropemods.mods.truncated_rope import TruncatedRoPE
from ropemods.report.proposals import Band, Ladder, Suggestion
from ropemods.report.records import Usage
from ropemods.report.words import number, percent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEQUENCES, CROP = 32, 512
MAX_PHASE, MAX_USAGE = 1.0, 0.25
WEAK_SINK = 0.05
"""Mean mass on BOS below which a learned sink has little to take over."""


def suggest(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    documents: Any,
    length: int = 8192,
    *,
    sequences: int = SEQUENCES,
    crop: int = CROP,
    max_phase: float = MAX_PHASE,
    max_usage: float = MAX_USAGE,
    bos_token_id: int | None = None,
    seed: int = 0,
    trying: bool | Protocol = False,
    progress: bool = True,
) -> Suggestion:
    """Propose `keep` and a sink's initial logits for training and use at `length` tokens.

    Usage is read on `sequences` crops of `crop` tokens: it hardly depends on the length, which only decides how far
    each band turns. `trying` also puts a menu of modifications on the model, one after another, and measures what each
    does untrained; a protocol says on what.
    """
    if length < 2:
        raise ValueError(f"length={length}: at least 2 tokens, best the length that the model will be used at")
    for name, limit in (("max_phase", max_phase), ("max_usage", max_usage)):
        if not limit >= 0:
            raise ValueError(f"{name}={limit}: at least 0, which drops nothing")
    called = unwrapped(model, to_call=True)
    if trying:
        check_stock(called)  # before minutes of work
    inner = base_model(called)
    protocol = Protocol.from_dict(
        {
            "sequences": sequences,
            "length": crop,
            "groups": None if sequences % 8 else 8,  # no interval is given, so few will do
            "window": max(2, min(8, crop // 4)),
            "seed": seed,
            "mask_term": False,
        }
    )
    source = read_documents(documents, seed=seed)
    crops = make_crops(source, tokenizer, protocol, bos_token_id=bos_token_id)
    check_fit(inner, crops)
    collected: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def keep_sink(layer: int, rows: Rows, lse_BHT: Tensor) -> None:
        # One batch is enough for a starting value, as in calibration.
        if layer not in collected:
            mass_BHT = bos_mass(rows, lse_BHT).clamp(max=1 - 1e-6)
            collected[layer] = [(lse_BHT + torch.log1p(-mass_BHT), mass_BHT)]

    with casts.in_dtype(called, torch.float32), observing(called) as observation:
        sums, notes = capture(
            observation, crops, protocol, model=called, change=keep_sink, progress="suggest" if progress else None
        )
        lengths = wavelengths(observation)
    usage = curves.usage(sums, lengths)
    assert usage is not None
    ladders = _ladders(usage, length)
    if not ladders:
        raise ValueError(
            f"{type(inner).__name__} has no rotary bands that could be read, so there is no cut to propose; measure "
            "it for its leakage"
        )
    keep, reason = _keep(ladders, length, max_phase, max_usage)
    later_BHT = torch.arange(crop)[None, None] > 0
    sink, masses = [], []
    for layer in sorted(collected):
        log_rest_BHT, mass_BHT = (torch.cat(parts).float().cpu() for parts in zip(*collected[layer], strict=True))
        sink.append(tuple(sink_with_mass(log_rest_BHT, mass_BHT, later_BHT.expand(mass_BHT.shape[0], 1, -1)).tolist()))
        masses.append(float(mass_BHT[..., 1:].mean()))
    mass = sum(masses) / len(masses)
    tries = None
    if trying:
        chosen = trying if isinstance(trying, Protocol) else replace(PROTOCOL, seed=seed)
        tries = tried(model, tokenizer, source, chosen, bos_token_id=bos_token_id, progress=progress)
    return Suggestion(
        length=length,
        ladders=ladders,
        keep=keep,
        keep_reason=reason,
        bos_mass=mass,
        sink=tuple(sink),
        sink_reason=_sink_reason(mass),
        notes=(*crops.notes, *observation.notes, *notes),
        tries=tries,
    )


def _ladders(usage: Usage, length: int) -> tuple[Ladder, ...]:
    """The bands of each set of layers with the same wavelengths."""
    layers: dict[tuple[float, ...], list[int]] = {}
    for layer, row in enumerate(usage.wavelengths):
        if row:
            layers.setdefault(tuple(row), []).append(layer)
    ladders = []
    for row, members in layers.items():
        query_F, key_F = (_shares([table[layer] for layer in members]) for table in (usage.query, usage.key))
        bands = (
            Band(
                index=n,
                wavelength=wavelength,
                cycles=length / wavelength,
                phase=2 * torch.pi * length / wavelength,
                query_share=query_F[n],
                key_share=key_F[n],
            )
            for n, wavelength in enumerate(row)
        )
        ladders.append(Ladder(layers=tuple(members), bands=tuple(bands)))
    return tuple(ladders)


def _shares(tables: list[tuple[tuple[float, ...], ...]]) -> list[float]:
    """Each band's share of the norms, mean over heads and layers; heads with NaN are left out."""
    heads_NF = torch.tensor([head for table in tables for head in table], dtype=torch.float64)
    shares_F: list[float] = (heads_NF / heads_NF.sum(-1, keepdim=True)).nanmean(0).tolist()
    return shares_F


def _keep(ladders: tuple[Ladder, ...], length: int, max_phase: float, max_usage: float) -> tuple[float | None, str]:
    """The largest cut within both limits in every ladder; keep is one number for all."""
    cuts = [_cut(ladder, length, max_phase, max_usage) for ladder in ladders]
    F = [len(ladder.bands) for ladder in ladders]
    dropped, reason = min(cuts, key=lambda cut: cut[0])
    if dropped == 0:
        return None, reason
    at = cuts.index((dropped, reason))
    return TruncatedRoPE.keeping(F[at] - dropped, F[at]).keep, reason


def _cut(ladder: Ladder, length: int, max_phase: float, max_usage: float) -> tuple[int, str]:
    """How many bands may go, and what stops the next one."""
    dropped, query, key, reason = 0, 0.0, 0.0, "every band is within the limits"
    for band in reversed(ladder.bands[1:]):  # the highest frequency always stays
        share = max(query + band.query_share, key + band.key_share)
        if band.phase > max_phase:
            reason = f"the next band turns by {number(band.phase)} rad (limit {max_phase:g})"
            break
        if share > max_usage:
            reason = (
                f"with the next band the dropped share of norms would be {percent(share)} (limit {percent(max_usage)})"
            )
            break
        dropped, query, key = dropped + 1, query + band.query_share, key + band.key_share
    if dropped == 0:
        slowest = ladder.bands[-1]
        return 0, (
            f"no band may go: the slowest turns by {number(slowest.phase)} rad over {length} tokens and holds "
            f"{percent(max(slowest.query_share, slowest.key_share))} of the norms (limits {max_phase:g} rad, "
            f"{percent(max_usage)})"
        )
    first = ladder.bands[len(ladder.bands) - dropped]
    return dropped, (
        f"drops {dropped} of {len(ladder.bands)} bands, which turn by at most {number(first.phase)} rad over {length} "
        f"tokens and hold {percent(query)} of query and {percent(key)} of key norms; {reason}"
    )


def _sink_reason(mass: float) -> str:
    if mass < WEAK_SINK:
        return f"BOS has {percent(mass)} of the attention, so a learned sink has little to take over"
    return (
        f"BOS has {percent(mass)} of the attention, which a sink can take over; calibrate it with "
        "apply(..., calibration=ids) to start from the logits below"
    )
