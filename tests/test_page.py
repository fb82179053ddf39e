"""The page is whole, safe and legible: well-formed, self-contained, escaped, one colour scale."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import math
import re
import runpy
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropemods.report.comparison import compare, compare_arms
from ropemods.report.html import render_page
from ropemods.report.html.axes import Scale, around, power_ticks, round_ticks
from ropemods.report.html.charts import Series, lines
from ropemods.report.html.colour import BLUE_ORANGE, Shade, shared_limit
from ropemods.report.html.heat import heat_map
from ropemods.report.html.markup import Markup, element, join, minus
from ropemods.report.html.style import PALETTE
from ropemods.report.html.tries_page import render_tries
from ropemods.report.records import Estimate, Intervention, Usage
from ropemods.report.report import Report
from tests.leakage.fake_reports import fake_report, four_arms
from tests.leakage.fake_tries import fake_tries

EVIL = "<script>alert(1)</script>\"'&"
VOID = {"meta", "link", "br"}
SVG = re.compile(r"<svg.*?</svg>", re.DOTALL)


class _Outline(HTMLParser):
    """Checks that tags close in order, and keeps what the tests ask about."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        self.scripts += tag == "script"
        if found.get("id"):
            self.ids.append(str(found["id"]))
        if tag == "a":
            self.links.append(str(found["href"]))
        for name in found:
            assert not name.startswith("on"), f"inline handler {name}"

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def _outline(page: str) -> _Outline:
    outline = _Outline()
    outline.feed(page)
    outline.close()
    assert outline.open == []
    return outline


def _odd_report() -> Report:
    """Two ladders of wavelengths, a closed BOS without a logit, and a layer that is NaN throughout."""
    report, nan = fake_report(dropped_bands=4), math.nan
    assert report.sink is not None and report.usage is not None
    ladders = tuple(
        tuple(3 * w for w in row) if layer % 2 else row for layer, row in enumerate(report.usage.wavelengths)
    )
    closed = tuple((nan,) * len(report.sink.query) for _ in ladders)
    term = report.terms["residual"]
    gone = Estimate(nan, nan, nan)
    layers = (dataclasses.replace(term.layers[0], early=gone, all=gone), *term.layers[1:])
    heads = dataclasses.replace(term.heads, early=((nan,) * 6, *term.heads.early[1:]))
    return dataclasses.replace(
        report,
        terms={"residual": dataclasses.replace(term, layers=layers, heads=heads)},
        share=gone,
        sink=dataclasses.replace(report.sink, bos_logit=closed, bos_mass_all=None),
        usage=dataclasses.replace(report.usage, wavelengths=ladders),
    )


def _pages() -> dict[str, str]:
    arms = four_arms()
    many = {f"arm {i}": fake_report(arm_seed=i, layers=2, heads=2) for i in range(8)}
    two = compare(arms["control"], arms["modified"])
    bare = fake_report(optional=False)
    empty = dataclasses.replace(bare, terms={}, held_out_loss=None)
    odd_arms = {"whole": fake_report(), "odd": _odd_report()}
    four, eight, odd = compare_arms(arms), compare_arms(many), compare_arms(odd_arms)
    no_bands = dataclasses.replace(fake_report(), usage=Usage(wavelengths=((),) * 6, query=((),) * 6, key=((),) * 6))
    return {
        "one": render_page({"prose3M": arms["base"]}),
        "two": render_page(two.arms, two),
        "four": render_page(four.arms, four),
        "eight": render_page(eight.arms, eight),
        "odd": render_page(odd.arms, odd),
        "no bands": render_page({"no bands": no_bands}),
        "bare": render_page({"bare": bare}),
        "empty": render_page({"empty": empty}),
        "tries": render_tries(fake_tries(TruncatedRoPE=(0.1, -20, -3), Hot=(20, 4000, 300), **{EVIL: (0, 1, 1)})),
        "wide": render_page({"wide": fake_report(layers=32, heads=40)}),
    }


PAGES = _pages()


@pytest.mark.parametrize("name", PAGES)
def test_tags_close_in_order_and_links_lead_somewhere(name: str) -> None:
    outline = _outline(PAGES[name])
    assert outline.links and {link[1:] for link in outline.links} <= set(outline.ids)
    assert len(outline.ids) == len(set(outline.ids))


