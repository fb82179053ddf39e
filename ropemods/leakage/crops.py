"""Stationarised crops: sequences in which content does not depend on position.

Leakage asks what attention tells about position. Text tells it too: documents open with titles, first
mentions and set phrases. So a sequence is BOS and then a stretch from anywhere inside a long document, and
averages over sequences have, at every query i ≥ 1, the same distribution of content.

- **Never a document's start.** A crop begins at least MARGIN = 32 tokens into its document: titles, bylines
  and opening phrases are that short. Without the margin they would stand at small i only, for
  no crop could bring them later.
- **Documents stay whole in their group.** All crops of one document go to one group, since they share a
  subject and an author; the bootstrap draws groups. One crop from as many documents as possible;
  several, not overlapping, from each where there are fewer documents than sequences.
- **A book** (fewer documents than groups, or one that has nearly all the text) is split into contiguous
  blocks with a gap between them, and blocks stand for documents. The result says so in its notes.
- **Unigram control**: i.i.d. tokens with the crops' own frequencies, so that no order is left at all.

Only documents that are needed are tokenised, and of a long one only an excerpt. Everything follows
from the texts, the tokenizer and the protocol: every rank makes the same crops and takes its share (`shard`).

Shapes: N sequences, T tokens, B batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ropemods.leakage.documents import Documents, without_copies
from ropemods.leakage.protocol import Protocol
from ropemods.report.words import percent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARGIN = 32
"""Tokens between a document's start and the earliest crop."""
TORN = 4
"""Tokens dropped where an excerpt begins or ends mid-document: a torn word makes tokens of its own."""
UNKNOWN, ONE_TOKEN = 0.01, 0.9
"""Shares of the text: of unknown tokens, above which it is said; of the commonest token, above which it is no text."""
EXCERPT = 16
"""Characters of an excerpt for each token wanted from it: three times what English needs."""
_SHUFFLE, _CUT, _UNIGRAM = 0, 2, 4
"""Streams of the protocol's seed (1 and 3 are used by draws.py and documents.py)."""


class TooLittleText(ValueError):
    """The documents do not hold the crops that the protocol asks for."""


