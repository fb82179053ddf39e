"""What a notebook shows: the opening of a page, and every figure of it alone, as an SVG that can be saved.

Sections say which of their figures can stand alone by giving them a name (`layout.figure`, `layout.grid`), so that
nothing is drawn twice, once for the page and once for here.
"""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ropemods.report.changes import Contrasts
from ropemods.report.findings import Findings
from ropemods.report.html.drawing import in_one
from ropemods.report.html.evidence import notes
from ropemods.report.html.headline import opening
from ropemods.report.html.layout import Arm, dress
from ropemods.report.html.markup import Child, Markup, element, trusted
from ropemods.report.html.page import sections, subtitle_of, title_of
from ropemods.report.html.style import FIGURE, PART
from ropemods.settings.files import write_text


@dataclass(frozen=True)
class Figure:
    """One figure. A notebook shows it; `save` writes it."""

    name: str
    svg: str = field(repr=False)

    def _repr_svg_(self) -> str:
        return self.svg

    def _repr_html_(self) -> str:
        # Notebooks show an SVG as an image, which knows neither their theme nor how wide they are; this they prefer.
        return self.svg

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it as an SVG file: no network, no libraries, light and dark."""
        return write_text(path, f"{self.svg}\n")


def part(title: str, *children: Child | None) -> Markup:
    """A part of a page for a notebook, with the page's style, which reaches nothing around it."""
    # Not a heading: a notebook's table of contents lists the headings of its outputs too.
    named = element("p", element("strong", title))
    return element("div", element("style", trusted(PART)), named, *children, class_="ropemods")


def opening_part(reports: Mapping[str, Findings], comparison: Contrasts | None = None) -> Markup:
    """The opening of the page of these reports."""
    arms = dress(reports, comparison)
    read_first = notes(arms, comparison.differences if comparison is not None else ())
    subtitle = element("p", subtitle_of(arms), class_="soft")
    return part(title_of(arms, comparison), subtitle, read_first, *opening(arms, comparison))


def figures(reports: Mapping[str, Findings], comparison: Contrasts | None = None) -> dict[str, Figure]:
    """Every figure of the page of these reports, by name."""
    arms = dress(reports, comparison)
    return taken_out(sections(arms, comparison).values(), arms)


def taken_out(parts: Iterable[Markup], arms: Sequence[Arm] = ()) -> dict[str, Figure]:
    """The named figures of parts of a page, in their order, with a legend where there is more than one arm."""
    found = {}
    for tree in map(ET.fromstring, parts):
        for node in tree.iter():
            if (name := node.get("data-name")) is not None:
                found[name] = Figure(name, _alone(name, node, arms))
    return found


def _alone(name: str, node: ET.Element, arms: Sequence[Arm]) -> Markup:
    panels = {
        figure.findtext("figcaption", ""): [ET.tostring(svg, encoding="unicode") for svg in figure.findall("svg")]
        for figure in node.iter("figure")
    }
    drawn = "".join(chart for charts in panels.values() for chart in charts)
    legend = [(arm.name, arm.look) for arm in arms if len(arms) > 1 and f' {arm.look}"' in drawn]
    columns = 2 if len(panels) > 2 else 1
    return in_one(panels, legend=legend, description=name, style=FIGURE, columns=columns, class_="ropemods-figure")
