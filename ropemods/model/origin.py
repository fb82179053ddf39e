"""Where a modified model came from, in a form that a stock load does not take for the model itself.

Whoever wants "the same model again" (a trainer its reference model, say) loads what `model.config._name_or_path` names
with `from_pretrained`. For a model that was modified in memory that gives another model, the one before `apply`. So the
name that its config carries while a strength is other than in the folder is marked: it reads, prints and saves as
before, finds the tokenizer as before, and loading a model by it is an error that says what to do. The name in your own
hands, or `str()` of the marked one, loads as ever.
"""

from __future__ import annotations

import functools
from typing import Any

import yaml
from transformers import PreTrainedModel


class ModifiedSince(str):
    """The name of a checkpoint that the model which carries it has left behind."""


for _dumper in (yaml.Dumper, yaml.SafeDumper):  # model cards are YAML
    yaml.add_representer(ModifiedSince, lambda dumper, name: dumper.represent_str(str(name)), Dumper=_dumper)


def mark(model: PreTrainedModel, *, differs: bool) -> None:
    """Mark the name in the config of a model that differs from what is there, or take the mark off."""
    _watch_loading()
    name = getattr(model.config, "_name_or_path", None)
    if isinstance(name, str) and name:
        model.config._name_or_path = (ModifiedSince if differs else str)(name)


def _watch_loading() -> None:
    stock = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]
    if hasattr(stock, "ropemods"):
        return

    @functools.wraps(stock)
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(pretrained_model_name_or_path, ModifiedSince):
            raise ValueError(
                f"{pretrained_model_name_or_path!s} is what a model that ropemods has modified since was loaded from, "
                "and loading it gives the unmodified model. A trainer that makes its reference model so must be given "
                "one: pass ref_model=copy.deepcopy(model), made before training, or start the modifications at "
                "strength 0 (StrengthSchedule), where both are the same; for the unmodified model pass str(name)"
            )
        return stock(cls, pretrained_model_name_or_path, *args, **kwargs)

    from_pretrained.ropemods = True  # type: ignore[attr-defined]
    PreTrainedModel.from_pretrained = classmethod(from_pretrained)  # type: ignore[assignment]
