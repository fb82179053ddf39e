"""`measure`: how much a model's attention tells about absolute position, as a report.

    report = ropemods.measure(model, tokenizer, "books.jsonl")
    print(report.to_markdown())
    report.to_json("before.json")

One forward pass over stationarised crops yields everything but the interventions and controls, which take passes of
their own. Under torchrun, accelerate launch or deepspeed every rank calls `measure`; sequences are shared out, and
every rank gets the same report.
"""

from __future__ import annotations

import contextlib
import datetime
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ropemods.leakage import curves
from ropemods.leakage.capture import capture, forward, losses
from ropemods.leakage.controls import run_controls
from ropemods.leakage.crops import Crops, make_crops
from ropemods.leakage.documents import read_documents
from ropemods.leakage.estimate import estimate
from ropemods.leakage.interventions import REFERENCE, check_names, intervene
from ropemods.leakage.protocol import Protocol
from ropemods.model import casts, config_record, rope_tables
from ropemods.model.observation import Observation, observing
from ropemods.model.wrappers import base_model, unwrapped
from ropemods.report.records import ModelFacts, TextFacts
from ropemods.report.report import Report
from ropemods.settings.versions import versions_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def measure(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    documents: Any,
    protocol: Protocol | Mapping[str, Any] | None = None,
    *,
    bos_token_id: int | None = None,
    interventions: Sequence[str] = (),
    reference: int = REFERENCE,
    controls: bool = False,
    progress: bool = True,
    command: str | None = None,
) -> Report:
    """Measure a model, stock or modified, and leave it as it was.

    - `documents`: texts, a .txt, .jsonl or .parquet file, or a dataset as name:config:split (`read_documents`).
    - `protocol`: how to measure; a mapping of its fields will do, such as another report's.
    - `bos_token_id`: what sequences begin with, where that is not the tokenizer's BOS.
    - `interventions`: names out of `interventions.NAMES`, each with its effect on the early residual.
    - `reference`: how many random tokens make the reference distribution of the swaps.
    - `controls`: also run the measurements whose answer is known.
    - `progress`: a bar on rank 0, where standard error is a terminal.
    """
    protocol = _protocol(protocol)
    check_names(interventions)
    called = unwrapped(model, to_call=True)
    inner = base_model(called)
    source = read_documents(documents, seed=protocol.seed)
    crops = make_crops(source, tokenizer, protocol, bos_token_id=bos_token_id)
    check_fit(inner, crops)
    notes = [*crops.notes, *_length_notes(inner, protocol)]
    dtype = casts.dtype_of(inner)
    wanted = dtype if protocol.dtype == "model" else casts.DTYPES[protocol.dtype]
    stock_logits = None
    if wanted != dtype:
        with _evaluating(called):
            stock_logits = forward(called, crops.tokens_NT[:2])
    with casts.in_dtype(called, wanted), observing(called) as observation:
        _heads(observation)
        if stock_logits is not None:
            notes.append(_drift(stock_logits, called, crops.tokens_NT[:2], dtype, wanted))
        sums, found = capture(observation, crops, protocol, model=called, progress="measure" if progress else None)
        estimates = estimate(sums)
        usage = curves.usage(sums, wavelengths(observation))
        notes += [*observation.notes, *_rope_notes(observation), *found, *estimates.notes]
        done = intervene(
            interventions, observation, crops, called, tokenizer, estimates.terms["residual"], sums, reference, progress
        )
        checks = run_controls(observation, crops, called, estimates.terms, progress) if controls else ()
    return Report(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=_command() if command is None else command,
        seed=protocol.seed,
        versions=versions_of("torch", "transformers"),
        protocol=protocol.to_dict(),
        protocol_hash=protocol.hash(),
        model=_model_facts(inner, observation, dtype),
        text=TextFacts(
            source=crops.source,
            documents=crops.documents,
            sequences=protocol.sequences,
            tokens=crops.tokens_NT.numel(),
            digest=crops.digest,
        ),
        terms=estimates.terms,
        held_out_loss=estimates.held_out_loss,
        closure_gap=estimates.closure_gap,
        share=estimates.share,
        sink=estimates.sink,
        entropy=estimates.entropy,
        usage=usage,
        interventions=done.interventions,
        controls=checks,
        notes=(*notes, *done.notes),
    )


