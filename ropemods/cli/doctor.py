"""`ropemods doctor`: what works on this machine, and what to do about what does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from ropemods.cli.command import Command


@dataclass(frozen=True, kw_only=True)
class Options:
    """Say what works on this machine, and what would bring the rest. Versions, devices, attention kernels, extras,
    installed modifications and caches have a line each: `ok` works; `-` is not there; `!!` stands in the way of
    ropemods itself, and the command then ends with exit code 2.
    """


class Finding(NamedTuple):
    mark: str
    """`ok`, `-` or `!!`."""
    what: str
    words: str


def run(options: Options) -> None:
    wrong = []
    for finding in chain(_versions(), _devices(), _kernels(), _extras(), _modifications(), _caches()):
        print(f"{finding.mark:<4}{finding.what:<26}{finding.words}".rstrip(), flush=True)
        if finding.mark == "!!":
            wrong.append(finding.what)
    if wrong:
        raise ValueError(f"{' and '.join(wrong)} will not do; mend what is marked !! as its line says")


def _versions() -> Iterator[Finding]:
    from packaging.version import Version

    from ropemods.settings.versions import OLDEST, versions_of

    for name, there in versions_of(*OLDEST).items():
        oldest = OLDEST.get(name)
        if oldest is None:
            yield Finding("ok", name, there)
        elif Version(there) < Version(oldest):
            yield Finding("!!", name, f"{there} is too old: pip install '{name}>={oldest}'")
        else:
            yield Finding("ok", name, f"{there} ({oldest} or newer)")


def _devices() -> Iterator[Finding]:
    import torch

    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"capability {properties.major}.{properties.minor}"
        yield Finding("ok", f"cuda:{index}", f"{properties.name}, {properties.total_memory >> 30} GiB, {capability}")
    if not torch.cuda.is_available():
        built = f"torch was built for CUDA {torch.version.cuda} and finds no GPU"
        yield Finding("-", "cuda", built if torch.version.cuda else "this torch was built without it")
    yield Finding("ok", "cpu", f"{torch.get_num_threads()} threads (OMP_NUM_THREADS sets them)")


def _kernels() -> Iterator[Finding]:
    """Of the sdpa path. One that was asked for and cannot run is an error of every model."""
    import os

    import torch

    from ropemods.attention import paths

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for path in paths.PATHS:
        reason = paths.obstacle(path, device)
        default = ", by default" if path == paths.DEFAULT else f", with {paths.VARIABLE}={path}"
        words = f"runs on {device.type}{default}" if reason is None else reason
        yield Finding("ok" if reason is None else "-", f"kernel {path}", words)
    if paths.VARIABLE in os.environ:
        try:
            yield Finding("ok", paths.VARIABLE, paths.chosen(device))
        except ValueError as error:
            yield Finding("!!", paths.VARIABLE, f"{error}; unset it, or set it to another")


def _extras() -> Iterator[Finding]:
    import importlib.util
    from importlib.metadata import version

    from ropemods.settings.extras import EXTRAS

    for extra, packages in EXTRAS.items():
        lacking = [package for package in packages if importlib.util.find_spec(package) is None]
        if lacking:
            yield Finding("-", f"extra {extra}", f"no {', '.join(lacking)}: pip install 'ropemods[{extra}]'")
        else:
            yield Finding("ok", f"extra {extra}", ", ".join(f"{name} {version(name)}" for name in packages))


def _modifications() -> Iterator[Finding]:
    """Those of installed packages, which every command loads by name."""
    from ropemods.mods.outside import installed

    for kind, point in installed().items():
        try:
            point.load()
        except Exception as error:  # another's code may raise anything
            package = point.dist.name if point.dist is not None else "its package"
            words = f"importing {point.value} failed ({error}): mend or uninstall {package}"
            yield Finding("!!", f"modification {kind}", " ".join(words.split()))
        else:
            yield Finding("ok", f"modification {kind}", point.value)


def _caches() -> Iterator[Finding]:
    import os
    import shutil
    from pathlib import Path

    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    from ropemods.training import smollm2

    folder = Path(HF_HUB_CACHE)
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    room = f"{shutil.disk_usage(there).free >> 30} GiB free"
    if os.access(there, os.W_OK):
        yield Finding("ok", "hub cache", f"{folder}, {room}{', offline by HF_HUB_OFFLINE' if HF_HUB_OFFLINE else ''}")
    else:
        yield Finding("-", "hub cache", f"{folder} cannot be written: set HF_HOME to a folder of your own")
    try:
        model = smollm2.found()
    except FileNotFoundError as error:
        yield Finding("-", smollm2.NAME, str(error))
    else:
        get = f"not in {smollm2.CACHE}, as only the demo needs it: python -m ropemods.training.smollm2"
        yield Finding("ok" if model else "-", smollm2.NAME, str(model) if model else get)


COMMAND = Command(
    options=Options,
    run=run,
    example="""
        ropemods doctor
    """,
)
