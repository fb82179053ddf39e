"""The style sheets and the script that stand inside a page, so that it is one file without network.

PALETTE is the colours of light and dark, DRAWINGS the look of the SVGs, PAGE the rest; PART and FIGURE are the same for
what stands in a page of somebody else's, a notebook.
"""

from __future__ import annotations

from typing import Final

LIGHT: Final = """
  --paper: #ffffff; --panel: #f6f7f9; --ink: #1b1f24; --soft: #5a6370; --rule: #d5dae1;
  --grid: #e4e7ec; --good: #1a6e3c; --bad: #a4291a;
  --arm0: #0063a6; --arm1: #c44e00; --arm2: #5f6670; --arm3: #00795a; --arm4: #a04a86;
  --arm5: #876400;"""
DARK: Final = """
    --paper: #14171b; --panel: #1d2126; --ink: #e8ebef; --soft: #a5afbb; --rule: #39414b;
    --grid: #2b3139; --good: #6fd197; --bad: #ff9384;
    --arm0: #5cb8ff; --arm1: #ff9a52; --arm2: #b4bcc6; --arm3: #43d0a4; --arm4: #e59ad0;
    --arm5: #e3c14f;"""

PALETTE: Final = f"""
:root {{
  color-scheme: light dark;{LIGHT}
}}
@media (prefers-color-scheme: dark) {{
  :root {{{DARK}
  }}
}}
"""

DRAWINGS: Final = """
svg text { font: 11px system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
  fill: var(--ink); }
svg .tick { fill: var(--soft); font-size: 10.5px; }
svg .value { font-size: 10px; }
svg .on-dark { fill: #ffffff; } svg .on-light { fill: #000000; }
svg .halo { paint-order: stroke; stroke: var(--paper); stroke-width: 3px; }
svg .level { stroke: var(--grid); stroke-width: 1; }
svg .zero, svg .axis { stroke: var(--soft); stroke-width: 1; }
svg .mark { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 2 3; }
svg rect { shape-rendering: crispEdges; }
svg .zone { fill: var(--panel); }
svg .nothing { fill: var(--rule); }
svg .reference { fill: var(--soft); fill-opacity: 0.45; }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .band { stroke: none; fill-opacity: 0.17; }
svg .whisker { stroke-width: 2.5; stroke-linecap: round; }
svg .marker { stroke: var(--paper); stroke-width: 0.8; }
svg .line.arm1 { stroke-dasharray: 7 3; } svg .line.arm2 { stroke-dasharray: 2 3; }
svg .line.arm3 { stroke-dasharray: 9 3 2 3; } svg .line.arm4 { stroke-dasharray: 4 2; }
svg .line.arm5 { stroke-dasharray: 1 2 5 2; }
svg .line.depth { stroke: var(--on-light); stroke-width: 1.6; }
@media (prefers-color-scheme: dark) { svg .line.depth { stroke: var(--on-dark); } }
""" + "".join(
    f"svg .line.arm{i}, svg .whisker.arm{i} {{ stroke: var(--arm{i}); }}\n"
    f"svg .band.arm{i}, svg .marker.arm{i} {{ fill: var(--arm{i}); }}\n"
    for i in range(6)
)

