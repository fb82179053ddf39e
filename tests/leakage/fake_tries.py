"""A menu of tries without a model: the stock values, and one try for each line of changes in percent."""

from __future__ import annotations

from ropemods.report.records import Estimate, TextFacts
from ropemods.report.tries import Refused, Tries, Try

HALF = 1.0
"""Half of every interval, in percent."""


def fake_tries(*, residual: float = 0.04, **changes: tuple[float, float, float]) -> Tries:
    """name=(loss, residual, total), in percent; a stock residual at or below 0 is one that is not above its noise."""
    stock = {name: Estimate(1.0, 0.9, 1.1) for name in ("loss", "mask", "total", "bos_mass", "position1_mass")}
    above = residual > 0
    return Tries(
        model="tiny",
        text=TextFacts(source="books.jsonl", documents=64, sequences=64, tokens=64 * 256, digest="0"),
        text_tokens=1_000_000,
        bos_token_id=1,
        protocol={"length": 256, "early": [8, 64], "confidence": 0.95, "sequences": 64, "groups": 32, "window": 8},
        protocol_hash="0123456789ab",
        stock={**stock, "residual": Estimate(residual, residual / 2 if above else residual - 0.01, 0.1)},
        tries=tuple(_try(name, *each, above=above) for name, each in changes.items()),
        refused=(Refused(name="Odd()", why="this model has no such thing"),),
    )


def _try(name: str, loss: float, residual: float, total: float, *, above: bool) -> Try:
    found = {"loss": loss, "residual": residual, "mask": 0.0, "total": total}
    wide = {"loss": HALF / 10}
    return Try(
        name=name,
        mod={"kind": "truncated_rope", "keep": 0.5, "which": "lowest", "layers": None},
        in_recipes=not name.startswith("own"),
        changes={
            what: Estimate(value / 100, (value - wide.get(what, HALF)) / 100, (value + wide.get(what, HALF)) / 100)
            for what, value in found.items()
            if above or what != "residual"
        },
        masses={"bos_mass": Estimate(0.3, 0.29, 0.31), "position1_mass": Estimate(0.01, 0.01, 0.01)},
        time=Estimate(1.1, 1.0, 1.2),
    )
