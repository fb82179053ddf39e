"""`ropemods completion`: what makes a shell complete commands and their options.

The script is made from the options that the commands declare, so a new option is completed as soon as there is one.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Literal

from ropemods.cli import COMMANDS, load
from ropemods.cli.command import Command
from ropemods.cli.help import COMMON
from ropemods.settings.annotations import alternatives
from ropemods.settings.options import REQUIRED, declared, fields, option, spelt


@dataclass(frozen=True, kw_only=True)
class Options:
    """Print a script that makes a shell complete. It completes commands, options, and the choices of those that have
    some; where anything may stand, files.
    """

    shell: Literal["bash", "zsh", "fish"] = option(REQUIRED, "bash, zsh or fish", positional=True)


def run(options: Options) -> None:
    print({"bash": bash, "zsh": zsh, "fish": fish}[options.shell]())


def flags_of(command: Command) -> dict[str, str]:
    """Every flag of a command with its help."""
    hints, found = typing.get_type_hints(command.options), {}
    for name, field in fields(command.options).items():
        if not declared(field).positional:
            found[f"--{spelt(name)}"] = declared(field).help
            if hints[name] is bool:
                found[f"--no_{spelt(name)}"] = f"not: {declared(field).help}"
    return found | {flag.split()[0]: text for flag, text in COMMON.items()}


def choices_of(command: Command) -> dict[str, list[str]]:
    """The values of options that have few; under the empty name, those of what is no flag."""
    hints, found = typing.get_type_hints(command.options), {}
    for name, field in fields(command.options).items():
        accepted = [part for part in alternatives(hints[name]) if typing.get_origin(part) is Literal]
        if accepted:
            flag = "" if declared(field).positional else f"--{spelt(name)}"
            found[flag] = [str(value) for part in accepted for value in typing.get_args(part)]
    return found


def bash() -> str:
    """A function that looks at the words so far, and its registration; zsh runs it too."""
    cases = []
    for name in COMMANDS:
        command = load(name)
        choices = choices_of(command)
        plain = " ".join(choices.pop("", []))
        cases += [f"    '{name} {flag}') found='{' '.join(values)}' ;;" for flag, values in choices.items()]
        cases.append(f"    '{name} '*) found='{plain}'; [[ $word == -* ]] && found='{' '.join(flags_of(command))}' ;;")
    return "\n".join(
        [
            "_ropemods() {",
            '  local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" found',
            '  [[ $COMP_CWORD == 1 ]] && before=""',
            '  case "${COMP_WORDS[1]} $before" in',
            *cases,
            "  esac",
            f"  [[ $COMP_CWORD == 1 ]] && found='{' '.join(COMMANDS)} --help --version'",
            '  COMPREPLY=($(compgen -W "$found" -- "$word"))',
            "}",
            "complete -o default -F _ropemods ropemods",
        ]
    )


def zsh() -> str:
    return "\n".join(["autoload -U +X compinit && compinit", "autoload -U +X bashcompinit && bashcompinit", bash()])


def fish() -> str:
    """A line an option."""
    lines = []
    for name in COMMANDS:
        command = load(name)
        choices = choices_of(command)
        at = f"complete -c ropemods -n '__fish_seen_subcommand_from {name}'"
        lines.append(f"complete -c ropemods -n __fish_use_subcommand -a {name} -d {_quoted(command.summary())}")
        lines += [f"{at} -a '{' '.join(choices[''])}'"] if "" in choices else []
        for flag, text in flags_of(command).items():
            values = f" -x -a '{' '.join(choices[flag])}'" if flag in choices else ""
            lines.append(f"{at} -l {flag.removeprefix('--')}{values} -d {_quoted(text)}")
    return "\n".join(lines)


def _quoted(text: str) -> str:
    """For fish, whose quotes know two escapes."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


COMMAND = Command(
    options=Options,
    run=run,
    example="""
        ropemods completion bash > ~/.local/share/bash-completion/completions/ropemods
        ropemods completion zsh > ~/.ropemods.zsh
        ropemods completion fish > ~/.config/fish/completions/ropemods.fish
    """,
)
