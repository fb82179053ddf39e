"""How attention behaves beside the leakage: the sink, the entropy of rows, the use of frequencies.

Every function takes the arms and gives one section, or None where no arm measured it.
Letters: L layers, F frequency bands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean

from ropemods.report.changes import Contrasts
from ropemods.report.html.axes import around
from ropemods.report.html.charts import Series, Zone, lines
from ropemods.report.html.colour import Shade, depth_style, shared_limit
from ropemods.report.html.figures import head_maps, span
from ropemods.report.html.heat import colour_bar, heat_map
from ropemods.report.html.layout import Arm, figure, folded, grid, legend, section
from ropemods.report.html.markup import Markup, element
from ropemods.report.records import Entropy, Grid, Sink, Usage
from ropemods.report.words import number, percent


def sinks(arms: Sequence[Arm], comparison: Contrasts | None) -> Markup | None:
    """Attention to BOS and to position 1 against the query."""
    found = [(arm, arm.report.sink) for arm in arms if arm.report.sink is not None]
    if not found:
        return None
    means = []
    for caption, pick, note in (
        ("Mass on BOS", lambda s: s.bos_mass, "mean over layers and heads"),
        ("Mass on position 1", lambda s: s.position1_mass, "closing BOS can make it the new sink"),
        ("Logit of BOS", lambda s: s.bos_logit, "nats, mean over layers and heads"),
    ):
        series = [
            Series(name=arm.name, look=arm.look, xs=s.query, ys=_mean_rows(pick(s)), markers=False) for arm, s in found
        ]
        mass = "Mass" in caption
        drawing = lines(
            series,
            title=caption,
            x_label="query position",
            y_label="share of the attention" if mass else "nats",
            percent=mass,
            x_name=lambda x: f"query {x:g}",
        )
        means.append(figure(caption, drawing, note, name=f"{caption[0].lower()}{caption[1:]} by query"))
    heads = {arm.name: s.heads_bos_mass for arm, s in found}
    return section(
        "sink",
        "Sink",
        element(
            "p",
            "BOS stands at an offset that always equals the query's position, so it has no "
            "diagonal to be compared with: it is shown as curves.",
        ),
        legend(arms),
        grid(*means),
        folded("Each layer", *_sink_layers(found)),
        folded(
            "Mass on BOS by layer and head",
            grid(
                *head_maps(heads, comparison, "mass on BOS", percent, root=False, inside=percent),
                name="mass on BOS by head",
            ),
        ),
    )


def _sink_layers(found: Sequence[tuple[Arm, Sink]]) -> list[Markup]:
    groups = []
    for caption, pick in (
        ("Mass on BOS", lambda s: s.bos_mass),
        ("Mass on position 1", lambda s: s.position1_mass),
    ):
        limits = around([v for _, sink in found for row in pick(sink) for v in row])
        figures = []
        for arm, sink in found:
            series = [
                Series(
                    name=f"layer {layer}",
                    look="depth",
                    style=depth_style(layer, len(pick(sink))),
                    xs=sink.query,
                    ys=row,
                    markers=False,
                )
                for layer, row in enumerate(pick(sink))
            ]
            title = f"{caption}, {arm.name}"
            drawing = lines(
                series,
                title=title,
                x_label="query position",
                y_label="share of the attention",
                y_limits=limits,
                percent=True,
            )
            figures.append(figure(title, drawing))
        groups.append(grid(*figures, name=f"{caption[0].lower()}{caption[1:]} by layer"))
    return [_depth_legend(len(found[0][1].bos_mass)), *groups]


def _depth_legend(layers: int) -> Markup:
    """One stroke per layer, in the colours of the lines."""
    width = 120 / layers
    strokes = [
        element(
            "line",
            x1=layer * width,
            x2=(layer + 0.9) * width,
            y1=7,
            y2=7,
            class_="line depth",
            style=depth_style(layer, layers),
        )
        for layer in range(layers)
    ]
    sample = element("svg", strokes, viewBox="0 0 120 14", class_="depth", aria_hidden="true")
    text = f"one line per layer: layer 0 to layer {layers - 1}"
    return element("ul", element("li", sample, text), class_="legend")


def _mean_rows(rows: Grid) -> list[float]:
    """Column means over the layers that are defined; NaN where none is."""
    means = []
    for column in zip(*rows, strict=True):
        known = [v for v in column if math.isfinite(v)]
        means.append(fmean(known) if known else math.nan)
    return means


def entropies(arms: Sequence[Arm], comparison: Contrasts | None) -> Markup | None:
    """Entropy of attention rows against the query, and by head."""
    found = [(arm, arm.report.entropy) for arm in arms if arm.report.entropy is not None]
    if not found:
        return None
    series = [Series(name=arm.name, look=arm.look, xs=_middles(e), ys=_mean_rows(e.layers)) for arm, e in found]
    caption = "Entropy by query"
    drawing = lines(
        series,
        title=caption,
        x_label="query position",
        y_label="nats",
        x_name=lambda x: f"near query {x:.0f}",
    )
    shade = Shade(limit=shared_limit(e.layers for _, e in found), root=False)
    maps = []
    for arm, entropy in found:
        columns = [span(start, stop) for start, stop in entropy.bins]
        title = f"Entropy, {arm.name}"
        drawn = heat_map(entropy.layers, shade, title=title, columns=columns, x_label="queries")
        maps.append(figure(title, drawn))
    maps.append(figure("Scale", colour_bar(shade, title="entropy, nats")))
    heads = {arm.name: e.heads for arm, e in found}
    words = (
        "The entropy of a query's attention, in nats: its exponential is the number of keys that "
        "the query spreads over."
    )
    return section(
        "entropy",
        "Entropy",
        element("p", words),
        legend(arms),
        grid(figure(caption, drawing, "mean over layers and heads", name="entropy by query")),
        grid(*maps, name="entropy by layer and query"),
        folded(
            "By layer and head",
            grid(*head_maps(heads, comparison, "entropy, nats", number, root=False), name="entropy by head"),
        ),
    )


def _middles(entropy: Entropy) -> list[float]:
    return [math.sqrt(start * (stop - 1)) for start, stop in entropy.bins]


def usages(arms: Sequence[Arm]) -> Markup | None:
    """The norm of queries and keys in each rotary band, against the band's wavelength."""
    # A model without rotary positions has no bands.
    found = [(a, a.report.usage) for a in arms if a.report.usage and any(a.report.usage.wavelengths)]
    if not found:
        return None
    length = float(arms[0].report.protocol["length"])
    figures = []
    for caption, pick in (("Queries", lambda u: u.query), ("Keys", lambda u: u.key)):
        figures.append(
            figure(caption, _usage_lines(found, pick, caption, length), name=f"{caption.lower()} by wavelength")
        )
    words = (
        "The mean 2-norm of every rotated pair of channels, over layers and heads. A band whose "
        "wavelength passes the sequence length (dotted) never completes a turn; bands that a mod has "
        "stopped stand at the right, in their order."
    )
    groups = []
    for side, choose in (("query", lambda u: u.query), ("key", lambda u: u.key)):
        norms = {arm.name: _mean_heads(choose(usage)) for arm, usage in found}
        shade = Shade(limit=shared_limit(norms.values()), root=False)
        maps = []
        for name, rows in norms.items():
            columns = [str(band) for band in range(len(rows[0]))]
            title = f"{side.capitalize()} norm, {name}"
            drawing = heat_map(rows, shade, title=title, columns=columns, x_label="band, fastest first")
            maps.append(figure(title, drawing))
        bar = figure("Scale", colour_bar(shade, title=f"{side} norm"))
        groups.append(grid(*maps, bar, name=f"{side} norm by layer and band"))
    return section(
        "usage",
        "Frequency usage",
        element("p", words),
        legend(arms),
        grid(*figures),
        folded("Layers × bands", *groups),
    )


