"""The help text of a command, made from its options."""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
import typing
from typing import Any, Literal

from ropemods.cli.command import Command, takes_many
from ropemods.settings.options import REQUIRED, declared, fields, spelt

COMMON = {
    "--config FILE": "read options from this YAML file: flat keys named as the flags are; a flag given here wins",
    "--debug": "on an error, show where it was raised",
    "--help": "show this text",
}


def help_text(command: Command, name: str) -> str:
    """The help: usage, a paragraph, every option with its default, and the example."""
    width = min(shutil.get_terminal_size().columns, 100) - 2
    known, hints = fields(command.options), typing.get_type_hints(command.options)
    positional = [each for each, field in known.items() if declared(field).positional]
    demanded = [each for each, field in known.items() if field.default is REQUIRED and each not in positional]
    more = [each for each in positional if takes_many(hints[each])]
    usage = ["ropemods", name, *(each.upper() for each in positional if each not in more)]
    usage += [
        *(_flag(each, known, hints) for each in demanded),
        "[options]",
        *(f"[-- {each} ...]" for each in more),
    ]
    lines = [f"usage: {' '.join(usage)}", "", *textwrap.wrap(command.paragraph(), width), ""]
    for each, field in known.items():
        flag = each.upper() if each in positional else _flag(each, known, hints)
        lines += _entry(flag, f"{declared(field).help} ({_default(field)})", width)
    for flag, text in COMMON.items():
        lines += _entry(flag, text, width)
    if any(hints[each] is bool for each in known):
        lines += ["", *textwrap.wrap("--no_NAME turns off what the YAML file turns on.", width)]
    if any(takes_many(hints[each]) for each in known if each not in positional):
        lines += ["", *textwrap.wrap("Numbers and choices of a list stand apart or with commas: 8 64, 8,64.", width)]
    if command.details is not None:
        lines += ["", command.details().rstrip()]
    lines += ["", "example:", textwrap.indent(textwrap.dedent(command.example).strip(), "  ")]
    return "\n".join(lines)


def _flag(name: str, known: dict[str, dataclasses.Field], hints: dict[str, Any]) -> str:
    hint = hints[name]
    parts = (hint, *typing.get_args(hint))
    choices = [part for part in parts if typing.get_origin(part) is Literal]
    if hint is bool:
        return f"--{spelt(name)}"
    if choices:
        value = "|".join(map(str, typing.get_args(choices[0])))
    else:
        value = declared(known[name]).metavar or ("N" if int in parts else "NUMBER" if float in parts else "TEXT")
    # A list of a certain length has a word for each in its metavar.
    return f"--{name} {value}{' ...' if takes_many(hint) and ' ' not in value else ''}"


def _default(field: dataclasses.Field) -> str:
    if field.default is REQUIRED:
        return "required"
    if field.default is None:
        return f"default: {declared(field).unset}"
    value = "off" if field.default is False else "on" if field.default is True else field.default
    return f"default: {(' '.join(map(str, value)) or 'none') if isinstance(value, tuple) else value}"


def _entry(flag: str, text: str, width: int) -> list[str]:
    column = 30
    lines = textwrap.wrap(text, width - column)
    if len(flag) > column - 4:
        return [f"  {flag}", *(" " * column + line for line in lines)]
    return [f"  {flag:<{column - 2}}{lines[0]}", *(" " * column + line for line in lines[1:])]
