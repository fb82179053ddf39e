"""One command of `ropemods`: its options, what it runs, and the parser made from them.

A command is one file beside this one, which holds a frozen dataclass of options (`ropemods.settings.options`), a
function that runs on them, and `COMMAND`, which joins the two. Such a file imports torch and transformers inside its
functions only, so that `--help` and mistakes in the options answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import typing
from collections.abc import Callable
from typing import Any, NoReturn

from ropemods.settings.options import (
    MissingOption,
    build,
    checked,
    declared,
    did_you_mean,
    fields,
    from_text,
    from_yaml,
    spelt,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """What the command line needs to know of a command."""

    options: type
    """The dataclass of its options. Its docstring is the paragraph that the help begins with."""
    run: Callable[[Any], None]
    example: str
    """Command lines that run."""
    details: Callable[[], str] | None = None
    """More for the help, where that takes imports to say."""

    def summary(self) -> str:
        """The first sentence about it."""
        return self.paragraph().partition(". ")[0].removesuffix(".")

    def paragraph(self) -> str:
        return " ".join(inspect.cleandoc(self.options.__doc__ or "").split())


class Help(Exception):
    """The user asked for help."""


def parse(command: Command, name: str, words: list[str]) -> Any:
    """The options that the words of a command line give; `Help` when they ask for help."""
    parser = _parser(command)
    given, unknown = parser.parse_known_intermixed_args(_underscored(words))
    values = vars(given)
    if values.pop("help", False):
        raise Help
    values.pop("debug", None)
    config = values.pop("config", None)
    if unknown:
        _refuse(unknown, command)
    hints = {spelt(key): hint for key, hint in typing.get_type_hints(command.options).items()}
    for key, value in values.items():
        if value == "" or (isinstance(value, list) and not any(map(str.strip, value)) and value):
            raise ValueError(f"{_as_given(key, command)} is empty; give a value, or leave it out for the default")
    typed = {key: _typed(value, hints[key]) for key, value in values.items()}
    flags = checked(command.options, typed, source=None)
    try:
        return build(command.options, from_yaml(command.options, config) if config else {}, flags)
    except MissingOption as error:
        raise ValueError(_missing(error.names, command, name, values)) from None


def _typed(value: bool | str | list[str], hint: Any) -> Any:
    return value if isinstance(value, bool) else from_text(value if isinstance(value, list) else [value], hint)


def _as_given(key: str, command: Command) -> str:
    positional = {spelt(name) for name, field in fields(command.options).items() if declared(field).positional}
    return key.upper() if key in positional else f"--{key}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(
            re.sub("^argument ", "", message).replace("ignored explicit argument", "is on or off and takes no")
        )


def _parser(command: Command) -> _Parser:
    """A parser that hands on only what was given, as lists of words, so that a YAML file can give the rest."""
    parser = _Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    # Before Python 3.14 argparse takes -1e-3 for a flag.
    parser._negative_number_matcher = re.compile(r"^-(\d|\.\d)")
    hints = typing.get_type_hints(command.options)
    for field_name, field in fields(command.options).items():
        name, hint = spelt(field_name), hints[field_name]
        many = takes_many(hint)
        if declared(field).positional:
            # Not required here: the YAML file may give it.
            parser.add_argument(name, nargs="*" if many else "?")
        elif hint is bool:
            parser.add_argument(f"--{name}", dest=name, action="store_const", const=True)
            parser.add_argument(f"--no_{name}", dest=name, action="store_const", const=False)
        else:
            parser.add_argument(f"--{name}", dest=name, nargs="+" if many else None)
    parser.add_argument("--config")
    parser.add_argument("--debug", action="store_true")
    parser.add_argument("--help", "-h", action="store_true")
    return parser


def takes_many(hint: Any) -> bool:
    return any(typing.get_origin(part) is tuple for part in (hint, *typing.get_args(hint)))


def _underscored(words: list[str]) -> list[str]:
    """`--attn-implementation` as `--attn_implementation`; what stands behind a bare `--` is left alone."""
    end = words.index("--") if "--" in words else len(words)
    spelt = []
    for word in words[:end]:
        flag, equals, value = word.partition("=")
        spelt.append(f"--{flag[2:].replace('-', '_')}{equals}{value}" if word.startswith("--") else word)
    return spelt + words[end:]


def _refuse(unknown: list[str], command: Command) -> NoReturn:
    word = unknown[0]
    if not word.startswith("-"):
        raise ValueError(
            f"{word!r} is one argument too many; put a text with spaces in quotes, and no value behind a flag that is "
            "on or off"
        )
    known = [spelt(name) for name, field in fields(command.options).items() if not declared(field).positional]
    flags = [f"--{name}" for name in (*known, "config", "debug", "help")]
    raise ValueError(f"there is no option {word.partition('=')[0]}{did_you_mean(word.partition('=')[0], flags)}")


def _missing(names: list[str], command: Command, name: str, given: dict[str, Any]) -> str:
    known, hints = fields(command.options), typing.get_type_hints(command.options)
    missing = [each.upper() if declared(known[each]).positional else f"--{each}" for each in names]
    verb = "is" if len(missing) == 1 else "are"
    message = f"{', '.join(missing)} {verb} missing; `ropemods {name} --help` shows an example"
    greedy = [
        f"--{each}"
        for each in given
        if each in hints and takes_many(hints[each]) and not declared(known[each]).positional
    ]
    if greedy and missing[0].isupper():
        message += f" ({greedy[0]} takes every word up to the next flag, so put {missing[0]} before it)"
    return message
