"""Results in a notebook: what they show stays within itself, figures stand alone, and frames hold what tables show."""

from __future__ import annotations

import dataclasses
import html
import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest

import ropemods as rm
from ropemods.report.comparison import compare_arms
from ropemods.report.html import render_page
from ropemods.report.html.tries_page import render_tries
from ropemods.report.notebook import InNotebook
from ropemods.report.proposals import Band, Ladder, Suggestion
from ropemods.report.records import Estimate
from ropemods.report.words import TERMS, label, number, percent, shown
from ropemods.settings.extras import MissingPackage
from tests import zoo
from tests.leakage.fake_reports import fake_report, four_arms
from tests.leakage.fake_tries import fake_tries

EVIL = "<script>alert(1)</script>\"'&"
REPORT = dataclasses.replace(fake_report(name=EVIL), command=EVIL)
ARMS = compare_arms(four_arms())
TRIES = fake_tries(TruncatedRoPE=(0.1, -20, -3), **{EVIL: (20, 4000, 300)})
BANDS = tuple(
    Band(index=n, wavelength=6.0 * 4**n, cycles=9 / 4**n, phase=50 / 4**n, query_share=0.2, key_share=0.3)
    for n in range(3)
)
SUGGESTION = Suggestion(
    length=512,
    ladders=(Ladder(layers=(0, 1), bands=BANDS),),
    keep=0.75,
    keep_reason="the next band turns by 3 rad",
    bos_mass=0.3,
    sink=((1.0, 2.0), (0.5, 3.0)),
    sink_reason="BOS has 30% of the attention",
    notes=(EVIL,),
    tries=TRIES,
)
RESULTS = {"report": REPORT, "comparison": ARMS, "suggestion": SUGGESTION}
SHOWN = [pytest.param(result, id=name) for name, result in RESULTS.items()]


def selectors(css: str) -> Iterator[str]:
    """The outermost selectors, those within @media too."""
    while css.strip():
        selector, _, rest = css.partition("{")
        depth, end = 1, 0
        while depth:
            depth += {"{": 1, "}": -1}.get(rest[end], 0)
            end += 1
        css = rest[end:]
        yield from selectors(rest[: end - 1]) if selector.strip().startswith("@media") else [selector.strip()]


def assert_stays_within(root: ET.Element) -> None:
    """A class outermost, every rule of style for what is in it, and nothing that could meet another's."""
    own = root.get("class")
    assert own == ("ropemods-figure" if root.tag == "svg" else "ropemods")  # a part's frame is none of a figure's
    (style,) = (node.text or "" for node in root.iter("style"))
    found = list(selectors(style))
    assert len(found) == 4 and all(selector.endswith(f".{own}.{own}.{own}") for selector in found)
    assert not any(node.get("id") or node.tag in ("script", "h1", "h2", "h3") for node in root.iter())


@pytest.mark.parametrize("result", SHOWN)
def test_what_a_result_shows_stays_within_itself(result: InNotebook) -> None:
    root = ET.fromstring(result._repr_html_())
    assert_stays_within(root)
    assert root.find(".//table") is not None and root.find(".//svg") is not None
    assert len(result._repr_html_()) < 60_000, "a notebook keeps what it shows"


@pytest.mark.parametrize("result", SHOWN)
def test_every_figure_stands_alone(result: InNotebook, tmp_path: Path) -> None:
    for name, figure in result.figures.items():
        saved = figure.save(tmp_path / "figure.svg").read_text(encoding="utf-8")
        assert saved == f"{figure._repr_svg_()}\n" == f"{figure._repr_html_()}\n"
        root = ET.fromstring(saved.replace(' xmlns="http://www.w3.org/2000/svg"', "", 1))
        assert_stays_within(root)
        assert root.get("aria-label") == name and saved.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
        width, height = float(root.get("width", "")), float(root.get("height", ""))
        for group in root.iter("g"):
            x, y = map(float, re.findall(r"[\d.]+", group.get("transform", "")))
            for chart in group.iter("svg"):
                assert x + float(chart.get("width", "")) <= width
                assert y + float(chart.get("y", "")) + float(chart.get("height", "")) <= height


def marks(text: str) -> list[str]:
    return [html.unescape(mark) for mark in re.findall(r"<title>([^<]+)</title></?[prc]", text)]


def test_the_figures_are_those_of_the_page() -> None:
    for result, page in (
        (REPORT, render_page({EVIL: REPORT})),
        (ARMS, render_page(ARMS.arms, ARMS)),
        (SUGGESTION, render_tries(TRIES)),
    ):
        drawn = [mark for figure in result.figures.values() for mark in marks(figure.svg)]
        assert drawn and drawn == marks(page)


