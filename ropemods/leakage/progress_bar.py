"""The bar that measuring shows: on stderr where someone watches it, or in the notebook that runs it."""

from __future__ import annotations

import sys

from tqdm.auto import tqdm


def progress_bar(total: int, description: str | None, unit: str, *, shown: bool = True) -> tqdm:
    """A bar of so many steps; piped, nothing is written. A notebook's stderr is a pipe, but its bar is elsewhere."""
    in_notebook = any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)
    hidden = not shown or (False if in_notebook else None)  # None: unless stderr is a terminal
    return tqdm(total=total, desc=description, unit=unit, file=sys.stderr, disable=hidden, leave=False)