@pytest.mark.parametrize("name", PAGES)
def test_every_drawing_is_well_formed_and_described(name: str) -> None:
    drawings = SVG.findall(PAGES[name])
    assert len(drawings) >= {"empty": 0, "tries": 4}.get(name, 8)
    for text in drawings:
        root = ET.fromstring(text)
        decorative = root.get("aria-hidden") == "true"
        assert decorative or (root.get("role") == "img" and len(root.get("aria-label", "")) > 10)
        for node in root.iter():
            for value in node.attrib.values():
                assert "nan" not in value.split() and "inf" not in value.split(), value


@pytest.mark.parametrize("name", PAGES)
def test_numbers_in_drawings_are_finite_and_inside(name: str) -> None:
    for text in SVG.findall(PAGES[name]):
        root = ET.fromstring(text)
        _, _, width, height = map(float, root.get("viewBox", "").split())
        for node in root.iter():
            for key, limit in (("x", width), ("cx", width), ("y", height), ("cy", height)):
                if key in node.attrib:
                    assert -1 <= float(node.attrib[key]) <= limit + 1, (node.attrib, name)


@pytest.mark.parametrize("name", PAGES)
def test_nothing_outside_the_file_is_asked_for(name: str) -> None:
    page = PAGES[name]
    for reference in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert reference.startswith("#") or reference == "data:,"
    assert not re.search(r"https?:|//[a-z]|@import|url\(", page)
    assert "default-src 'none'" in page.replace("&#x27;", "'")


def test_the_policy_allows_the_script_that_is_there_and_no_other() -> None:
    page = PAGES["four"]
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"'sha256-{digest}'" in page.replace("&#x27;", "'")
    assert _outline(page).scripts == 1


def test_strings_from_data_cannot_become_markup() -> None:
    swap = Intervention(name=EVIL, kind=EVIL, early_residual=Estimate(1, 0, 2), change=Estimate(-0.5, -0.6, -0.4))
    base = fake_report(name=EVIL)
    report = dataclasses.replace(
        base,
        command=EVIL,
        created=EVIL,
        notes=(EVIL,),
        interventions=(swap,),
        controls=(dataclasses.replace(base.controls[0], name=EVIL, expected=EVIL, passed=False),),
        versions={EVIL: EVIL},
        text=dataclasses.replace(base.text, source=EVIL, digest=EVIL),
        model=dataclasses.replace(
            base.model, type=EVIL, dtype=EVIL, attention=EVIL, mods=({"kind": EVIL},), rope={EVIL: 1}
        ),
    )
    comparison = compare_arms({EVIL: report, f"{EVIL}2": report})
    for page in (render_page({EVIL: report}), render_page(comparison.arms, comparison)):
        outline = _outline(page)
        assert outline.scripts == 1
        assert "<script>alert" not in page
        assert any(EVIL in text for text in outline.texts)
        for text in SVG.findall(page):
            assert all(node.tag != "script" for node in ET.fromstring(text).iter())


