"""Protocol: what it refuses, what its hash covers, and the grid, bins and folds that follow from it."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropemods.leakage.protocol import Protocol

OTHER_VALUES = {
    "sequences": 416,
    "length": 256,
    "groups": 16,
    "window": 4,
    "grid_rows": 48,
    "early": (8, 32),
    "seed": 1,
    "dtype": "model",
    "text": "unigram",
    "replicates": 200,
    "confidence": 0.9,
    "mask_term": False,
}


def test_hash_is_12_hex_digits_and_survives_json():
    protocol = Protocol(early=(8, 32))
    assert re.fullmatch(r"[0-9a-f]{12}", protocol.hash())
    again = Protocol.from_dict(json.loads(json.dumps(protocol.to_dict())))
    assert again == protocol and again.hash() == protocol.hash()


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_every_field_that_moves_the_numbers_moves_the_hash(name):
    other = Protocol(**{name: OTHER_VALUES[name]})
    assert other.hash() != Protocol().hash()
    assert set(other.differences(Protocol())) == {name}


def test_batch_size_is_not_in_the_hash():
    assert Protocol(batch_size=3).hash() == Protocol().hash()
    assert not Protocol(batch_size=3).differences(Protocol())


def test_all_fields_are_covered_by_the_two_tests_above():
    assert set(Protocol().to_dict()) == {*OTHER_VALUES, "batch_size"}


@pytest.mark.parametrize(
    ("field", "says"),
    [
        ({"sequences": 400, "groups": 32}, "use 384 or 416 sequences, or groups=25"),
        ({"sequences": 4}, "use 8$"),
        ({"replicates": 10**12}, "at most 10000000"),
        ({"sequences": 97}, "use 96 or 98$"),
        ({"length": 16}, "at least 18, or a smaller window"),
        ({"early": (4, 64)}, "window=8"),
        ({"early": (8, 300)}, "at least 600"),
        ({"early": (8, 64, 99)}, "two queries"),
        ({"length": 64, "early": (8, 64)}, "last half"),
        ({"grid_rows": 600}, "between 7 .* and 504"),
        ({"dtype": "int8"}, "bfloat16"),
        ({"text": "natural"}, "unigram"),
        ({"confidence": 1.0}, "below 1"),
        ({"groups": 4}, "at least 8"),
        ({"window": 1}, "at least 2"),
    ],
)
def test_values_that_cannot_be_are_refused_with_the_fix(field, says):
    with pytest.raises(ValueError, match=says):
        Protocol(**field)


@pytest.mark.parametrize("field", [{"sequences": 384.0}, {"groups": True}, {"mask_term": 1}, {"dtype": None}])
def test_a_wrong_type_is_refused(field):
    with pytest.raises(TypeError, match=next(iter(field))):
        Protocol(**field)


@given(st.integers(8, 600), st.integers(16, 700), st.integers(2, 64))
def test_what_is_left_out_fits_what_is_asked(sequences, length, window):
    try:
        protocol = Protocol(sequences=sequences, length=length, window=window)
    except ValueError as error:
        assert re.search(r"use (\d+|a length of at least \d+)", str(error))
        return
    assert protocol.sequences % protocol.groups == 0
    assert window <= protocol.early[0] < protocol.early[1] <= protocol.late
    assert len(protocol.grid()) == protocol.grid_rows


def test_what_is_left_out_is_what_it_always_was_where_that_fits():
    assert Protocol() == Protocol(groups=32, grid_rows=64, early=(8, 64))
    assert Protocol(sequences=48).groups == 24


def test_an_unknown_key_is_refused():
    with pytest.raises(ValueError, match="no sequence;"):
        Protocol.from_dict({"sequence": 384})


@given(st.integers(32, 3000), st.integers(2, 8), st.data())
def test_grid_has_the_rows_asked_for_with_both_ends(length, window, data):
    rows = data.draw(st.integers(12, min(64, length - window)))
    protocol = Protocol(length=length, window=window, early=(8, 16), grid_rows=rows)
    grid = protocol.grid()
    assert len(grid) == rows
    assert grid[0] == window and grid[-1] == length - 1
    assert list(grid) == sorted(set(grid))


def test_a_grid_of_all_rows_is_all_rows():
    protocol = Protocol(length=64, early=(8, 32), grid_rows=56)
    assert protocol.grid() == tuple(range(8, 64))


@given(st.integers(32, 3000), st.integers(2, 8))
def test_bins_cover_every_query_once_and_double(length, window):
    bins = Protocol(length=length, window=window, early=(8, 16), grid_rows=12).bins()
    assert [i for start, stop in bins for i in range(start, stop)] == list(range(window, length))
    assert all(stop == 2 * start for start, stop in bins[:-1])


def test_folds_are_disjoint_and_cover_all_groups():
    assert [list(fold) for fold in Protocol(groups=8, sequences=8).folds()] == [[0, 1], [2, 3], [4, 5, 6, 7]]
    assert [g for fold in Protocol().folds() for g in fold] == list(range(32))
    assert Protocol(mask_term=False).folds() == (range(32),)