def _usage_lines(
    found: Sequence[tuple[Arm, Usage]],
    pick: Callable[[Usage], tuple[Grid, ...]],
    caption: str,
    length: float,
) -> Markup:
    """One line per arm, and one more for each further ladder of wavelengths among its layers."""
    finite = [w for _, usage in found for row in usage.wavelengths for w in row if math.isfinite(w)]
    longest, shortest = max(finite, default=1.0), min(finite, default=1.0)
    bands = max(len(row) for _, usage in found for row in usage.wavelengths)
    step = max(1.15, (longest / shortest) ** (1 / max(1, bands - 1)))
    series, stopped = [], 0
    names: dict[float, str] = {}
    for arm, usage in found:
        norms = _mean_heads(pick(usage))
        for ladder in dict.fromkeys(usage.wavelengths):
            layers = [i for i, row in enumerate(usage.wavelengths) if row == ladder]
            values = _mean_rows(tuple(norms[i] for i in layers))
            turning = [(w, v) for w, v in zip(ladder, values, strict=True) if math.isfinite(w)]
            still = [v for w, v in zip(ladder, values, strict=True) if math.isinf(w)]
            stopped = max(stopped, len(still))
            slots = [(longest * step ** (k + 1.5), v) for k, v in enumerate(still)]
            names |= {x: "a stopped band" for x, _ in slots}
            gap = [(longest * step, math.nan)] if turning and slots else []
            points = turning + gap + slots
            whole = len(layers) == len(usage.wavelengths)
            name = arm.name if whole else f"{arm.name}, layers {_ranges(layers)}"
            xs, ys = zip(*points, strict=True)
            series.append(Series(name=name, look=arm.look, xs=xs, ys=ys))
    zone = Zone(start=longest * step**0.75, label="stopped") if stopped else None
    return lines(
        series,
        title=f"{caption}: norm by wavelength",
        x_label="wavelength, tokens",
        y_label="mean 2-norm",
        x_base=10,
        x_name=lambda x: names.get(x, f"wavelength {number(x)}"),
        zone=zone,
        mark=(length, "length"),
    )


def _mean_heads(norms: tuple[Grid, ...]) -> Grid:
    """[L][heads][F] to [L][F]."""
    return tuple(tuple(_mean_rows(layer)) for layer in norms)


def _ranges(layers: Sequence[int]) -> str:
    """0, 1, 2, 5 as `0-2, 5`."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