@given(st.text(), st.text())
def test_any_text_comes_back_from_an_element(text: str, attribute: str) -> None:
    heard: list[str] = []

    class Listener(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert (tag, attrs) == ("td", [("title", attribute)])

        def handle_data(self, data: str) -> None:
            heard.append(data)

    # A parser reads every kind of line end as \n, and no browser shows a NUL.
    listener = Listener()
    listener.feed(element("td", text, title=attribute))
    listener.close()
    assert "".join(heard) == text


def test_missing_sections_are_left_out() -> None:
    ids = _outline(PAGES["bare"]).ids
    assert ids == ["headline", "by-query", "by-head", "provenance"]
    assert _outline(PAGES["empty"]).ids == ["headline", "provenance"]
    assert len(_outline(PAGES["four"]).ids) == 9


def test_a_section_appears_when_one_arm_has_it() -> None:
    arms = {"a": fake_report(optional=False), "b": fake_report(arm_seed=2)}
    assert len(_outline(render_page(arms, compare_arms(arms))).ids) == 9


def _fills(drawing: str) -> dict[str, str]:
    """Colour of every cell by its tooltip."""
    found = {}
    for node in ET.fromstring(drawing).iter("rect"):
        title = node.find("title")
        if title is not None and title.text:
            found[title.text] = node.get("fill", node.get("class", ""))
    return found


def _with_heads(report: Report, grid: tuple[tuple[float, ...], ...]) -> Report:
    term = report.terms["residual"]
    heads = dataclasses.replace(term.heads, early=grid)
    terms = {**report.terms, "residual": dataclasses.replace(term, heads=heads)}
    return dataclasses.replace(report, terms=terms)


def _head_maps(arms: Mapping[str, Report]) -> dict[str, dict[str, str]]:
    page = render_page(arms, compare_arms(arms))
    maps = {}
    for drawing in SVG.findall(page):
        described = ET.fromstring(drawing).get("aria-label", "")
        if described.startswith("residual, nats²,") and " by 2 columns" in described:
            maps[described.split(", ")[2].split(".")[0]] = _fills(drawing)
    return maps


def test_equal_values_have_equal_colours_in_all_arms() -> None:
    base = fake_report(layers=1, heads=2)
    arms = {
        "small": _with_heads(base, ((0.01, 0.04),)),
        "large": _with_heads(base, ((0.01, 0.16),)),
    }
    maps = _head_maps(arms)
    small, large = maps["small"], maps["large"]
    assert small["layer 0, head 0: 0.0100"] == large["layer 0, head 0: 0.0100"]
    assert large["layer 0, head 1: 0.160"] == Shade(limit=1.0).colour(1.0)
    # √(0.04 / 0.16) is half way up the scale; on a scale of its own it would be at the top.
    assert small["layer 0, head 1: 0.0400"] == Shade(limit=1.0, root=False).colour(0.5)
    difference = maps["large minus small"]
    assert difference["layer 0, head 0: 0"] == "#f7f7f7"
    assert difference["layer 0, head 1: +0.120"] == Shade(limit=0.16, difference=True).colour(0.12)


def test_a_head_without_a_value_is_greyed_out_and_named() -> None:
    base = fake_report(layers=1, heads=2)
    arms = {n: _with_heads(base, ((math.nan, 0.04),)) for n in ("a", "b")}
    assert _head_maps(arms)["a"]["layer 0, head 0: n/a"] == "nothing"


def test_the_largest_finite_value_sets_the_limit() -> None:
    assert shared_limit([[[0.1, math.nan]], [[-0.7, 0.2], [math.inf]]]) == 0.7
    assert shared_limit([[]]) == 0.0


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@given(st.floats(0, 1), st.floats(0, 1))
def test_more_is_brighter(a: float, b: float) -> None:
    """So the scale also reads in grey, and to every kind of colour blindness."""
    shade = Shade(limit=1.0, root=False)
    low, high = sorted((a, b))
    if high - low > 0.02:
        assert _luminance(shade.colour(low)) < _luminance(shade.colour(high))


@given(st.floats(0.0, 5.0), st.booleans())
def test_differences_are_symmetric_about_the_pale_middle(value: float, root: bool) -> None:
    shade = Shade(limit=2.0, difference=True, root=root)
    assert shade.position(value) + shade.position(-value) == pytest.approx(1.0, abs=1e-12)
    assert shade.colour(0.0) == BLUE_ORANGE[len(BLUE_ORANGE) // 2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_and_line_stands_out_from_its_paper(scheme: str) -> None:
    blocks = re.findall(r":root \{(.*?)\}", PALETTE, re.DOTALL)
    colours = dict(re.findall(r"--(\w+): (#\w{6})", blocks[0 if scheme == "light" else 1]))
    assert len(colours) == 14

    def contrast(name: str) -> float:
        pair = sorted((_luminance(colours[name]), _luminance(colours["paper"])))
        return (pair[1] + 0.05) / (pair[0] + 0.05)

    for name in ("ink", "soft", "good", "bad"):
        assert contrast(name) >= 4.5, name
    for arm in range(6):
        assert contrast(f"arm{arm}") >= 4.5, arm


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_round_ticks_are_few_rising_and_inside(low: float, span: float) -> None:
    high = low + span
    if high - low < 1e-9 * max(abs(low), abs(high)):
        return
    ticks = round_ticks(low, high)
    values = [value for value, _ in ticks]
    assert 1 <= len(ticks) <= 7
    assert values == sorted(values)
    slack = 1e-6 * span
    assert low - slack <= values[0] and values[-1] <= high + slack


@given(st.integers(1, 100), st.integers(1, 20))
def test_power_ticks_are_few_and_inside(low: int, doublings: int) -> None:
    high = low * 2**doublings
    values = [value for value, _ in power_ticks(low, high, base=2)]
    assert len(values) <= 7
    assert all(low <= value <= high for value in values)


def test_a_log_scale_puts_equal_ratios_at_equal_distances() -> None:
    scale = Scale(low=1, high=64, start=0, stop=60, log=True)
    assert [scale(v) for v in (1, 2, 8, 64)] == pytest.approx([0, 10, 30, 60])


@pytest.mark.parametrize("values", [[], [0.0], [math.nan], [3.0], [-1.0, -1.0]])
def test_a_domain_is_never_empty(values: list[float]) -> None:
    low, high = around(values)
    assert low < high and all(low <= v <= high for v in values if math.isfinite(v))


def test_a_line_breaks_where_a_value_is_missing() -> None:
    series = Series(name="a", look="arm0", xs=[1, 2, 4, 8], ys=[1.0, math.nan, 2.0, 3.0])
    drawing = lines([series], title="t", x_label="x", y_label="y")
    (path,) = [n for n in ET.fromstring(drawing).iter("path") if n.get("class") == "line arm0"]
    assert path.get("d", "").count("M") == 2
    assert len([n for n in ET.fromstring(drawing).iter("polygon")]) == 3


def test_a_line_without_any_value_is_an_empty_line() -> None:
    series = Series(name="a", look="arm0", xs=[1, 2], ys=[math.nan, math.nan])
    drawing = lines([series], title="t", x_label="x", y_label="y")
    assert "a: not defined" in ET.fromstring(drawing).get("aria-label", "")


def test_wide_cells_hold_their_value_and_narrow_ones_only_tell_it() -> None:
    shade = Shade(limit=1.0)
    wide = heat_map([[0.25, 0.5]], shade, title="t", columns=["0", "1"], x_label="head")
    names = [str(i) for i in range(40)]
    narrow = heat_map([[0.25] * 40], shade, title="t", columns=names, x_label="head")
    assert ">0.25</text>" in wide and ">0.25</text>" not in narrow
    assert narrow.count("0.250</title>") == 40


def test_stopped_bands_stand_apart_at_the_right() -> None:
    page = render_page({"a": fake_report(dropped_bands=4)})
    assert page.count("a, a stopped band:") == 8  # queries and keys
    assert 'class="zone"' in page
    assert 'class="zone"' not in render_page({"a": fake_report()})


def test_layers_of_another_wavelength_get_a_line_of_their_own() -> None:
    assert "odd, layers 1, 3, 5, wavelength" in PAGES["odd"]
    assert "odd, layers 0, 2, 4, wavelength" in PAGES["odd"]
    assert "whole, wavelength" in PAGES["odd"]


def test_a_model_without_rotary_bands_has_no_frequency_section() -> None:
    assert "usage" not in _outline(PAGES["no bands"]).ids
    assert "usage" in _outline(PAGES["one"]).ids


def test_arms_keep_their_look_through_the_page() -> None:
    page = PAGES["four"]
    looks = {name: set(re.findall(rf'class="marker (arm\d)"><title>{name}[,:]', page)) for name in four_arms()}
    assert looks == {"control": {"arm0"}, "modified": {"arm1"}, "base": {"arm2"}, "untrained": {"arm3"}}


def test_failed_controls_are_said_before_the_numbers() -> None:
    page = PAGES["four"]
    warning = "all arms: the control “positions shifted by 5000” did not give its known answer."
    assert page.index(warning) < page.index('id="headline"')
    assert page.count("✗ FAIL") == 4 and page.count("✓ pass") == 8


def test_a_true_minus_stands_before_numbers_only() -> None:
    assert minus("-0.5 [-1, +2], layers 0-5, a-b -inf") == "−0.5 [−1, +2], layers 0-5, a-b −inf"


def test_markup_is_kept_and_strings_are_escaped() -> None:
    assert join("a<b", element("b", "x&y"), None, ["<", "i"]) == "a&lt;b<b>x&amp;y</b>&lt;i"
    assert isinstance(join("a"), Markup)


def test_html_files_are_written_whole(tmp_path: Path) -> None:
    path = fake_report().to_html(tmp_path / "r.html")
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and text.endswith("</html>\n")
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_the_picture_of_the_explanation_is_the_one_its_script_draws() -> None:
    evals = Path(__file__).resolve().parents[1] / "evals"
    script = runpy.run_path(str(evals / "reading_picture.py"))
    drawn = script["picture"]()
    assert (evals / "reading.svg").read_text(encoding="utf-8") == drawn
    assert ET.fromstring(drawn).get("role") == "img"
    # The definitions, applied to the head that the picture is about.
    assert script["leakage"](script["residual"](script["score"])) < 1e-20
    assert script["leakage"](script["residual"](script["drifting_score"])) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one", "four"])
def test_a_browser_opens_the_page_without_a_complaint(name: str, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium on this machine")
    page = tmp_path / "page.html"
    page.write_text(PAGES[name], encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --enable-logging=stderr --v=0 --dump-dom"
    done = subprocess.run(
        [browser, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    assert done.stdout.count("<svg") == PAGES[name].count("<svg")
