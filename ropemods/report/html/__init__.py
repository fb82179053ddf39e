"""Reports and comparisons as a self-contained HTML page, drawn with nothing but text."""

from ropemods.report.html.page import render_page

__all__ = ["render_page"]
