"""Imports point down from room to room, and no module imports in a circle; imports within functions count as well."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from ropemods.mods import MODS

PACKAGE = Path(__file__).resolve().parents[1] / "ropemods"

ABOVE = ("cli", "training", "bench")
"""Rooms that use the package as a user does, by its public names too."""
MAY = {
    "settings": (),
    "attention": (),
    "mods": ("attention", "settings"),
    "model": ("mods", "attention", "settings"),
    "report": ("settings",),
    "admission": ("model", "mods"),
    "attach": ("admission", "model", "mods", "attention"),
    "checkpoint": ("attach", "model", "mods"),
    "schedule": ("checkpoint", "attach", "model"),
    "penalty_callback": (),
    "clock": (),
    "penalty": ("penalty_callback", "model"),
    "leakage": ("clock", "attach", "report", "model", "mods", "attention", "settings"),
    "mod_words": ("mods", "settings"),
    "bench": ("clock", "report", "mods", "attention", "settings"),
    "training": (
        "penalty", "leakage", "report", "schedule", "checkpoint", "attach", "mod_words", "model", "mods", "settings",
    ),
    "cli": (
        "bench", "training", "leakage", "report", "mod_words", "attach", "model", "mods", "attention", "settings",
    ),
    "__main__": ("cli",),
}  # fmt: skip
"""Room by room, a folder or a module of `ropemods`, what it may import."""

MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def named(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        assert not node.level, "write imports from the package's root, as everywhere"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


@cache
def imports(module: str) -> set[str]:
    """The modules of the package that a module imports, wherever in the file it does."""
    found = set()
    for name in (name for node in ast.walk(ast.parse(MODULES[module].read_text())) for name in named(node)):
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {"", module}


def room(module: str) -> str:
    return module.partition(".")[2].partition(".")[0]


@pytest.mark.parametrize("name", sorted({room(module) for module in MODULES} - {""}))
def test_a_room_imports_only_rooms_below_it(name: str) -> None:
    allowed = {name, *MAY[name], *([""] if name in ABOVE else [])}
    wrong = [
        f"{module} imports {other}"
        for module in MODULES
        for other in imports(module)
        if room(module) == name and room(other) not in allowed
    ]
    assert not wrong


def test_the_rooms_are_in_an_order() -> None:
    TopologicalSorter(MAY).prepare()


def test_no_module_imports_itself_by_way_of_others() -> None:
    try:
        TopologicalSorter({module: imports(module) for module in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_attention_knows_nothing_of_transformers() -> None:
    for module, path in MODULES.items():
        if room(module) == "attention":
            names = [name for node in ast.walk(ast.parse(path.read_text())) for name in named(node)]
            assert not [name for name in names if name.partition(".")[0] == "transformers"], module


COMPOSING = ("architecture_checks", "architecture_mods", "architecture_subject", "architecture_use", "naive_attention")
"""Programs of evals/ that are about every modification, not about some."""
ABOUT_SOME = {
    "ropemods": "the public names",
    "ropemods.leakage.suggestion": "it proposes a cut of frequencies and the logits of a sink, in their words",
}


def test_nothing_outside_the_modifications_knows_one_by_name() -> None:
    """Neither its class nor its kind, in code; words for people may name one as an example."""
    known = {mod.__name__ for mod in MODS} | {mod.kind for mod in MODS}
    files = {name: path for name, path in MODULES.items() if room(name) != "mods" and name not in ABOUT_SOME}
    files |= {name: PACKAGE.parent / "evals" / f"{name}.py" for name in COMPOSING}
    files |= {"contract": PACKAGE.parent / "tests" / "contract.py"}
    wrong = []
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            words = {
                ast.Name: lambda node: [node.id],
                ast.Attribute: lambda node: [node.attr],
                ast.Constant: lambda node: [node.value],
                ast.ImportFrom: lambda node: [alias.name for alias in node.names],
            }.get(type(node), lambda node: [])(node)
            wrong += [f"{name}: {word}" for word in words if word in known]
    assert not wrong
