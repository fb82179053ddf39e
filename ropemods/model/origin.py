"""Where a modified model came from, in a form that a stock load does not take for the model itself.

Whoever wants "the same model again" (a trainer its reference model, say) loads what `model.config._name_or_path` names
with `from_pretrained`. So the name in the config of a modified model is marked: it reads, prints and saves as before,
finds the tokenizer as before, and a model that is loaded by it

- is the modified one, as `ropemods.from_pretrained` loads it, where the checkpoint there holds it as it is,
- is an error that says what to do where it would be another: the one before `apply`, or one at another strength.

The name in your own hands, or `str()` of the marked one, loads as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import yaml
from transformers import PreTrainedModel

from ropemods.model.attention_function import PREFIX
from ropemods.model.on_import import wrap


class NameOfModified(str):
    """The name of the checkpoint that a modified model was loaded from."""

    load: Callable[..., Any] | None = None
    """Loads the model from there; None where it is no longer what is there."""
    architecture: str = ""


for _dumper in (yaml.Dumper, yaml.SafeDumper):  # model cards are YAML
    yaml.add_representer(NameOfModified, lambda dumper, name: dumper.represent_str(str(name)), Dumper=_dumper)


def mark(model: PreTrainedModel, *, differs: bool, load: Callable[..., Any] | None = None) -> None:
    """Mark the name in the config of a model that differs from what stock transformers would load by it, or unmark it.

    `load` loads the model from there nevertheless.
    """
    wrap(PreTrainedModel, "from_pretrained", _loading)
    name = getattr(model.config, "_name_or_path", None)
    if not (isinstance(name, str) and name):
        return
    if not differs:
        model.config._name_or_path = str(name)
        return
    marked = NameOfModified(name)
    marked.load, marked.architecture = load, type(model).__name__
    model.config._name_or_path = marked


def _loading(stock: Callable[..., Any], cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
    name = pretrained_model_name_or_path
    if not isinstance(name, NameOfModified):
        return stock(cls, name, *args, **kwargs)
    if name.load is not None and not args and cls.__name__ == name.architecture:
        if isinstance(backend := kwargs.get("attn_implementation"), str):
            kwargs["attn_implementation"] = backend.removeprefix(PREFIX)  # of the model that it is made like
        return name.load(str(name), **kwargs)
    if name.load is not None:  # another class, which loads it exactly or not at all
        return stock(cls, str(name), *args, **kwargs)
    raise ValueError(
        f"{name!s} is what a model that ropemods has modified since was loaded from, and loading it gives the "
        "unmodified model. A trainer that makes its reference model so must be given one: pass "
        "ref_model=copy.deepcopy(model), made before training. To one that takes none (GRPO, RLOO) give a model "
        "that is saved as it is: model.save_pretrained(folder), then ropemods.from_pretrained(folder). Or start "
        "the modifications at strength 0 (StrengthSchedule), where both are the same; for the unmodified model "
        "pass str(name)"
    )
