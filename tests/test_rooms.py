"""Imports point down from room to room, and no module imports in a circle; imports within functions count as well."""

from __future__ import annotations

import ast
import dataclasses
import re
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from ropemods.mods import MODS

PACKAGE = Path(__file__).resolve().parents[1] / "ropemods"

ABOVE = ("cli", "training", "bench", "integrations")
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
    "integrations": ("training", "penalty", "leakage", "report", "schedule", "model", "settings"),
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


REPOSITORY = PACKAGE.parent
COMPOSING = {
    path.relative_to(REPOSITORY).with_suffix("").as_posix(): path
    for path in (
        *(REPOSITORY / "evals").glob("architecture*.py"),
        REPOSITORY / "evals" / "naive_attention.py",
        REPOSITORY / "evals" / "interventions.py",
        REPOSITORY / "tests" / "contract.py",
    )
}
"""Programs outside the package that are about every modification, or about none."""
ABOUT_SOME = {
    "ropemods.mods": ({mod.__name__ for mod in MODS} | {mod.kind for mod in MODS}, "the list"),
    "ropemods.leakage.suggestion": (
        {"TruncatedRoPE", "truncated_rope", "learned_sink"},
        "what it reads off a model are values for options that these two have, and no other",
    ),
    "ropemods.report.proposals": ({"TruncatedRoPE"}, "it words the same proposal for people"),
}
"""What may be named where, and why."""
OPTIONS = {field.name for mod in MODS for field in dataclasses.fields(mod)} - {"layers"}


def words_of_modifications(tree: ast.AST) -> set[str]:
    """Classes, kinds and options of modifications that code works with. A text with spaces in it is for people, and
    may name one as an example."""
    known = {mod.__name__ for mod in MODS} | {mod.kind for mod in MODS}
    texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found: set[str] = set()
    for node in ast.walk(tree):
        words: list[str] = []
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.keyword(arg=str(name)):
                words = [name]
            case ast.Import() | ast.ImportFrom():
                words = [part for name in named(node) for part in name.split(".")]
            case ast.Constant(value=str(text)) if id(node) not in texts and not re.search(r"\s", text):
                words = re.findall(r"\w+", text)
            case ast.Call(func=ast.Name(id="getattr" | "hasattr"), args=[_, ast.Constant(value=str(name)), *_]):
                found |= {name} & OPTIONS
        found |= known.intersection(words)
    return found


def test_nothing_outside_the_modifications_knows_one_by_name() -> None:
    own = {f"ropemods.mods.{mod.kind}" for mod in MODS}
    files = {name: path for name, path in MODULES.items() if name not in own} | COMPOSING
    found = {name: words_of_modifications(ast.parse(path.read_text(encoding="utf-8"))) for name, path in files.items()}
    assert {name: words for name, words in found.items() if words} == {
        name: words for name, (words, _) in ABOUT_SOME.items()
    }


@pytest.mark.parametrize(
    "code",
    [
        "isinstance(mod, LearnedSink)",
        "rm.LearnedSink()",
        "from ropemods.mods.learned_sink import sink_with_mass",
        "mod.kind == 'learned_sink'",
        "stages.learned_sink.logit",
        "dict(learned_sink=1)",
        "mods = ['learned_sink:init=0']",
        "f'ropemods.learned_sink.{name}'",
        "getattr(mod, 'keep', None)",
    ],
)
def test_a_name_in_code_is_seen(code: str) -> None:
    assert words_of_modifications(ast.parse(code))


@pytest.mark.parametrize("code", ["said = 'such as LearnedSink(init=0)'", "table.keep()", "getattr(mod, 'layers')"])
def test_words_for_people_and_names_of_others_are_not(code: str) -> None:
    assert not words_of_modifications(ast.parse(code))
