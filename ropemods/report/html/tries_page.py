"""The page of a menu of tries: what follows, changes as dots on intervals, the table, and the recipe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ropemods.report.html.charts import dots
from ropemods.report.html.layout import figure, grid, section, table, with_interval
from ropemods.report.html.markup import Child, Markup, element, join, minus, trusted
from ropemods.report.html.page import head
from ropemods.report.html.style import SCRIPT
from ropemods.report.records import Estimate
from ropemods.report.tried_recipe import recipe
from ropemods.report.tries import HEAD, MASSES, Tries, Try, in_percent, shown_change, shown_stock, shown_time
from ropemods.report.words import NO_VALUE, count

_FAR = 1.0
"""A change of more would press all others against the axis."""
_DRAWN = {"loss": "Loss", "residual": "Residual, early queries", "mask": "Mask, early queries"}
_DRAWN["total"] = "Total, early queries"
_CONTENTS = (("what-follows", "What follows"), ("changes", "Changes"), ("table", "Table"), ("recipe", "Recipe"))
_CHOSEN, _OTHER = "arm1", "arm0"


def render_tries(tries: Tries) -> str:
    """One HTML file, as text."""
    title = f"Modifications tried on {tries.model}, untrained"
    text = tries.text
    told = (
        f"{text.sequences:,} sequences of {tries.protocol['length']} tokens ({count(text.tokens)}) from {text.source}; "
        f"protocol {tries.protocol_hash}."
    )
    body = element(
        "body",
        element("h1", title),
        element("p", told, class_="soft"),
        element("nav", [element("a", name, href=f"#{anchor}") for anchor, name in _CONTENTS], aria_label="Contents"),
        _notes(tries),
        section("what-follows", "What follows", verdict(tries)),
        section("changes", "Changes", *changes(tries)),
        section("table", "All that was measured", *measured(tries)),
        section(
            "recipe",
            "The recipe",
            element("p", "What ", element("code", "ropemods train"), " runs; MODEL and TEXT are yours."),
            element("pre", recipe(tries, {"model_name_or_path": "MODEL", "data": "TEXT"})),
        ),
        element("script", trusted(SCRIPT)),
    )
    return join(trusted("<!doctype html>\n"), element("html", head(title), body, lang="en"), "\n")


def verdict(tries: Tries) -> Markup:
    """What follows from the figures."""
    told = minus(f"{_sentence(tries.reason)} {tries.remedy()}")
    return element("ul", element("li", told, class_="falls" if tries.chosen is not None else "rises"), class_="lead")


def changes(tries: Tries) -> list[Markup]:
    """What each modification does, drawn."""
    return [element("p", minus(tries.basis()), class_="soft"), grid(*_figures(tries), wide=True)]


def measured(tries: Tries) -> list[Markup | None]:
    """The same as a table, and what was not tried."""
    return [_table(tries), _refused(tries)]


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _notes(tries: Tries) -> Markup | None:
    if not tries.notes:
        return None
    return element("div", element("ul", [element("li", note) for note in tries.notes]), class_="notes")


def _figures(tries: Tries) -> Iterator[Markup]:
    for name, caption in _DRAWN.items():
        found = [(each, each.changes[name]) for each in tries.tries if name in each.changes]
        near = [(each, change) for each, change in found if change.value <= _FAR]
        far = [f"{each.name} {in_percent(change, name)[0]}" for each, change in found if change.value > _FAR]
        if near:
            rows = [(each.name, _look(each, tries), _in_percent(change)) for each, change in near]
            drawing = dots(rows, title=caption, unit="% against the model itself", longest=26)
            note = minus(f"Not drawn: {', '.join(far)}.") if far else None
            yield figure(caption, drawing, note, name=HEAD[name])


def _look(each: Try, tries: Tries) -> str:
    return _CHOSEN if each is tries.chosen else _OTHER


def _in_percent(change: Estimate) -> Estimate:
    # A wide interval is cut where its row would be; the table has the whole of it.
    high = min(change.high, max(change.value, _FAR))
    return replace(change, value=100 * change.value, low=100 * change.low, high=100 * high)


def _table(tries: Tries) -> Markup:
    rows: list[list[Child]] = [["the model itself", *(shown_stock(tries.stock, name) for name in HEAD), "1"]]
    for each in tries.tries:
        name = element("strong", each.name) if each is tries.chosen else each.name
        rows.append([name, *(_cell(each, what) for what in HEAD), minus(shown_time(each))])
    caption = "Changes against the model itself, untrained, at strength 1; in bold what the recipe takes"
    return table(("modification", *HEAD.values(), "time"), rows, caption=caption)


def _cell(each: Try, what: str) -> Child:
    if what in MASSES:
        return shown_change(each, what)
    change = each.changes.get(what)
    return NO_VALUE if change is None else with_interval(in_percent(change, what))


def _refused(tries: Tries) -> Markup | None:
    if not tries.refused:
        return None
    rows: list[list[Child]] = [[each.name, each.why] for each in tries.refused]
    return table(("modification", "why it was not tried"), rows, caption="Not tried", words=True)
