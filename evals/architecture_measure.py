"""Leakage on an architecture: measurement runs, and layer 0, which knows no position, leaks none.

Text is independent random tokens behind a BOS, so the expected logit of layer 0 depends on the offset alone and its
residual is 0, unless the architecture itself shows that layer where it stands: a recurrence or a convolution before it
reads the tokens from the start on. Whether it does is found without statistics: the same token everywhere gives
logits that are equal along diagonals, or does not.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import ropemods as rm
from evals import tiny_configs
from evals.architecture_subject import Refused, Subject
from ropemods.model.attention_function import observed
from ropemods.model.observation import observing

SEEDS = 0, 1
"""A residual of 0 misses its 99% interval once in a hundred, and two independent ones once in ten thousand."""
WINDOW = 4
DOCUMENTS, WORDS = 24, 200


def protocol(seed: int) -> rm.Protocol:
    return rm.Protocol(
        sequences=48,
        length=24,
        groups=16,
        window=WINDOW,
        early=(WINDOW, 12),
        grid_rows=8,
        batch_size=48,
        replicates=400,
        confidence=0.99,
        text="unigram",
        seed=seed,
    )


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", *(f"w{index}" for index in range(3, tiny_configs.VOCAB))]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="w3"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@cache
def documents() -> tuple[str, ...]:
    generator = torch.Generator().manual_seed(11)
    drawn = torch.randint(3, tiny_configs.VOCAB, (DOCUMENTS, WORDS), generator=generator)
    return tuple(" ".join(f"w{token}" for token in row) for row in drawn.tolist())


def measured(model: PreTrainedModel, seed: int = SEEDS[0]) -> rm.Report:
    try:
        return rm.measure(model, tokenizer(), list(documents()), protocol(seed), progress=False)
    except ValueError as refusal:
        if "leakage is not defined" in str(refusal):
            raise Refused(str(refusal)) from refusal
        raise


def measurement(subject: Subject) -> str | None:
    """Of the stock model and of the modified one; the stock model's layer 0 is 0."""
    undefined = None
    for model in (subject.modified(subject.together()), subject()):
        report = measured(model)
        undefined = next((note for note in report.notes if note.startswith("mask: not defined in layers")), None)
        for name, term in report.terms.items():
            for layer, each in enumerate(term.layers):
                said = name == "mask" and undefined is not None
                assert said or math.isfinite(each.all.value), f"the {name} term of layer {layer} is {each.all.value}"
    found = report.terms["residual"].layers[0].all
    if found.low <= 0 <= found.high:
        return undefined
    reason = position_in_layer_0(subject())
    if reason is not None:
        return f"layer 0 leaks {found.value:.2g} nats²: {reason}"
    again = measured(subject(), SEEDS[1]).terms["residual"].layers[0].all
    assert again.low <= 0 <= again.high, (
        f"the residual of layer 0 is {found.value:.2g} [{found.low:.2g}, {found.high:.2g}], though its logits "
        "depend on offsets alone"
    )
    return None


def position_in_layer_0(model: PreTrainedModel) -> str | None:
    """Why the logits of the first attention layer tell position by themselves; None where they do not."""
    ids = torch.full((1, 16), 7)
    ids[:, 0] = tiny_configs.BOS
    other = ids.clone()
    other[:, 1] = 9
    logits, queries = [], []

    def look(site, rows, call, lse) -> None:
        if site is first:
            key = rows.k_BGSD.repeat_interleave(rows.q_BHTD.shape[1] // rows.k_BGSD.shape[1], dim=1)
            logits.append((rows.q_BHTD @ key.transpose(2, 3) * rows.scale)[..., :16].double())
            queries.append(rows.q_BHTD)

    with torch.no_grad(), observing(model) as observation, observed(look, of=model, want_lse=False):
        first = observation.sites[0]
        for each in (ids, other):
            model(input_ids=each, use_cache=False)
    inner = logits[0][..., 1:, 1:].tril()
    apart = (inner[..., 1:, 1:] - inner[..., :-1, :-1]).abs().max() / inner.abs().max()
    if apart < 1e-5:
        return None
    if not torch.equal(queries[0][:, :, 2:], queries[len(queries) // 2][:, :, 2:]):
        return "what its attention reads at a token already depends on the tokens before it"
    return "its queries or keys are made from absolute position beside RoPE"
