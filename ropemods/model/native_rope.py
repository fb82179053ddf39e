"""Edited frequencies in transformers' own words, where it has words for them.

A proposal counts only if transformers' own init function makes exactly the edited tables from it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ropemods.model.anatomy import anatomy_of
from ropemods.model.rope_tables import Table
from ropemods.mods.base import Edits, edited

DROPPED = 1e30
"""A longrope factor that stops a band: its phase at any position is below what fp32 can add to 1."""


def native_parameters(model: PreTrainedModel, edits: Edits, stock: dict[str, Any]) -> dict[str, Any] | None:
    """Rope parameters in transformers' own words that give exactly the edited frequencies; None if there are none."""
    if _many_of_a_type(model):
        return None
    proposals = per_table(model, stock, lambda part, table: _native(model, part, table, edits) or {})
    return proposals if all(parts(model, proposals)) else None


def expressed(
    model: PreTrainedModel, edits: Edits, stock: dict[str, Any], spelled_out: bool = False
) -> dict[str, Any] | str:
    """Stock rope parameters for the edited frequencies, or why there are none.

    Where no type has a word for them, or they are to be `spelled_out`, longrope's factors per band can say any fixed
    table: factor_k is the stock frequency over the wanted one.
    """
    native = None if spelled_out else native_parameters(model, edits, stock)
    if native is not None:
        return native
    if _many_of_a_type(model):
        return "its layers rotate by tables of their own, which one set of rope parameters does not describe"
    kinds = {part.get("rope_type", "default") for part in parts(model, stock)}
    if "dynamic" in kinds:
        return "rope type 'dynamic' computes its frequencies anew at every length, which no list of factors can say"
    proposals = per_table(model, stock, lambda part, table: _spelled_out(model, part, table, edits) or {})
    if not all(parts(model, proposals)):
        return f"no stock rope type gives its frequencies over the base type {', '.join(sorted(kinds))}"
    return proposals


def _many_of_a_type(model: PreTrainedModel) -> bool:
    """Whether several tables share one entry of the config, and something beside the entry tells them apart."""
    types = [table.layer_type for table in anatomy_of(model).tables]
    return len(types) > len(set(types))


def _spelled_out(model: PreTrainedModel, part: dict[str, Any], table: Table, edits: Edits) -> dict[str, Any] | None:
    wanted = {name: value.cpu().float() for name, value in _wanted(table, edits).items()}
    config = table.module.config
    count = len(wanted["inv_freq"])
    base = part["rope_theta"]
    power = base ** (torch.arange(0, 2 * count, 2, dtype=torch.int64).float() / (2 * count))
    scaling = float(getattr(table.module, f"{table.prefix}attention_scaling"))
    proposal = {
        "rope_type": "longrope",
        "rope_theta": base,
        "attention_factor": scaling,
        "original_max_position_embeddings": config.max_position_embeddings,
        "factor": 1.0,
    }
    if scaling != 1:  # the names under which vLLM and SGLang look for it
        proposal |= {"short_mscale": scaling, "long_mscale": scaling}
    if "partial_rotary_factor" in part:
        proposal["partial_rotary_factor"] = part["partial_rotary_factor"]
    for key, name in (("short_factor", "inv_freq"), ("long_factor", "long_inv_freq")):
        frequency = wanted.get(name, wanted["inv_freq"])
        proposal[key] = [_factor(w, p) for w, p in zip(frequency, power, strict=True)]
    if "long_inv_freq" in wanted:
        proposal["original_max_position_embeddings"] = part["original_max_position_embeddings"]
    return proposal if _gives(table, proposal, wanted) else None


def _factor(wanted: Tensor, power: Tensor) -> float:
    """The fp32 factor with 1 / (factor · power) = wanted to the last bit, sought among its nearest neighbours."""
    if wanted == 0:
        return DROPPED
    guess = (1.0 / (wanted.double() * power.double())).float()
    candidates = [guess]
    for direction in (-torch.inf, torch.inf):
        step = guess
        for _ in range(4):
            step = torch.nextafter(step, torch.tensor(direction))
            candidates.append(step)
    exact = [c for c in candidates if 1.0 / (c * power) == wanted]
    return float(exact[0] if exact else guess)


