"""What every architecture must hold to with ropemods on it: the list of checks, and the outcome of each."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedConfig

from evals import architecture_mods as mods
from evals import architecture_use as use
from evals import tiny_models
from evals.architecture_measure import measurement
from evals.architecture_subject import Check, Lacking, Refused, Subject, run

CHECKS: dict[str, Check] = {
    "strength 0": mods.strength_zero,
    **mods.BY_KIND,
    "all mods": mods.together,
    "rotation": mods.rotation,
    "cache": use.cached_decode,
    "left padding": use.left_padding,
    "gradients": use.gradients,
    "reload": use.save_and_reload,
    "stock load": use.stock_load,
    "training": use.training,
    "measurement": measurement,
}


def check_all(config_of: Callable[[], PreTrainedConfig]) -> dict[str, dict[str, str]]:
    """Every check's outcome on one small config: pass, refused, stock (the stock model lacks it) or fail, and why."""
    try:
        subject = Subject(config_of())
        run(subject(), tiny_models.tokens())
    except Exception as error:
        reason = f"the stock model does not run here: {type(error).__name__}: {_line(error)}"
        return {name: {"outcome": "stock", "reason": reason} for name in CHECKS}
    return {name: outcome(check, subject) for name, check in CHECKS.items()}


def outcome(check: Check, subject: Subject) -> dict[str, str]:
    try:
        note = check(subject)
    except Refused as refusal:
        return {"outcome": "refused", "reason": _line(refusal)}
    except Lacking as lack:
        return {"outcome": "stock", "reason": _line(lack)}
    except AssertionError as failure:
        return {"outcome": "fail", "reason": _line(failure)}
    except Exception as error:
        return {"outcome": "fail", "reason": f"{type(error).__name__}: {_line(error)}"}
    return {"outcome": "pass", "reason": note or ""}


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]
