"""Writes ropemods/API.md: every public name with its signature and what its docstring and its options say of it.

python tests/release/reference.py
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
from pathlib import Path
from typing import Any

import ropemods as rm
from ropemods.mods import MODS

PAGE = Path(rm.__file__).with_name("API.md")
FIRST = ("apply", "remove", "set_strength", "summary", "from_pretrained", "export", "StrengthSchedule", "penalize")
MEASURING = ("measure", "compare", "compare_arms", "suggest", "Protocol", "Report", "Comparison", "Suggestion")
PARTS = {
    "Models": (*FIRST, "Penalty", "Penalized"),
    "Measuring": MEASURING,
    "Modifications": tuple(mod.__name__ for mod in MODS),
    "A modification of your own": ("Mod", "register"),
}
HEAD = """# API

Every name of `import ropemods as rm`, from the docstrings (`python tests/release/reference.py` writes this page).
Options of a modification, of `Protocol` and of `Penalty` are its fields; all are passed by keyword but for the first of
a modification. What each modification costs is in the [README](../README.md).
"""


def signature(name: str, thing: Any, of: str = "") -> str:
    whole = inspect.signature(thing)
    parameters = [each for each in whole.parameters.values() if each.name not in ("self", "cls") or not of]
    words = [
        str(each).replace("'", "") if each.default is inspect.Parameter.empty else worded(each) for each in parameters
    ]
    stars = [each.kind for each in parameters]
    for at, kind in enumerate(stars):
        if kind is inspect.Parameter.KEYWORD_ONLY and inspect.Parameter.VAR_POSITIONAL not in stars[:at]:
            words.insert(at, "*")
            break
    back = whole.return_annotation
    gives = "" if back is inspect.Signature.empty or inspect.isclass(thing) else f" -> {shown(back)}"
    line = f"{name}({', '.join(words)}){gives}"
    return line if len(line) <= 110 else f"{name}(\n" + "".join(f"    {word},\n" for word in words) + f"){gives}"


def worded(parameter: inspect.Parameter) -> str:
    hint = "" if parameter.annotation is inspect.Parameter.empty else f": {shown(parameter.annotation)}"
    return f"{parameter.name}{hint}{' = ' if hint else '='}{parameter.default!r}"


def shown(hint: Any) -> str:
    return hint if isinstance(hint, str) else getattr(hint, "__name__", str(hint))


def fields(thing: type) -> list[str]:
    """A line for every field of a dataclass, with what the text below it says."""
    said: dict[str, str] = {}
    for base in reversed(thing.__mro__):
        if base.__module__.startswith("ropemods"):
            (tree,) = ast.parse(inspect.cleandoc("\n" + inspect.getsource(base))).body
            body = tree.body if isinstance(tree, ast.ClassDef) else []
            for field, text in itertools.pairwise(body):
                match field, text:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                        said[name] = " ".join(words.split())
    return [
        f"- `{each.name}: {shown(each.type)}`{'' if each.name not in said else f': {said[each.name]}'}"
        for each in dataclasses.fields(thing)
    ]


def methods(name: str, thing: type) -> list[str]:
    lines = []
    for base in reversed(thing.__mro__):
        if base.__module__.startswith("ropemods"):
            for own, value in vars(base).items():
                value = getattr(value, "__func__", value)
                text = inspect.getdoc(value)
                if own.startswith(("_", "on_")) or not text or vars(thing).get(own, value) is not value:
                    continue
                if isinstance(value, property):
                    lines.append(f"- `.{own}`: {' '.join(text.split())}")
                elif inspect.isfunction(value):
                    lines.append(f"- `{signature('.' + own, value, name)}`: {' '.join(text.split())}")
    return lines


def entry(name: str) -> str:
    thing = getattr(rm, name)
    is_mod = inspect.isclass(thing) and issubclass(thing, rm.Mod)
    text = inspect.getdoc(inspect.getmodule(thing)) if is_mod and thing is not rm.Mod else inspect.getdoc(thing)
    made = name not in ("Report", "Comparison", "Suggestion", "Mod", "Penalized")  # those are given, or derived from
    parts = [f"### {name}", f"```python\n{signature(name, thing)}\n```" if made else "", text or ""]
    if inspect.isclass(thing):
        options = dataclasses.is_dataclass(thing) and (not is_mod or thing is rm.Mod)
        parts += ["\n".join(fields(thing)) if options else ""]
        parts += ["\n".join(methods(name, thing)) if not is_mod else ""]
    return "\n\n".join(part for part in parts if part)


def page() -> str:
    return "\n".join(
        [HEAD, *(f"## {part}\n\n" + "\n\n".join(map(entry, names)) + "\n" for part, names in PARTS.items())]
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