def _protocol(given: Any) -> Protocol:
    if given is None or isinstance(given, Mapping):
        return Protocol.from_dict(given or {})
    if not isinstance(given, Protocol):
        raise TypeError(f"protocol is a Protocol or a mapping of its fields, found {given!r}")
    return given


def wavelengths(observation: Observation) -> list[list[float]]:
    """2π / frequency of every band of every layer, in tokens; empty for a layer that is not known to rotate."""
    rows = []
    for table in observation.tables:
        live = [] if table is None or observation.layout is None else table.live().double().tolist()
        rows.append([2 * torch.pi / f if f else float("inf") for f in live])
    return rows


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    from ropemods.model.short_pass import quietly

    with quietly(base_model(model)):
        yield


def check_fit(model: nn.Module, crops: Crops) -> None:
    vocabulary = model.config.get_text_config(decoder=True).vocab_size  # type: ignore[union-attr]
    largest = int(crops.tokens_NT.max())
    if largest >= vocabulary:
        raise ValueError(
            f"the tokenizer gives token {largest} and the model has a vocabulary of {vocabulary}: they do not belong "
            "together; give the tokenizer that the model was trained with"
        )


def _heads(observation: Observation) -> int:
    """Query heads of every layer; a report's grids have as many for each."""
    found = sorted({site.heads for site in observation.sites})
    if len(found) > 1:
        raise ValueError(
            f"leakage is not defined for this model as a whole: its layers have {found} heads, and a report has "
            "as many for each"
        )
    return found[0]


def _length_notes(model: nn.Module, protocol: Protocol) -> list[str]:
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)  # type: ignore[union-attr]
    if context is None or protocol.length <= context:
        return []
    return [f"sequences of {protocol.length} tokens are longer than the model's context of {context}"]


def _rope_notes(observation: Observation) -> list[str]:
    without = [n for n, table in enumerate(observation.tables) if table is None]
    if len(without) == len(observation.tables):
        return [
            "this model has no rotary frequencies: leakage, sink, entropy and loss are as defined, usage by frequency "
            "and wavelengths are not defined"
        ]
    if observation.layout is None:
        return ["how this model pairs its rotary channels is not known, so usage by frequency is not given"]
    return [f"layers {without} have no rotary frequencies"] if without else []


def _drift(stock_BTV: Tensor, model: nn.Module, tokens_BT: Tensor, dtype: torch.dtype, wanted: torch.dtype) -> str:
    """How far the logits of the model as it is are from those that are measured."""
    measured_BTV = forward(model, tokens_BT)
    apart = (stock_BTV.float() - measured_BTV.float()).abs()
    loss = float(losses(stock_BTV, tokens_BT).mean() - losses(measured_BTV, tokens_BT).mean())
    here, there = (str(each).removeprefix("torch.") for each in (dtype, wanted))
    return (
        f"the model is in {here} and was measured in {there}; over {tokens_BT.numel()} tokens its own logits differ "
        f"from these by {float(apart.mean()):.2g} on average and {float(apart.max()):.2g} at most, its loss by "
        f"{loss:+.2g}"
    )


def _model_facts(model: nn.Module, observation: Observation, dtype: torch.dtype) -> ModelFacts:
    config: Any = model.config
    entry = getattr(config, "ropemods", None) or {}
    rope = entry.get("rope_parameters") or getattr(config_record.rope_config(config), "rope_parameters", None) or {}
    name = config._name_or_path or type(model).__name__
    return ModelFacts(
        name=Path(name).resolve().name if Path(name).is_dir() else name,
        type=config.model_type,
        layers=len(observation.sites),
        heads=_heads(observation),
        parameters=sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()),
        dtype=str(dtype).removeprefix("torch."),
        attention=observation.backend,
        mods=tuple(entry.get("mods", ())),
        strength=dict(entry.get("strength", {})),
        rope=rope_tables.without_sentinel(dict(rope)),
    )


def _command() -> str:
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