def test_a_figure_of_several_arms_says_whose_its_lines_are() -> None:
    def legend(result: InNotebook, name: str) -> list[str | None]:
        svg = result.plot(name).svg.replace(' xmlns="http://www.w3.org/2000/svg"', "", 1)
        return [node.text for node in ET.fromstring(svg).findall("text")]

    assert legend(ARMS, "residual by query") == list(ARMS.arms)
    assert legend(ARMS, "residual by head") == legend(REPORT, "residual by query") == []


@pytest.mark.parametrize("ask", [InNotebook.plot, InNotebook.to_frame], ids=lambda ask: ask.__name__)
def test_an_unknown_name_is_answered_with_the_known_ones(ask) -> None:
    with pytest.raises(ValueError, match=r"'residual by haed' here.*known: \w+"):
        ask(REPORT, "residual by haed")
    with pytest.raises(ValueError, match="nothing was measured"):
        dataclasses.replace(SUGGESTION, tries=None).plot()
    with pytest.raises(ValueError, match="no table 'interventions' here"):
        fake_report(optional=False).to_frame("interventions")


def estimate(row, before: str = "") -> Estimate:
    return Estimate(row[before.removesuffix("_") or "value"], row[f"{before}low"], row[f"{before}high"])


def test_frames_of_a_report_hold_what_its_tables_show() -> None:
    text = REPORT.to_markdown()
    rows = REPORT.to_frame().to_dict("records")
    for row in rows:
        cells = " | ".join(shown(row["quantity"], estimate(row)))
        if row["layer"] != row["layer"]:  # NaN: of the whole model
            assert f"| {label(row['quantity'], row['scope'])} | {cells} |" in text or "mass" in row["quantity"]
        elif row["scope"] == "early":
            assert re.search(rf"^\| {row['layer']:.0f} \|.*{re.escape(cells)}", text, re.MULTILINE)
    assert len(rows) == 6 + 3 + 2 + 6 * REPORT.model.layers
    for row in REPORT.to_frame("queries").to_dict("records"):
        cells = " | ".join(shown(row["term"], estimate(row)))
        assert re.search(rf"^\| {row['start']} to {row['stop'] - 1} \|.*{re.escape(cells)}", text, re.MULTILINE)
    for row in REPORT.to_frame("interventions").to_dict("records"):
        assert f"| {row['name']} | {number(row['early_residual'])} | {percent(row['change'], signed=True)} |" in text
    for row in REPORT.to_frame("controls").to_dict("records"):
        assert f"{' | '.join(shown('control', estimate(row)))} | {'pass' if row['passed'] else 'FAIL'} |" in text
    heads = REPORT.to_frame("heads")
    assert len(heads) == REPORT.model.layers * REPORT.model.heads
    assert [*heads.loc[heads.layer == 2, "mask_early"]] == [*REPORT.terms["mask"].heads.early[2]]
    assert {f"{name}_early" for name in TERMS} | {"bos_mass", "entropy"} <= {*heads}


def test_frames_of_a_comparison_hold_what_its_tables_show() -> None:
    text = ARMS.to_markdown()
    changes = ARMS.to_frame()
    assert len(changes) == sum(len(contrast.changes) for contrast in ARMS.contrasts)
    headline = changes[(changes["from"] == "control") & (changes["to"] == "modified")]
    for row in headline[headline.layer.isna()].to_dict("records"):
        cells = [shown(row["quantity"], estimate(row, f"{arm}_")) for arm in ("before", "after")]
        difference = " | ".join(shown(row["quantity"], estimate(row, "delta_"), signed=True))
        named = label(row["quantity"], row["scope"])
        assert f"| {named} | {cells[0]} | {cells[1]} | {difference} |" in text
    assert [*ARMS.to_frame("arms")["arm"]] == list(ARMS.arms)


def test_frames_of_a_suggestion_hold_what_its_tables_show() -> None:
    bands = SUGGESTION.to_frame()
    assert [*bands["wavelength"]] == [band.wavelength for band in BANDS] and bands["layers"][0] == (0, 1)
    assert [*SUGGESTION.to_frame("sink")["logit"]] == [1.0, 2.0, 0.5, 3.0]
    (row, _) = SUGGESTION.to_frame("tries").to_dict("records")
    change = TRIES.tries[0].changes["residual"]
    assert (row["residual"], row["residual_low"], row["residual_high"]) == (change.value, change.low, change.high)


def test_a_frame_names_what_brings_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingPackage, match=r"to_frame\(\) needs pandas.*ropemods\[train\]"):
        REPORT.to_frame()


def test_a_summary_is_its_text_and_shows_its_lines() -> None:
    summary = rm.summary(rm.apply(zoo.build(), rm.TruncatedRoPE(0.5), strength=0.25))
    plain = str.__str__(summary)
    assert type(plain) is str and summary == plain and f"{summary}" == plain and hash(summary) == hash(plain)
    assert ET.fromstring(summary._repr_html_()).text == plain and plain.startswith("TruncatedRoPE(keep=0.5) · ")
    assert ET.fromstring(type(summary)(EVIL)._repr_html_()).text == EVIL
