"""`suggest(..., trying=True)`: each modification of a menu put on the model, untrained, measured, and taken off again.

The menu is what the modifications say of themselves (`Mod.worth_trying`), those of others too, if registered or
installed. All read the same crops, so changes are paired. What calibrates does so on other crops of the same text. What
a model refuses is told with its reason, and the others go on.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ropemods import attach, clock
from ropemods.leakage.capture import forward, ranks
from ropemods.leakage.crops import make_crops
from ropemods.leakage.documents import Documents
from ropemods.leakage.measurement import measure
from ropemods.leakage.progress_bar import progress_bar
from ropemods.leakage.protocol import Protocol
from ropemods.model.short_pass import quietly
from ropemods.model.wrappers import base_model, unwrapped
from ropemods.mods import MODS, Mod, kinds, of_kind, outside
from ropemods.report.records import Estimate
from ropemods.report.report import Report
from ropemods.report.tries import CHANGES, MASSES, Refused, Tries, Try, relative, values

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROTOCOL = Protocol(sequences=64, length=256)
CALIBRATION_CROPS = 8
TIMED_ROWS, TIMED_PAIRS = 2, 5
SAMPLE = 1 << 16
"""Characters that tell how many a token has."""


def menu() -> tuple[Mod, ...]:
    """What the known modifications list as worth trying."""
    known = (of_kind(kind) for kind in dict.fromkeys([*kinds(), *outside.installed()]))
    return tuple(mod for kind in known if kind is not None for mod in kind.worth_trying())


def tried(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    documents: Documents,
    protocol: Protocol,
    *,
    bos_token_id: int | None = None,
    progress: bool = True,
) -> Tries:
    """The whole menu on a model that has no modifications; it is left as it was."""
    called = unwrapped(model, to_call=True)
    check_stock(called)
    batch_BT = calibration(documents, tokenizer, protocol, bos_token_id)
    tries: list[Try] = []
    refused: list[Refused] = []
    with progress_bar(1 + len(menu()), "try", "mod", shown=progress and ranks()[0] == 0) as bar:

        def read() -> Report:
            return measure(called, tokenizer, documents, protocol, bos_token_id=bos_token_id, progress=False)

        bar.set_postfix_str("the model itself")
        untouched = read()
        stock = values(untouched)
        for mod in menu():
            bar.update()
            bar.set_postfix_str(str(mod))
            try:
                with put_on(called, mod, batch_BT):
                    tries.append(_try(mod, stock, values(read()), protocol, _time(called, batch_BT)))
            except (ValueError, NotImplementedError) as error:
                refused.append(Refused(name=str(mod), why=" ".join(str(error).split())))
        bar.update()
    return Tries(
        model=untouched.model.name,
        text=untouched.text,
        text_tokens=_tokens(documents, tokenizer),
        bos_token_id=int(batch_BT[0, 0]),
        protocol=untouched.protocol,
        protocol_hash=untouched.protocol_hash,
        stock={name: _shorn(estimate) for name, estimate in stock.items()},
        tries=tuple(tries),
        refused=tuple(refused),
        notes=untouched.notes,
    )


def check_stock(model: nn.Module) -> None:
    if getattr(base_model(model), "ropemods_attached", None) is not None:
        raise ValueError(
            "this model is modified already, and tries start at the model itself; ropemods.remove(model) first, or "
            "name the stock model"
        )


def calibration(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, protocol: Protocol, bos_token_id: int | None = None
) -> Tensor:
    """Token ids (B, T) of crops that are cut anew, for starting values."""
    fewer = Protocol.from_dict(
        {"sequences": CALIBRATION_CROPS, "length": protocol.length, "seed": protocol.seed + 1}
        | {"window": protocol.window, "early": protocol.early, "grid_rows": protocol.grid_rows}
    )
    return make_crops(documents, tokenizer, fewer, bos_token_id=bos_token_id).tokens_NT


@contextlib.contextmanager
def put_on(model: nn.Module, mod: Mod, batch_BT: Tensor) -> Iterator[None]:
    """The modification at strength 1, untrained, calibrated on the batch where it can be; taken off behind it."""
    with warnings.catch_warnings():
        # What it costs is about to be measured.
        warnings.filterwarnings("ignore", message="untrained, at strength 1")
        attach.apply(model, mod, calibration=batch_BT if mod.calibrates else None)
    try:
        yield
    finally:
        attach.remove(model)


def _try(mod: Mod, stock: dict[str, Estimate], found: dict[str, Estimate], protocol: Protocol, time: Estimate) -> Try:
    changes = {name: relative(found[name], stock[name], protocol.confidence) for name in CHANGES if name in found}
    return Try(
        name=str(mod),
        mod=mod.to_json(),
        in_recipes=type(mod) in MODS or _importable(mod),
        changes={name: change for name, change in changes.items() if change is not None},
        masses={name: _shorn(found[name]) for name in MASSES},
        time=time,
    )


def _importable(mod: Mod) -> bool:
    place = str(mod.to_json().get("class", ""))
    return outside.PLACE.fullmatch(place) is not None and not place.startswith("__main__:")


def _shorn(estimate: Estimate) -> Estimate:
    """Without replicates, which are for changes that have been formed."""
    return replace(estimate, replicates=())


def _time(model: nn.Module, batch_BT: Tensor) -> Estimate:
    """A forward pass at strength 1, in those at strength 0, in turns."""
    inner, tokens_BT = base_model(model), batch_BT[:TIMED_ROWS]

    def at(strength: float) -> None:
        attach.set_strength(inner, strength)
        forward(model, tokens_BT)

    device = torch.device(getattr(model, "device", "cpu")).type
    with quietly(inner):
        ratio = clock.ratio(lambda: at(0.0), lambda: at(1.0), pairs=TIMED_PAIRS, device=device, patience=5.0)
    return Estimate(ratio.median, ratio.low, ratio.high)


def _tokens(documents: Documents, tokenizer: Any) -> int:
    """About how many the whole text has."""
    texts: Sequence[str] = documents.texts
    sample = max(texts, key=len)[:SAMPLE]
    each = len(tokenizer(sample, add_special_tokens=False, verbose=False)["input_ids"]) / max(1, len(sample))
    return int(each * sum(map(len, texts)))
