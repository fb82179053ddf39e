"""evals/README.md is what the result files say, and every result file says where it comes from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from evals import before_after_page, claim, page

EVALS = Path(claim.__file__).parent
RECORDS = [(scale, name) for scale, some in page.records().items() for name in some]


def test_the_page_is_made_from_the_results() -> None:
    written = (EVALS / page.PAGE).read_text(encoding="utf-8")
    assert written == page.text(), "run `python -m evals page`"


def test_the_figures_are_made_from_the_results() -> None:
    for name, drawing in page.drawings().items():
        assert (claim.RESULTS / name).read_text(encoding="utf-8") == drawing, "run `python -m evals page`"
        ElementTree.fromstring(drawing)


def test_a_figure_that_nobody_measured_would_be_noticed(tmp_path: Path) -> None:
    """The page follows a result file: change one number, and the text is another."""
    scale, name = RECORDS[0]
    folder = tmp_path / "results"
    folder.mkdir()
    found = page.records()[scale][name]
    claim.result_path(name, scale, folder).write_text(json.dumps(found))
    before = page.text(folder)
    assert found["protocol_hash"] in before
    claim.result_path(name, scale, folder).write_text(json.dumps(found | {"seconds": found["seconds"] + 1}))
    assert page.text(folder) != before


@pytest.mark.parametrize(("scale", "name"), RECORDS)
def test_a_result_names_what_made_it(scale: str, name: str) -> None:
    found = page.records()[scale][name]
    assert not set(claim.ADDED) - set(found)
    assert found["scale"] == scale and found["command"].startswith(f"python -m evals run {name} --scale {scale}")
    assert found["protocol_hash"] == claim.hash_of(found["protocol"])
    assert found["seeds"] == found["protocol"]["seeds"] and {"torch", "transformers", "ropemods"} <= set(
        found["versions"]
    )


@pytest.mark.parametrize(("scale", "name"), RECORDS)
def test_a_result_is_of_the_protocol_that_stands_in_its_program(scale: str, name: str) -> None:
    assert claim.protocol(claim.program(name), scale) == page.records()[scale][name]["protocol"], (
        f"the protocol was changed after the run: run `python -m evals run {name} --scale {scale}` again"
    )


def test_the_readme_says_what_was_found() -> None:
    readme = " ".join((EVALS.parent / "README.md").read_text(encoding="utf-8").split())
    assert before_after_page.headline(page.records()["nano"]["before_after"]) in readme


def test_what_was_not_run_is_said(tmp_path: Path) -> None:
    scale, name = RECORDS[0]
    folder = tmp_path / "results"
    folder.mkdir()
    claim.result_path(name, scale, folder).write_text(json.dumps(page.records()[scale][name]))
    (said,) = re.findall(r"Not run at this scale: (.*)\.", page.text(folder))
    assert set(said.split(", ")) == set(claim.PROGRAMS) - {name}


def test_scales_are_never_mixed(tmp_path: Path) -> None:
    """The same result under two scales gives two parts, each with its own table."""
    scale, name = RECORDS[0]
    folder = tmp_path / "results"
    folder.mkdir()
    found = page.records()[scale][name]
    for other in ("nano", "large"):
        claim.result_path(name, other, folder).write_text(json.dumps(found | {"scale": other}))
    titles = re.findall(r"^# (.*scale.*)$", page.text(folder), flags=re.MULTILINE)
    assert sorted(titles) == sorted(
        f"{title} (scale {other})" for title in ("What we learned", "The programs") for other in ("nano", "large")
    )


def test_a_file_that_is_not_a_program_s_is_refused(tmp_path: Path) -> None:
    (tmp_path / f"{claim.PROGRAMS[0]}.json").write_text('{"scale": "nano"}')
    with pytest.raises(ValueError, match="names no program"):
        page.records(tmp_path)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.text()):
        if not target.startswith("http"):
            assert (EVALS / target).exists(), target
