"""What each path can compute: one table, which every refusal comes from.

A call *asks* for things: terms (`terms`), a soft cap, dropout, gradients, a dtype. A `Limit` is what a path cannot take
together, and why. Everything that no limit names runs. Which paths there are on a machine, `paths` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from ropemods.attention import paths
from ropemods.attention.rows import Rows

EAGER = "eager"
"""The path that is asked for where the model is loaded. It has no limits, and every refusal ends in it."""
PATHS = (EAGER, *paths.PATHS)
NAMES = {
    EAGER: "the eager path",
    "flash": "the stock kernels of the sdpa path",
    "triton": "the triton kernels",
    "triton-rows": "stock kernels with row statistics in Triton",
    "flex": "FlexAttention",
}
WIDEST = 256
"""Channels of a head at most, of every kernel on CUDA."""
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One thing that a call may ask for."""

    words: str
    there: Callable[[Rows, str], bool]
    """Of a call, on a type of device."""
    mend: str | None = None
    """How not to ask for it."""


def _widest(rows: Rows) -> int:
    return max(rows.q_BHTD.shape[3], rows.v_BGSD.shape[3])


def _asks_for_gradients(rows: Rows, _: str) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in rows[:3])


ASKED = {
    "row scale": Asked(words="a factor on each row", there=lambda rows, _: rows.row_scale is not None),
    "entropy scale": Asked(
        words="a factor read off the entropy of each row", there=lambda rows, _: rows.entropy_scale is not None
    ),
    "column": Asked(words="a BOS column of its own", there=lambda rows, _: rows.column is not None),
    "slot": Asked(words="a slot (a sink)", there=lambda rows, _: bool(rows.slots)),
    "slot by row": Asked(
        words="a slot with a value, or with a logit of each row",
        there=lambda rows, _: any(slot.value_HD is not None or slot.logit.ndim == 3 for slot in rows.slots),
    ),
    "key bias": Asked(words="a bias of keys", there=lambda rows, _: rows.key_bias is not None),
    "offset bias": Asked(words="a factor and bias by offset", there=lambda rows, _: rows.offset_bias is not None),
    "soft cap": Asked(words="a soft cap on the logits", there=lambda rows, _: rows.softcap is not None),
    "dropout": Asked(
        words="attention dropout",
        there=lambda rows, _: rows.dropout > 0,
        mend="set config.attention_dropout = 0 before the model is made (from_pretrained(..., attention_dropout=0.0))",
    ),
    "gradients": Asked(words="gradients", there=_asks_for_gradients, mend="run under torch.no_grad()"),
    "gradient of the mask": Asked(
        words="a gradient of the mask",
        there=lambda rows, _: torch.is_grad_enabled() and rows.mask is not None and rows.mask.requires_grad,
    ),
    "fp64 or mixed": Asked(
        words="queries, keys and values that are not of one dtype out of float16, bfloat16, float32",
        there=lambda rows, _: len({x.dtype for x in rows[:3]}) > 1 or rows.q_BHTD.dtype not in KERNEL_DTYPES,
    ),
    "wide heads": Asked(words=f"a head wider than {WIDEST}", there=lambda rows, _: _widest(rows) > WIDEST),
    "wide values": Asked(
        words="a value wider than its key", there=lambda rows, _: rows.v_BGSD.shape[3] > rows.q_BHTD.shape[3]
    ),
    "CPU": Asked(words="on a CPU", there=lambda _, device: device == "cpu"),
    "CUDA": Asked(words="on CUDA", there=lambda _, device: device == "cuda"),
    "another device": Asked(words="on a device that is neither", there=lambda _, device: device not in ("cpu", "cuda")),
}
"""What a call may ask for, by the name that limits use. A dtype and a device are asked for like all else."""


@dataclass(frozen=True)
class Limit:
    paths: tuple[str, ...]
    together: tuple[str, ...]
    """Names out of ASKED. One alone is refused by itself."""
    because: str


