"""Bars are for who watches: a terminal has them, a pipe does not. Of notebooks tests/recipes/test_tour.py says it."""

from __future__ import annotations

import os
import subprocess
import sys
import termios

import pytest

ASK = """
from ropemods.leakage.progress_bar import progress_bar
with progress_bar(3, "measure", "batch", shown=SHOWN) as bar:
    bar.update(3)
"""


@pytest.mark.parametrize(("terminal", "shown"), [(True, True), (True, False), (False, True)])
def test_a_bar_is_written_to_a_terminal_only(terminal: bool, shown: bool) -> None:
    ours, its = os.openpty() if terminal else os.pipe()
    if terminal:
        termios.tcsetwinsize(its, (24, 80))
    code = ASK.replace("SHOWN", str(shown))
    done = subprocess.run([sys.executable, "-c", code], stderr=its, stdout=subprocess.PIPE, check=True)
    os.write(its, b"end")  # so that there is something to read
    said = ""
    while not said.endswith("end"):  # a terminal hands over what it has, not all of it
        said += os.read(ours, 10_000).decode()
    os.close(its)
    os.close(ours)
    assert not done.stdout
    assert ("measure:" in said and "0/3" in said) == (terminal and shown)
    assert (terminal and shown) or said == "end"
