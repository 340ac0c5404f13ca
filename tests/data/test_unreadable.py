"""Counting unreadable images."""

import pytest

from dinov2.data.pretraining import TooManyUnreadableImages, UnreadableTally


def test_names_count_once():
    tally = UnreadableTally(100, 0.02)
    for _ in range(5):
        tally.add(["a.jpg", "b.jpg"])
    tally.add([])
    assert tally.count == 2
    assert tally.summary() == "2 of 100 images unreadable (2.00%)"


def test_too_many_are_an_error_that_names_them():
    tally = UnreadableTally(100, 0.02)
    tally.add(["a.jpg", "b.jpg"])
    tally.check()
    tally.add(["c.jpg"])
    assert tally.exceeded
    with pytest.raises(
        TooManyUnreadableImages, match=r"3 of 100 .*max_bad_fraction \(2\.00%\).*a\.jpg, b\.jpg, c\.jpg$"
    ):
        tally.check()


def test_long_lists_are_cut():
    tally = UnreadableTally(10, 0.0)
    tally.add([f"{number}.jpg" for number in range(8)])
    with pytest.raises(TooManyUnreadableImages, match=r"and 3 more"):
        tally.check()


def test_state_survives():
    tally = UnreadableTally(100, 0.02)
    tally.add(["b.jpg", "a.jpg"])
    other = UnreadableTally(100, 0.02)
    other.load_state_dict(tally.state_dict())
    other.add(["a.jpg"])
    assert other.count == 2
    other.add(["c.jpg"])
    with pytest.raises(TooManyUnreadableImages):
        other.check()


@pytest.mark.parametrize(("size", "fraction"), [(0, 0.1), (5, -0.1), (5, 1.1)])
def test_bad_options(size, fraction):
    with pytest.raises(ValueError, match=r"must (be at least 1|lie in 0\.\.1)"):
        UnreadableTally(size, fraction)