STOCK, FUSED, FLEX = ("flash", "triton-rows"), ("triton",), ("flex",)
_NO_LSE = "no kernel is known that returns a log-sum-exp there"
LIMITS = (
    Limit(STOCK, ("soft cap",), "which have none"),
    Limit(STOCK, ("key bias",), "which have none"),
    Limit(STOCK, ("offset bias",), "which have none"),
    Limit(STOCK, ("wide values",), "which pad values to the width of keys"),
    Limit(STOCK, ("slot", "dropout"), "which return no log-sum-exp with dropout"),
    Limit(STOCK, ("slot", "gradient of the mask"), "which give none where a log-sum-exp is read"),
    Limit(STOCK, ("entropy scale", "gradient of the mask"), "which give none where a log-sum-exp is read"),
    Limit(STOCK, ("slot", "another device"), _NO_LSE),
    Limit(("flash",), ("entropy scale", "another device"), _NO_LSE),
    Limit(STOCK, ("slot", "fp64 or mixed", "CUDA"), _NO_LSE),
    Limit(("flash",), ("entropy scale", "fp64 or mixed", "CUDA"), _NO_LSE),
    Limit(STOCK, ("slot", "wide heads", "CUDA"), _NO_LSE),
    Limit(("flash",), ("entropy scale", "wide heads", "CUDA"), _NO_LSE),
    Limit(("triton-rows",), ("entropy scale", "fp64 or mixed"), "which take no other"),
    Limit(("triton-rows",), ("entropy scale", "wide heads"), "which end there"),
    Limit(FUSED, ("fp64 or mixed",), "which take no other"),
    Limit(FUSED, ("wide heads",), "which end there"),
    Limit(FUSED, ("gradient of the mask",), "which give none"),
    Limit(FUSED, ("key bias",), "which have none"),
    Limit(FUSED, ("offset bias",), "which have none"),
    Limit(FUSED, ("dropout",), "which have none"),
    Limit(FUSED, ("soft cap", "row scale", "entropy scale"), "which take one of the two factors on soft-capped logits"),
    Limit(FLEX, ("gradients", "CPU"), "which has no backward on a CPU"),
    Limit(FLEX, ("dropout",), "which has none"),
    Limit(FLEX, ("soft cap", "entropy scale"), "which cannot read the entropy of soft-capped logits"),
    Limit(FLEX, ("soft cap", "row scale"), "which caps logits after they are scaled"),
    Limit(FLEX, ("key bias", "entropy scale"), "which reads the entropy of logits without their bias"),
    Limit(FLEX, ("offset bias", "row scale"), "which takes factors by offset alone"),
    Limit(FLEX, ("offset bias", "entropy scale"), "which takes factors by offset alone"),
    Limit(FLEX, ("offset bias", "column"), "which takes factors by offset alone"),
)
"""The first that holds is the reason that is given."""
OF_PATH = {path: [(frozenset(each.together), each) for each in LIMITS if path in each.paths] for path in PATHS}


def limit(path: str, rows: Rows, device: str) -> Limit | None:
    """What of a call a path cannot take; None when it takes the call."""
    asked = {name for name, each in ASKED.items() if each.there(rows, device)}
    for names, each in OF_PATH[path]:
        if names <= asked:
            return each
    return None


def check(path: str, rows: Rows) -> None:
    """Refuse a call that a path cannot take, and name what can."""
    found = limit(path, rows, rows.q_BHTD.device.type)
    if found is not None:
        raise ValueError(refusal(path, found, rows, rows.q_BHTD.device))


def refusal(path: str, found: Limit, rows: Rows, device: torch.device) -> str:
    """What was asked, why it cannot be had, and the ways out."""
    asked = _beside(f"{ASKED[name].words}{_value(name, rows)}" for name in found.together)
    ways = [mend for name in found.together if (mend := ASKED[name].mend) is not None]
    able = [other for other in paths.PATHS if limit(other, rows, device.type) is None]
    here = [other for other in able if paths.obstacle(other, device) is None]
    ways += [f"set {paths.VARIABLE}={other}" for other in here if other != path]
    ways.append("load the model with attn_implementation='eager'")
    if device.type != "cuda":
        elsewhere = [other for other in paths.PATHS if other not in here and limit(other, rows, "cuda") is None]
        ways += [f"on CUDA set {paths.VARIABLE}={_one_of(elsewhere)}"] if elsewhere else []
    return f"{asked} was asked for on {NAMES[path]}, {found.because}; {', or '.join(ways)}"


def _beside(words: Iterable[str]) -> str:
    return " beside ".join(words).replace(" beside on ", " on ")


def _one_of(names: list[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _value(name: str, rows: Rows) -> str:
    values = {"dropout": f" of {rows.dropout:g}", "wide heads": f" ({_widest(rows)} channels)"}
    if name == "fp64 or mixed":
        return f" ({', '.join(str(x.dtype).removeprefix('torch.') for x in rows[:3])})"
    return values.get(name, "")


def table() -> list[list[str]]:
    """The limits for people: a line for each thing that a call may ask for, a column for each path."""
    return [["a call with", *PATHS], *([name, *(_cell(path, name) for path in PATHS)] for name in ASKED)]


def _cell(path: str, name: str) -> str:
    held = [each.together for each in LIMITS if path in each.paths and name in each.together]
    if (name,) in held:
        return "no"
    others = dict.fromkeys(" + ".join(other for other in each if other != name) for each in held)
    return f"not with {', '.join(others)}" if others else "yes"
