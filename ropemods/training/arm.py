"""The arms of a comparison.

A before/after number confounds the modification with the fine-tuning, so there are four arms:

    base         the model as it came
    untrained    the base with the modifications at full strength, not trained
    control      fine-tuned without modifications, on the same rows in the same order
    modified     the modifications, walked from strength 0 to 1, fine-tuned

and one more on request, because the training text is itself a treatment:

    stationary   the control, on rows whose sequences begin anywhere

The headline compares modified with control.
"""

from __future__ import annotations

from dataclasses import dataclass

from ropemods.training.token_rows import Text


@dataclass(frozen=True)
class Arm:
    """One of them."""

    name: str
    mods: bool
    trained: bool
    text: Text | None = None
    """None takes the recipe's."""


ARMS = {
    arm.name: arm
    for arm in (
        Arm("base", mods=False, trained=False),
        Arm("untrained", mods=True, trained=False),
        Arm("control", mods=False, trained=True),
        Arm("modified", mods=True, trained=True),
        Arm("stationary", mods=False, trained=True, text="stationary"),
    )
}
