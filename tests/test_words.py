"""Words and numbers as every table and page writes them."""

from __future__ import annotations

import pytest

from ropemods.report.words import count


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (0, "0"),
        (999_999, "999,999"),
        (3_224_832, "3.2M"),
        (99_949_999, "99.9M"),
        (99_950_000, "100M"),
        (999_499_999, "999M"),
        (999_999_999, "1.0B"),
        (10**9, "1.0B"),
        (123_456_789_012, "123B"),
    ],
)
def test_a_count_is_written_with_the_letter_that_it_rounds_to(value: int, says: str) -> None:
    assert count(value) == says
