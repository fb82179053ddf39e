"""Custom operators whose arguments are records.

torch wants the arguments of an operator flat and in order. Here the order is that of the fields of named tuples, and
is written nowhere else: the schema is made from their annotations, functions are given the records back, and gradients
go by name. One more term is one more field.
"""

from __future__ import annotations

import itertools
import typing
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import Tensor
from torch.library import custom_op

Returned = TypeVar("Returned", bound=tuple)
KINDS: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "SymInt",
    float: "float",
    float | None: "float?",
}


class Operator(Generic[Returned]):
    """`torch.ops.ropemods.<name>`, called with its records; `returns` is the record of tensors that comes back."""

    def __init__(
        self, name: str, records: tuple[type, ...], returns: type[Returned], function: Callable[..., Returned]
    ) -> None:
        self.records, self.returns = records, returns
        self.names = [field for record in records for field in record._fields]  # type: ignore[attr-defined]
        hints = [typing.get_type_hints(record) for record in records]
        wanted = ", ".join(f"{KINDS[kind]} {field}" for each in hints for field, kind in each.items())
        given = ", ".join(["Tensor"] * len(returns._fields))  # type: ignore[attr-defined]
        self.flat = custom_op(
            f"ropemods::{name}",
            lambda *arguments: tuple(function(*self._split(arguments))),
            mutates_args=(),
            schema=f"({wanted}) -> ({given})",
        )

    def __call__(self, *records: tuple[Any, ...]) -> Returned:
        return self.returns(*self.flat(*itertools.chain(*records)))

    def fake(self, function: Callable[..., Returned]) -> None:
        """What it returns, but for the numbers."""
        self.flat.register_fake(lambda *arguments: tuple(function(*self._split(arguments))))

    def gradients(self, function: Callable[..., dict[str, Tensor | None]]) -> None:
        """By name of an argument, from the gradient of the first tensor returned (the others have none), the records,
        and what was returned."""

        def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            ctx.mark_non_differentiable(*output[1:])
            both = (*inputs, *output)
            ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in both))
            ctx.others = [None if isinstance(x, Tensor) else x for x in both]

        def backward(ctx: Any, d_first: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
            both = [x if other is None else other for x, other in zip(ctx.saved_tensors, ctx.others, strict=True)]
            count = len(self.names)
            found = function(d_first, *self._split(both[:count]), self.returns(*both[count:]))
            return tuple(found.get(name) for name in self.names)

        self.flat.register_autograd(backward, setup_context=keep)

    def _split(self, arguments: typing.Sequence[Any]) -> list[Any]:
        left = iter(arguments)
        return [record(*itertools.islice(left, len(record._fields))) for record in self.records]  # type: ignore[attr-defined]


def operator(
    name: str, *records: type, returns: type[Returned]
) -> Callable[[Callable[..., Returned]], Operator[Returned]]:
    """The function as an operator that takes these records."""
    return lambda function: Operator(name, records, returns, function)
