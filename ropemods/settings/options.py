"""Options, declared once and read from a YAML file and from flags.

A set of options is a frozen dataclass. Its fields say everything there is to say about each option: type, default and
help. The command line, the keys of the YAML file and the help text are all made from them, so they cannot drift.

    @dataclass(frozen=True, kw_only=True)
    class Options:
        model: str = option(REQUIRED, "a model folder, or a name on the hub", positional=True)
        strength: float = option(1.0, "0 is the stock model, 1 the full modification")

    build(Options, from_yaml(Options, "run.yaml"), {"strength": 0.5})    # what comes later wins

From YAML as from flags, an unknown name and a value of another type than the option's are errors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from ropemods.settings.annotations import Unfit, alternatives, fitted
from ropemods.settings.strict_yaml import read, scalar

REQUIRED = dataclasses.MISSING

Options = TypeVar("Options")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Declared:
    """What a field says of its option beside name, type and default."""

    help: str
    positional: bool
    metavar: str | None
    """What stands for a text value in the usage line, as in `--config FILE`."""
    unset: str | None
    """What happens when the option is left at None, in words for the help."""
    parse: Callable[[Any], Any] | None
    """For a list whose items may be written in more than one way: reads one item, or a list of several in one word."""


def option(
    default: Any,
    help: str,
    *,
    positional: bool = False,
    metavar: str | None = None,
    unset: str | None = None,
    parse: Callable[[Any], Any] | None = None,
) -> Any:
    """A dataclass field that is an option. `REQUIRED` for the default makes it one that must be given."""
    declared = Declared(help=help, positional=positional, metavar=metavar, unset=unset, parse=parse)
    return dataclasses.field(default=default, metadata={"option": declared})


def declared(field: dataclasses.Field) -> Declared:
    return field.metadata["option"]


def fields(options: type) -> dict[str, dataclasses.Field]:
    """The options of a class by name, in the order in which it declares them."""
    return {field.name: field for field in dataclasses.fields(options)}


def spelt(name: str) -> str:
    """The option's name as users write it: `try_` is try, which Python keeps for itself."""
    return name.removesuffix("_")


def build(options: type[Options], *layers: Mapping[str, Any]) -> Options:
    """The options from checked layers of values; later layers win."""
    values = {name: value for layer in layers for name, value in layer.items()}
    missing = [name for name, field in fields(options).items() if field.default is REQUIRED and name not in values]
    if missing:
        raise MissingOption(missing)
    return options(**values)


class MissingOption(ValueError):
    """Options that must be given and were not."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(f"missing: {', '.join(names)}")
        self.names = names


def from_yaml(options: type, path: str | Path) -> dict[str, Any]:
    """The values that a YAML file gives for these options, checked."""
    return checked(options, read(path), source=str(path))


def checked(options: type, values: Mapping[Any, Any], *, source: str | None) -> dict[str, Any]:
    """`values` with their types checked, in their final form. `source` is the file they are from, None for flags."""
    known, names = fields(options), {spelt(name): name for name in fields(options)}
    hints = typing.get_type_hints(options)
    result = {}
    for written, value in values.items():
        if written not in names:
            raise ValueError(f"{source}: there is no option {written!r}{did_you_mean(written, names)}")
        name = names[written]
        label = f"--{written}" if source is None else f"{source}: {written}"
        parse = declared(known[name]).parse
        if source is not None and parse is None and isinstance(value, str) and _lists_no_text(hints[name]):
            value = from_text([value], hints[name])  # 8,64 as a flag would have it
        result[name] = converted(value, hints[name], label) if parse is None else _parsed(value, parse, label)
    return result


def _lists_no_text(hint: Any) -> bool:
    lists = [each for each in alternatives(hint) if typing.get_origin(each) is tuple]
    return bool(lists) and str not in alternatives(hint) and str not in alternatives(typing.get_args(lists[0])[0])


def _parsed(value: Any, parse: Callable[[Any], Any], label: str) -> Any:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{label} takes a list, found {shown(value)}; write [{value}], or one item a line")
    try:
        made = [parse(item) for item in value]
        return tuple(each for item in made for each in (item if isinstance(item, list) else [item]))
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from None


def did_you_mean(word: Any, known: Iterable[str]) -> str:
    """What to put behind an unknown word: the nearest known one, and all of them."""
    known = list(known)
    # Case, hyphens and underscores are how the same word is misspelt most often.
    plain = {re.sub("[-_ ]", "", name).lower(): name for name in known}
    near = difflib.get_close_matches(re.sub("[-_ ]", "", str(word)).lower(), plain, n=1)
    suggestion = f" (did you mean {plain[near[0]]!r}?)" if near else ""
    return f"{suggestion}; known: {', '.join(known)}"


def converted(value: Any, hint: Any, name: str) -> Any:
    """`value` in the type of the annotation `hint`, or an error that names key, value and expected type."""
    with contextlib.suppress(Unfit):
        return fitted(hint, value)
    quoted = "; put it in quotes" if str in alternatives(hint) and isinstance(value, int | float) else ""
    raise ValueError(f"{name} takes {in_words(hint)}, found {shown(value)}{quoted}")


def from_text(texts: list[str], hint: Any) -> Any:
    """What the words after a flag mean, as YAML would have it; text stays text wherever the option takes text."""
    for accepts in alternatives(hint):
        if typing.get_origin(accepts) is tuple:
            item = typing.get_args(accepts)[0]
            # A text, or what is read by rules of its own, may hold a comma.
            whole = item is Any or str in alternatives(item)
            return [from_text([text], item) for text in (texts if whole else items(texts))]
    (text,) = texts
    return text if str in alternatives(hint) else scalar(text)


def items(texts: Iterable[str]) -> list[str]:
    """The items of a list, whether it was written 8 64, 8,64 or [8, 64]."""
    text = " ".join(texts).strip()
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    return [item for item in re.split(r"[\s,]+", text) if item]


def in_words(hint: Any) -> str:
    """The annotation, for an error or a help text."""
    plain = {str: "text", int: "a whole number", float: "a number", bool: "true or false", types.NoneType: "null"}
    several = {"text": "texts", "a whole number": "whole numbers", "a number": "numbers"}
    words = []
    for accepts in alternatives(hint):
        arguments = typing.get_args(accepts)
        if accepts in plain:
            words.append(plain[accepts])
        elif typing.get_origin(accepts) is Literal:
            words.append(" or ".join(", ".join(map(_literal, arguments)).rsplit(", ", 1)))
        else:
            item = in_words(arguments[0])
            count = "" if arguments[-1] is Ellipsis else f"{len(arguments)} "
            words.append(f"a list of {count}{several.get(item, item)}")
    return " or ".join(words)


def _literal(choice: Any) -> str:
    return str(choice).lower() if isinstance(choice, bool) else str(choice)


def shown(value: Any) -> str:
    """A value and what it is, for an error."""
    kinds = {dict: "a mapping", list: "a list", tuple: "a list", str: "text", bool: "true or false", int: "a number"}
    kinds |= {float: "a number", types.NoneType: "null"}
    return repr(value) if value is None else f"{value!r} ({kinds.get(type(value), type(value).__name__)})"
