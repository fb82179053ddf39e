"""Which of very many cases run by default: the same ones on every machine and for ever."""

from __future__ import annotations

import os
import zlib


def sampled(case: str, *, one_in: int, unless: str) -> bool:
    """By a hash of the case's name; every case where the environment variable `unless` says `all`."""
    return os.environ.get(unless) == "all" or zlib.crc32(case.encode()) % one_in == 0
