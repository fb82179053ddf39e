"""evals/README.md out of the result files: "What we learned" first, then one section a program.

The page holds no figure of its own: every one comes from a result file through its program's `learned` and `section`.
Each scale has a part of its own, so no table mixes two.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from evals.claim import PROGRAMS, RESULTS, Learned, program
from ropemods.settings.files import write_text

PAGE = "README.md"
INTRODUCTION = """# Evidence

What the papers claim, measured again by commands of this repository. Everything below was written by
`python -m evals page` from the files in [results](results): each names its command, seeds, versions, protocol and the
protocol's hash. Negative results stay. [READING.md](READING.md) explains the leakage numbers.

    make evals                                                        everything again
    python -m evals run max_retrieval --scale nano --data DATA        one program
    python -m evals page                                              this page

An interval is a 95% interval; each section says over what.
"""
BESIDE = (
    ("Architectures: every RoPE model of transformers", "results/architectures.md"),
    ("Speed and memory against stock attention", "bench.md"),
    ("What a report's numbers mean", "READING.md"),
)
"""Pages with results that other commands write."""


def records(folder: Path = RESULTS) -> dict[str, dict[str, dict[str, Any]]]:
    """Every result at hand: by scale, then by program in the order of the page."""
    by_scale: dict[str, dict[str, dict[str, Any]]] = {}
    for name in PROGRAMS:
        for path in sorted([*folder.glob(f"{name}.json"), *folder.glob(f"{name}.*.json")]):
            found = json.loads(path.read_text(encoding="utf-8"))
            if found.get("program") != name:
                raise ValueError(f"{path.name} names no program, or another one; run `python -m evals run {name}`")
            by_scale.setdefault(found["scale"], {})[name] = found
    return by_scale


def learned_table(rows: list[Learned]) -> str:
    head = ("claim", "figure", "95% interval", "the paper's, and whether ours agrees", "limits")
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def provenance(found: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return (
        f"`{found['command']}` · protocol {found['protocol_hash']} · scale {found['scale']} · seeds "
        f"{', '.join(map(str, found['seeds']))} · {found['seconds']} s · {found['machine']} · {versions}"
    )


def drawings(folder: Path = RESULTS) -> dict[str, str]:
    """The figures by file name, all under results/."""
    return {
        _figure_name(name, scale): program(name).figure(found)
        for scale, some in records(folder).items()
        for name, found in some.items()
        if hasattr(program(name), "figure")
    }


def _figure_name(name: str, scale: str) -> str:
    return f"{name}.svg" if scale == "nano" else f"{name}.{scale}.svg"


def text(folder: Path = RESULTS) -> str:
    parts = [INTRODUCTION]
    for scale, some in records(folder).items():
        parts.append(f"# What we learned (scale {scale})\n")
        parts.append(
            learned_table([row for name, found in some.items() for row in program(name).learned(found)]) + "\n"
        )
        missing = [name for name in PROGRAMS if name not in some]
        if missing:
            parts.append(f"Not run at this scale: {', '.join(missing)}.\n")
        parts.append(f"# The programs (scale {scale})\n")
        for name, found in some.items():
            parts.append(program(name).section(found).strip() + "\n")
            if hasattr(program(name), "figure"):
                parts.append(f"![{name}](results/{_figure_name(name, scale)})\n")
            parts.append(f"<sub>{provenance(found)}</sub>\n")
    links = [f"- [{title}]({path})" for title, path in BESIDE if (folder.parent / path).exists()]
    parts.append("# Beside these\n\n" + "\n".join(links) + "\n")
    return "\n".join(parts)


def write(folder: Path = RESULTS) -> Path:
    for name, drawing in drawings(folder).items():
        write_text(folder / name, drawing)
    return write_text(folder.parent / PAGE, text(folder))
