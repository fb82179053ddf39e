"""The whole page, from reports to one HTML file.

The file needs no network and no library: style, drawings and a few lines of script are inside it,
and a content security policy forbids everything else. It works for one report or for any number of
arms; sections that no arm measured are left out.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping

from ropemods.report.changes import Contrasts
from ropemods.report.findings import Findings
from ropemods.report.html.attention_figures import entropies, sinks, usages
from ropemods.report.html.evidence import controls, interventions, notes, provenance
from ropemods.report.html.figures import by_head, by_query
from ropemods.report.html.headline import headline
from ropemods.report.html.layout import Arm, dress
from ropemods.report.html.markup import Markup, element, join, trusted
from ropemods.report.html.style import DRAWINGS, PAGE, PALETTE, SCRIPT
from ropemods.report.words import count

_CONTENTS = {
    "headline": "Headline",
    "by-query": "By query",
    "by-head": "By head",
    "sink": "Sink",
    "entropy": "Entropy",
    "usage": "Frequencies",
    "interventions": "Interventions",
    "controls": "Controls",
    "provenance": "Where the numbers come from",
}


def render_page(reports: Mapping[str, Findings], comparison: Contrasts | None = None) -> str:
    """The page of one report, or of a comparison's arms, as HTML text."""
    arms = dress(reports, comparison)
    shown = sections(arms, comparison)
    links = [element("a", _CONTENTS[anchor], href=f"#{anchor}") for anchor in shown]
    title = title_of(arms, comparison)
    body = element(
        "body",
        element("h1", title),
        element("p", subtitle_of(arms), class_="soft"),
        element("nav", links, aria_label="Contents"),
        notes(arms, comparison.differences if comparison is not None else ()),
        *shown.values(),
        element("script", trusted(SCRIPT)),
    )
    return join(trusted("<!doctype html>\n"), element("html", head(title), body, lang="en"), "\n")


def sections(arms: tuple[Arm, ...], comparison: Contrasts | None) -> dict[str, Markup]:
    """The sections that any of the arms measured, by their anchors."""
    every = {
        "headline": headline(arms, comparison),
        "by-query": by_query(arms),
        "by-head": by_head(arms, comparison),
        "sink": sinks(arms, comparison),
        "entropy": entropies(arms, comparison),
        "usage": usages(arms),
        "interventions": interventions(arms),
        "controls": controls(arms),
        "provenance": provenance(arms),
    }
    return {anchor: content for anchor, content in every.items() if content is not None}


def title_of(arms: tuple[Arm, ...], comparison: Contrasts | None) -> str:
    """Whose leakage."""
    if comparison is None:
        return f"Leakage of {arms[0].report.model.name}"
    return f"Leakage: {comparison.headline.before} to {comparison.headline.after}"


def subtitle_of(arms: tuple[Arm, ...]) -> str:
    """What was read."""
    report = arms[0].report
    models = ", ".join(dict.fromkeys(arm.report.model.name for arm in arms))
    text = report.text
    return (
        f"{models}; {text.sequences:,} sequences of {report.protocol['length']} tokens "
        f"({count(text.tokens)}) from {text.source}; protocol {report.protocol_hash}."
    )


def head(title: str) -> Markup:
    """The head of every page: style, and a policy under which nothing is loaded or run but what stands in it."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("link", rel="icon", href="data:,"),
        element("title", title),
        element("style", trusted(PALETTE + PAGE + DRAWINGS)),
    )
