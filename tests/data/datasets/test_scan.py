"""Strings in two arrays behave like the list they came from."""

import pickle

import numpy as np
import pytest

from dinov2.data.datasets.scan import CompactStrings

STRINGS = ["a", "", "ü/ß.png", "file\udc80", "x" * 1000, ""]


def test_equals_the_list() -> None:
    strings = CompactStrings(STRINGS)
    assert list(strings) == STRINGS
    assert len(strings) == len(STRINGS)
    assert [strings[i] for i in range(-6, 6)] == STRINGS * 2
    assert strings[1:5:2] == STRINGS[1:5:2]
    assert list(pickle.loads(pickle.dumps(strings))) == STRINGS
    assert list(CompactStrings([])) == []
    for index in (6, -7):
        with pytest.raises(IndexError, match=f"index {index} is out of range for 6 strings"):
            strings[index]


def test_arrays_round_trip_and_are_checked() -> None:
    strings = CompactStrings(STRINGS)
    assert list(CompactStrings.from_arrays(strings.bytes, strings.ends)) == STRINGS
    with pytest.raises(ValueError, match="do not fit"):
        CompactStrings.from_arrays(strings.bytes[1:], strings.ends)
    with pytest.raises(ValueError, match="not the arrays of strings"):
        CompactStrings.from_arrays(strings.bytes, strings.ends.astype(np.float64))
