"""`ropemods COMMAND …`: the command line. One file here for each command; `ropemods --help` imports no torch.

To add a command, add its file and its name to `COMMANDS`.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import platform
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from types import FrameType

import ropemods
from ropemods.cli.command import Command, Help, parse
from ropemods.cli.help import help_text

COMMANDS = ("apply", "show", "measure", "compare", "suggest", "train", "export", "bench", "doctor", "completion")

USER_ERROR, FAILURE, INTERRUPTED = 2, 1, 130
"""Exit codes, beside 0: what the user can mend; output that nobody read to the end, or a bug, with its traceback;
Ctrl-C or a termination."""

EXIT_CODES = (
    f"exit codes: 0 done; {USER_ERROR} what you can mend, told in one line; {FAILURE} a bug, with its traceback, or\n"
    f"output that was not read to its end; {INTERRUPTED} Ctrl-C or a termination"
)

LONGEST_MESSAGE = 700
"""Some messages of transformers list every architecture that it knows."""


def main(words: list[str] | None = None) -> int:
    """Run a command line (that of the process by default) and return its exit code."""
    try:
        code = _main(sys.argv[1:] if words is None else words)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    return code


def _main(words: list[str]) -> int:
    name = words[0] if words else ""
    if name in ("--help", "-h", "help") and len(words) > 1:
        if words[1] not in COMMANDS:
            return _no_command(words[1])
        print(help_text(load(words[1]), words[1]))
    elif name in ("--help", "-h", "help"):
        print(overview())
    elif name in ("--version", "-V"):
        print(versions())
    elif name in COMMANDS:
        return _run(load(name), name, words[1:])
    else:
        return _no_command(name)
    return 0


def _no_command(name: str) -> int:
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    found = f"there is no command {name!r}" if name else "no command was given"
    meant = f" (did you mean {near[0]!r}?)" if near else ""
    print(f"ropemods: error: {found}{meant}; commands: {', '.join(COMMANDS)}", file=sys.stderr)
    return USER_ERROR


def load(name: str) -> Command:
    """The command of that name; its file is imported now and not before."""
    return importlib.import_module(f"ropemods.cli.{name}").COMMAND


def overview() -> str:
    """What `ropemods --help` prints."""
    lines = ["usage: ropemods COMMAND ...", "", ropemods.__doc__ or "", ""]
    lines += [f"  {name:<12}{load(name).summary()}" for name in COMMANDS]
    lines += ["", "`ropemods COMMAND --help` shows its options and an example; also: --version"]
    return "\n".join([*lines, EXIT_CODES])


def versions() -> str:
    """What a bug report needs."""
    parts = []
    for package in ("torch", "transformers", "peft"):
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            parts.append(f"{package} missing")
    return f"ropemods {ropemods.__version__} ({', '.join(parts)}, Python {platform.python_version()})"


def _run(command: Command, name: str, words: list[str]) -> int:
    try:
        with _terminable(), warnings.catch_warnings():
            # Of what will change in later versions of the libraries, users of a command can do nothing.
            warnings.simplefilter("ignore", FutureWarning)
            command.run(parse(command, name, words))
        return 0
    except Help:
        print(help_text(command, name))
        return 0
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        print(f"ropemods {name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, ImportError) as error:
        # What users can mend, the library and transformers raise as these. The rest is a bug and keeps its traceback.
        if "--debug" in words:
            traceback.print_exc()
        print(f"ropemods {name}: error: {_one_line(error)}", file=sys.stderr)
        return USER_ERROR


def _one_line(error: Exception) -> str:
    message = " ".join(str(error).split()) or type(error).__name__
    return message if len(message) <= LONGEST_MESSAGE else f"{message[:LONGEST_MESSAGE]} … (--debug shows all of it)"


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let a termination unwind as Ctrl-C does, so that nothing half-written stays behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