def _native(model: PreTrainedModel, part: dict[str, Any], table: Table, edits: Edits) -> dict[str, Any] | None:
    kind = part.get("rope_type", "default")
    wanted = _wanted(table, edits)
    proposals = []
    keep = edits[0][0].share_kept if len(edits) == 1 else None
    if kind in ("default", "linear") and keep is not None:
        extra = {"factor": part["factor"]} if kind == "linear" else {}
        base = {k: v for k, v in part.items() if k not in ("rope_type", "partial_rotary_factor", "factor")}
        proposals.append(base | extra | {"rope_type": "proportional", "partial_rotary_factor": keep})
    if kind == "longrope":
        dropped = [float(f) == 0.0 for f in edited(torch.ones(len(wanted["inv_freq"])), edits)]
        factors = {
            name: [DROPPED if gone else factor for gone, factor in zip(dropped, part[name], strict=True)]
            for name in ("short_factor", "long_factor")
        }
        if any(dropped):
            proposals.append(part | factors)
    for proposal in proposals:
        if _gives(table, proposal, wanted):
            return proposal
    return None


def _wanted(table: Table, edits: Edits) -> dict[str, Tensor]:
    """The edited buffers of a table, by their names without its prefix."""
    return {name.removeprefix(table.prefix): edited(value, edits) for name, value in table.pristine.items()}


def gives(model: PreTrainedModel, parameters: dict[str, Any], edits: Edits) -> bool:
    """Whether transformers makes exactly the edited tables from these rope parameters."""
    try:
        each = list(zip(anatomy_of(model).tables, parts(model, parameters), strict=True))
        return all(_gives(table, part, _wanted(table, edits)) for table, part in each)
    except (KeyError, TypeError, ValueError):  # they are from a file, and not rope parameters at all
        return False


def _gives(table: Table, proposal: dict[str, Any], wanted: dict[str, Tensor]) -> bool:
    """Whether transformers makes exactly the wanted buffers (to below fp32's reach) from the proposed parameters."""
    config = copy.deepcopy(table.module.config)
    if table.layer_type is None:
        config.rope_parameters = proposal
        typed = {}
    else:
        config.rope_parameters = config.rope_parameters | {table.layer_type: proposal}
        typed = {"layer_type": table.layer_type}
    if not _accepted(config):
        return False
    init = ROPE_INIT_FUNCTIONS[proposal["rope_type"]]
    made, scaling = init(config, **typed)
    stock_scaling = getattr(table.module, f"{table.prefix}attention_scaling")
    made_buffers = {"inv_freq": made, "original_inv_freq": made}
    if "long_inv_freq" in wanted:
        length = proposal["original_max_position_embeddings"] + 1
        made_buffers["long_inv_freq"] = init(config, seq_len=length, **typed)[0]
    return scaling == stock_scaling and all(
        made_buffers[name].shape == value.shape
        # What DROPPED leaves of a band turns by less than 1e-20 at any position.
        and torch.equal(torch.where(made_buffers[name] < 1e-28, 0.0, made_buffers[name]), value.cpu().float())
        for name, value in wanted.items()
    )


def _accepted(config: PreTrainedConfig) -> bool:
    """Whether the config's own checks let its rope parameters pass; some architectures know only some types."""
    for check in getattr(type(config), "__class_validators__", []):
        if check.__name__ == "validate_rope":
            try:
                check(config)
            except Exception:  # each architecture refuses with an error of its own
                return False
    return True


def per_table(model: PreTrainedModel, stock: dict[str, Any], change) -> dict[str, Any]:
    """`stock` with its rope parameters changed, table by table where they are kept by layer type."""
    by_type = {table.layer_type: table for table in anatomy_of(model).tables}
    if set(by_type) == {None}:
        return change(stock, by_type[None])
    return {
        key: change(value, by_type[key]) if key in by_type else copy.deepcopy(value) for key, value in stock.items()
    }


def parts(model: PreTrainedModel, parameters: dict[str, Any]) -> list[dict[str, Any]]:
    types = [table.layer_type for table in anatomy_of(model).tables]
    return [parameters] if types == [None] else [parameters[key] for key in types if key is not None]