PAGE: Final = """
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 1180px; padding: 1.2rem 1rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
}
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.2rem 0 0.4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 0.3rem; padding-top: 0.6rem;
  border-top: 1px solid var(--rule); }
h3 { font-size: 1.02rem; margin: 1.4rem 0 0.2rem; }
p { margin: 0.3rem 0 0.8rem; max-width: 46rem; }
a { color: var(--arm0); }
.soft, figure small { color: var(--soft); }
.lead { font-size: 1.08rem; padding: 0; margin: 0.6rem 0 1rem; list-style: none; max-width: 46rem; }
.lead li { padding-left: 0.8rem; border-left: 4px solid var(--rule); margin: 0.4rem 0; }
.lead .falls { border-color: var(--arm0); } .lead .rises { border-color: var(--arm1); }
nav { display: flex; flex-wrap: wrap; gap: 0.3rem 1rem; margin: 0.8rem 0; font-size: 0.95rem; }
.notes { background: var(--panel); border-left: 4px solid var(--arm1); padding: 0.5rem 0.9rem;
  margin: 0.8rem 0; max-width: 46rem; overflow-wrap: anywhere; }
.notes ul { margin: 0.2rem 0; padding-left: 1.1rem; }
.legend { display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem; margin: 0.5rem 0; padding: 0;
  list-style: none; font-size: 0.95rem; }
.legend li { display: flex; align-items: center; gap: 0.4rem; overflow-wrap: anywhere; }
.legend svg { width: 42px; height: 14px; flex: none; } .legend svg.depth { width: 120px; }
.grid { display: grid; gap: 1rem 1.4rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); }
.grid.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); }
figure { margin: 0.5rem 0 0; min-width: 0; break-inside: avoid; }
figcaption { font-weight: 600; margin-bottom: 0.2rem; overflow-wrap: anywhere; }
figure small { display: block; font-size: 0.86rem; max-width: 460px; }
figure svg { display: block; width: 100%; max-width: 460px; height: auto; }
output { display: block; min-height: 1.3em; font-size: 0.9rem; }
details { margin: 0.8rem 0; } summary { cursor: pointer; color: var(--arm0); padding: 0.3rem 0; }
.scroll { overflow-x: auto; margin: 0.3rem 0 1rem; background:
    linear-gradient(90deg, transparent, var(--paper) 70%) right / 40px 100% no-repeat local,
    linear-gradient(270deg, var(--rule), transparent) right / 14px 100% no-repeat scroll; }
.scroll:focus-visible, summary:focus-visible, a:focus-visible {
  outline: 2px solid var(--arm0); outline-offset: 2px; }
table { border-collapse: collapse; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
.caption { color: var(--soft); margin: 1.2rem 0 0; font-size: 0.92rem; break-after: avoid; }
th, td { padding: 0.28rem 0.7rem; border-bottom: 1px solid var(--rule); text-align: right;
  vertical-align: top; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--rule); }
tbody th { font-weight: 500; }
td small { display: block; color: var(--soft); font-size: 0.84rem; }
table.words td { white-space: normal; text-align: left; overflow-wrap: anywhere; min-width: 5.5rem; }
table.words thead th { text-align: left; } table.words .verdict { white-space: nowrap; }
.pass { color: var(--good); } .fail { color: var(--bad); font-weight: 700; }
code, pre { font-family: ui-monospace, "DejaVu Sans Mono", Consolas, monospace; font-size: 0.88em; }
pre { background: var(--panel); padding: 0.6rem 0.8rem; overflow-x: auto; max-width: 100%; }
@media (max-width: 480px) {
  body { padding: 0.8rem 0.8rem 3rem; } h1 { font-size: 1.4rem; }
  table { font-size: 0.84rem; } th, td { padding: 0.28rem 0.4rem; }
  tbody th:first-child { white-space: normal; min-width: 6rem; }
}
@media print {
  :root { --paper: #fff; --panel: #f6f7f9; --ink: #000; --soft: #444; --rule: #bbb;
    --grid: #ddd; --arm0: #0063a6; --arm1: #c44e00; --arm2: #5f6670; --arm3: #00795a; }
  body { max-width: none; font-size: 11pt; padding: 0; }
  nav, output { display: none; }
  .scroll { overflow: visible; } table { font-size: 8.5pt; } th, td { white-space: normal; }
  .grid { grid-template-columns: repeat(2, 1fr) !important; }
  h2, h3 { break-after: avoid; } tr { break-inside: avoid; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""

# A tap on a mark writes its tooltip below the figure, for screens without a pointer that hovers.
SCRIPT: Final = """
document.addEventListener("click", function (event) {
  const title = event.target.querySelector(":scope > title");
  const figure = event.target.closest("figure");
  const output = figure && figure.querySelector("output");
  if (title && output) { output.textContent = title.textContent; }
});
"""

_IS_DARK: Final = (
    ':is([data-jp-theme-light="false"], .vscode-dark, .vscode-high-contrast, [data-theme="dark"], [theme="dark"])'
)
_IS_LIGHT: Final = ':is([data-jp-theme-light="true"], .vscode-light, [data-theme="light"], [theme="light"])'
"""How JupyterLab, VS Code, documentation sites and Colab mark their pages; without one the reader's system decides."""


def _within(name: str, rules: str) -> str:
    """The rules for an element of that class and what stands in it, and for nothing else.

    The class is written three times so that a notebook's own rules for tables and text weigh less. No `&`: in an SVG
    file a style sheet is XML.
    """
    own = f".{name}" * 3
    dark = f"{{ color-scheme: dark;{DARK} .line.depth {{ stroke: var(--on-dark); }} }}"
    light = f"{{ color-scheme: light;{LIGHT} .line.depth {{ stroke: var(--on-light); }} }}"
    return (
        f"{own} {{{LIGHT}{rules}{DRAWINGS.replace('svg ', '')}}}\n"
        f"@media (prefers-color-scheme: dark) {{ {own} {dark} }}\n{_IS_DARK} {own} {dark}\n{_IS_LIGHT} {own} {light}\n"
    )


FIGURE: Final = _within(
    "ropemods-figure", "max-width: 100%; height: auto; .title { font-size: 12.5px; font-weight: 600; }"
)

PART: Final = _within(
    "ropemods",
    "background: var(--paper); color: var(--ink); padding: 0.6rem 0.9rem 0.9rem; border: 1px solid var(--rule);"
    'font: 14px/1.5 system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif;'
    "tr { background: none; } table { margin: 0; border: none; }" + PAGE + ".lead { font-size: 1.05em; }",
)
