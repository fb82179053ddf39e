"""YAML by strict rules: plain values only, no key twice, and words mean what they look like.

PyYAML's safe loader reads YAML 1.1, where `no` is false, 1e-4 is text, 010 is eight and 1:30 is ninety. Here the
scalars are those of YAML 1.2: `no` is text and 1e-4 a number. A key that stands twice in a mapping is an error.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ropemods.settings.files import read_text

DEEPEST = 20
"""Levels of lists and mappings; no option takes more than three."""


def read(path: str | Path) -> dict[Any, Any]:
    """The mapping in a file; an empty file is an empty one."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    values = _load(read_text(path), str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected lines of `key: value`, found {values!r:.80}")
    return values


def scalar(text: str) -> Any:
    """The value of a word: 0.5, true, [0, 1], some text."""
    try:
        return _load(text, repr(text))
    except ValueError as error:
        raise ValueError(f"{error}; check its brackets and quotes") from None


def _load(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise ValueError(f"{source}{line}: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: {error}") from None


class _StrictLoader(yaml.SafeLoader):
    """A SafeLoader, so it builds plain values and nothing else; only stricter."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.depth > DEEPEST:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(
                None, None, f"lists or mappings are nested too deeply, at most {DEEPEST} levels are read", mark
            )
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} stands here a second time", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_SCALARS = (
    # tag, what it looks like, what it may begin with
    ("merge", r"<<", "<"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ("~", "n", "N", "")),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
)
_StrictLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in _SCALARS:
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))