@dataclass(frozen=True, kw_only=True)
class Crops:
    """Sequences ready to be read, in the order of the protocol's folds."""

    protocol: Protocol
    tokens_NT: Tensor
    groups_N: Tensor
    """Group of each sequence; −1 fills up a shard and counts for nothing."""
    folds_N: Tensor
    """Fold of each sequence (`Protocol.folds`), fillers included."""
    documents: int
    """Documents (or blocks) that the crops come from."""
    source: str
    digest: str
    """12 hex digits of the token ids of all crops: equal exactly when the text was the same."""
    notes: tuple[str, ...] = ()

    def shard(self, rank: int, world: int) -> Crops:
        """This rank's share of every fold. All ranks get equally many, the last ones filled up."""
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}: ranks run from 0 to {world - 1}")
        picks, groups, folds = [], [], []
        for fold in range(len(self.protocol.folds())):
            inside = (self.folds_N == fold).nonzero()[:, 0]
            mine = inside[rank::world]
            spare = -(-len(inside) // world) - len(mine)
            picks += [mine, inside[:1].expand(spare)]
            groups += [self.groups_N[mine], torch.full((spare,), -1)]
            folds.append(torch.full((len(mine) + spare,), fold))
        return replace(
            self,
            tokens_NT=self.tokens_NT[torch.cat(picks)],
            groups_N=torch.cat(groups),
            folds_N=torch.cat(folds),
        )

    def folds(self, batch_size: int | None = None) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """For each fold its batches (tokens_BT, groups_B); after each, `Sums.close_fold()`."""
        size = batch_size or self.protocol.batch_size
        for fold in range(len(self.protocol.folds())):
            inside = (self.folds_N == fold).nonzero()[:, 0]
            yield [(self.tokens_NT[part], self.groups_N[part]) for part in inside.split(size)]


class _Unit(NamedTuple):
    """A document, or a block of one: characters start … stop of texts[document]."""

    document: int
    start: int
    stop: int


def make_crops(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    protocol: Protocol,
    *,
    bos_token_id: int | None = None,
) -> Crops:
    """The crops of a protocol, BOS first; `bos_token_id` replaces the tokenizer's own."""
    bos = _bos(tokenizer, bos_token_id)
    documents = without_copies(documents)
    cutter = _Cutter(documents.texts, tokenizer, protocol, bos)
    notes = list(documents.notes)
    whole = [_Unit(n, 0, len(text)) for n, text in enumerate(documents.texts)]
    groups = _deal(whole, cutter, protocol)
    if groups is None:
        blocks = _blocks(documents.texts, protocol)
        groups = _deal(blocks, cutter, protocol)
        notes.append(
            f"{len(whole)} document(s) are too few, or too unequal, for {protocol.groups} groups: they "
            f"were split into {len(blocks)} contiguous blocks with gaps between them, and blocks "
            "stand for documents in the intervals"
        )
    if groups is None:
        raise TooLittleText(_too_little(documents, tokenizer, protocol))
    used = {unit for group in groups for unit, _ in group}
    notes += cutter.notes(used)
    crops = [[bos, *crop] for group in groups for _, crop in group]
    tokens_NT = torch.tensor(crops)
    notes += _content_notes(tokens_NT[:, 1:], tokenizer, documents.source)
    if protocol.text == "unigram":
        tokens_NT = _unigram(tokens_NT, protocol)
    return Crops(
        protocol=protocol,
        tokens_NT=tokens_NT,
        groups_N=torch.arange(protocol.groups).repeat_interleave(protocol.per_group),
        folds_N=torch.tensor([n for n, fold in enumerate(protocol.folds()) for _ in fold]).repeat_interleave(
            protocol.per_group
        ),
        documents=len(used),
        source=documents.source,
        digest=hashlib.sha256(tokens_NT.numpy().astype("<i8").tobytes()).hexdigest()[:12],
        notes=tuple(notes),
    )


class _Cutter:
    """Cuts crops out of units, tokenising no more than it must."""

    def __init__(
        self,
        texts: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        protocol: Protocol,
        bos: int,
    ) -> None:
        self.texts, self.tokenizer, self.protocol, self.bos = texts, tokenizer, protocol, bos
        self.lengths: dict[_Unit, float] = {}  # tokens of each unit, as far as its excerpt tells

    def cut(self, unit: _Unit, want: int) -> list[list[int]]:
        """Up to `want` crops of T − 1 tokens that do not overlap, at random offsets."""
        size = self.protocol.length - 1
        source = np.random.default_rng((self.protocol.seed, _CUT, *unit, want))
        text = self.texts[unit.document]
        excerpt = EXCERPT * self.protocol.length * want
        start, stop = unit.start, unit.stop
        if stop - start > excerpt:
            start += int(source.integers(0, stop - start - excerpt + 1))
            stop = start + excerpt
        tokens = self._tokens(unit, text, start, stop)
        if len(tokens) < want * size and (start, stop) != (unit.start, unit.stop):
            tokens = self._tokens(unit, text, unit.start, unit.stop)
        count = min(want, len(tokens) // size)
        free = len(tokens) - count * size
        offsets = np.sort(source.integers(0, free + 1, count)) + size * np.arange(count)
        crops = [tokens[o : o + size] for o in offsets]
        return [crop for crop in crops if self.bos not in crop]

    def notes(self, used: set[_Unit]) -> list[str]:
        median = float(np.median([self.lengths[unit] for unit in used]))
        if median >= 3 * self.protocol.length:
            return []
        return [
            f"the median document has about {median:.0f} tokens, under three crops of "
            f"{self.protocol.length}: where a token stands in its document still tells something "
            "about where it stands in the crop. Prefer longer documents, or join them"
        ]

    def _tokens(self, unit: _Unit, text: str, start: int, stop: int) -> list[int]:
        opening = EXCERPT * MARGIN  # characters that hold the margin, with room to spare
        if unit.start == 0 and start < opening:
            start = 0  # so near the start that the margin must be counted out
        else:
            start = max(start, opening)
            space = text.find(" ", start, start + EXCERPT)
            start = space if space >= 0 else start
        tokens = _encode(self.tokenizer, text[start:stop])
        self.lengths[unit] = len(tokens) * (unit.stop - unit.start) / max(1, stop - start)
        torn = TORN if stop < len(text) else 0
        return tokens[MARGIN if start == 0 else TORN : len(tokens) - torn]


def _deal(units: list[_Unit], cutter: _Cutter, protocol: Protocol) -> list[list[tuple[_Unit, list[int]]]] | None:
    """Crops for every group, each unit in one group; None where the units cannot fill the groups."""
    # No tokenizer makes more tokens than bytes, and no character has more than 4 bytes.
    shortest = (protocol.length - 1 + MARGIN) / 4
    units = [unit for unit in units if unit.stop - unit.start >= shortest]
    if len(units) < protocol.groups:
        return None
    order = np.random.default_rng((protocol.seed, _SHUFFLE)).permutation(len(units))
    want = -(-protocol.sequences // len(units))
    while True:
        pools = []
        for n in order:
            crops = cutter.cut(units[n], want)
            if crops:
                pools.append([(units[n], crop) for crop in crops])
            if want == 1 and len(pools) == protocol.sequences:
                break
        groups = _fill(pools, protocol)
        if groups is not None or all(len(pool) < want for pool in pools):
            return groups
        want *= 2


def _fill(pools: list[list[tuple[_Unit, list[int]]]], protocol: Protocol) -> list[list[tuple[_Unit, list[int]]]] | None:
    """Give pools to groups, the largest first to the emptiest; then level each group's pools."""
    dealt: list[list[list[tuple[_Unit, list[int]]]]] = [[] for _ in range(protocol.groups)]
    sizes = [0] * protocol.groups
    for pool in sorted(pools, key=len, reverse=True):
        emptiest = sizes.index(min(sizes))
        dealt[emptiest].append(pool)
        sizes[emptiest] += len(pool)
    if min(sizes) < protocol.per_group:
        return None
    groups = []
    for pools_of_group in dealt:
        ranked = [(n, crop) for pool in pools_of_group for n, crop in enumerate(pool)]
        ranked.sort(key=lambda pair: pair[0])  # stable: first crops first, document by document
        groups.append([crop for _, crop in ranked[: protocol.per_group]])
    return groups


def _blocks(texts: Sequence[str], protocol: Protocol) -> list[_Unit]:
    """At least K contiguous blocks, as equal as the documents allow, with gaps of about a crop."""
    K = protocol.groups
    # The largest block size that gives K blocks is the K-th largest of (length / 1, / 2, … K).
    sizes = sorted((len(text) / m for text in texts for m in range(1, K + 1)), reverse=True)
    size = sizes[K - 1]
    blocks = []
    for n, text in enumerate(texts):
        pieces = math.floor(len(text) / size + 1e-9)
        for piece in range(pieces):
            start, stop = (len(text) * at // pieces for at in (piece, piece + 1))
            gap = min(4 * protocol.length, (stop - start) // 10) if piece + 1 < pieces else 0
            blocks.append(_Unit(n, start, stop - gap))
    return blocks


def _unigram(tokens_NT: Tensor, protocol: Protocol) -> Tensor:
    """BOS, then i.i.d. draws from the frequencies of the crops' own tokens."""
    source = np.random.default_rng((protocol.seed, _UNIGRAM))
    content = tokens_NT[:, 1:].flatten().numpy()
    drawn = torch.from_numpy(source.choice(content, size=tokens_NT[:, 1:].shape))
    return torch.cat((tokens_NT[:, :1], drawn), dim=1)


def _content_notes(content_NT: Tensor, tokenizer: PreTrainedTokenizerBase, source: str) -> list[str]:
    """What makes crops poor text: tokens that stand for what the tokenizer does not know, and crops that are copies."""
    notes = []
    found, times = content_NT.unique(return_counts=True)
    shares = {int(token): float(n) / content_NT.numel() for token, n in zip(found, times, strict=True)}
    unknown = shares.get(-1 if tokenizer.unk_token_id is None else tokenizer.unk_token_id, 0.0)
    commonest = max(shares, key=lambda token: shares[token])
    name = tokenizer.convert_ids_to_tokens(commonest)
    if shares[commonest] > ONE_TOKEN:
        raise ValueError(
            f"{percent(shares[commonest])} of the text in {source} is one token, {name!r} ({commonest}), so there is "
            "nothing to measure on. Does the tokenizer belong to the model, and read text of this kind?"
        )
    if unknown > UNKNOWN:
        notes.append(
            f"{percent(unknown)} of the text is the unknown token {tokenizer.unk_token!r}: this tokenizer cannot read "
            "it all, and what is measured is partly about that"
        )
    copies = len(content_NT) - len(content_NT.unique(dim=0))
    if copies:
        notes.append(
            f"{copies} of {len(content_NT)} crops are copies of others: the text repeats itself, and intervals over "
            "documents that share text are too narrow"
        )
    return notes


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose=False: a stretch longer than the model's context is meant to be cut.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _bos(tokenizer: PreTrainedTokenizerBase, bos_token_id: int | None) -> int:
    if not callable(tokenizer) or not hasattr(tokenizer, "bos_token_id"):
        raise TypeError(
            f"a tokenizer is needed to read text, found {type(tokenizer).__name__}; give the model's own, as "
            "AutoTokenizer.from_pretrained(name) makes it"
        )
    bos = tokenizer.bos_token_id if bos_token_id is None else bos_token_id
    if bos_token_id is not None and (isinstance(bos, bool) or not isinstance(bos, int)):
        raise ValueError(
            f"bos_token_id is the id of a token, a whole number, not {bos!r}; for a token by its name, "
            "tokenizer.convert_tokens_to_ids(name) gives it"
        )
    if not isinstance(bos, int):
        raise ValueError(
            "this tokenizer has no BOS token, and leakage is measured with BOS at position 0. Name "
            "the token that the model was trained with at the start of texts (bos_token_id=...), "
            "for many models the id of <|endoftext|>"
        )
    if not 0 <= bos < len(tokenizer):
        raise ValueError(
            f"bos_token_id={bos} is not in the vocabulary of {len(tokenizer)} tokens; give the id of a token in it"
        )
    return bos


def _too_little(documents: Documents, tokenizer: PreTrainedTokenizerBase, protocol: Protocol) -> str:
    sample = documents.texts[:50]
    tokens = sum(len(_encode(tokenizer, text[:20_000])) for text in sample)
    rate = tokens / sum(len(text[:20_000]) for text in sample)
    lengths = [len(text) * rate for text in documents.texts]
    T, N = protocol.length, protocol.sequences
    crops = sum(max(0, int(length) - MARGIN) // (T - 1) for length in lengths)
    return (
        f"too little text in {documents.source}: {N} crops of {T} tokens need at least "
        f"{N * (T - 1):,} tokens in documents of {T - 1 + MARGIN} or more, evenly enough for "
        f"{protocol.groups} groups of {protocol.per_group}; found about {sum(lengths):,.0f} tokens in "
        f"{len(lengths)} document(s), the longest of about {max(lengths):,.0f}, which hold about "
        f"{crops:,} crops. Give more text, ask for fewer sequences or a smaller length, or join short "
        "documents"
    )
