"""The range of values of a set: its text, and how it is found."""

import numpy as np
import pytest

from dinov2.data.value_range import ValueRange, robust_range


@pytest.mark.parametrize("span", [ValueRange(0, 4095), ValueRange(-0.1, 1 / 3), ValueRange(1e-9, 3.4e38)])
def test_text_and_ends_lose_nothing(span: ValueRange) -> None:
    assert ValueRange.parse(str(span)) == ValueRange.of(span.ends) == span
    assert str(ValueRange(0.0, 4095.0)) == "0,4095"
    assert ValueRange.of(None) is None


@pytest.mark.parametrize("text", ["", "1", "1,2,3", "a,b", "2,1", "1,1", "nan,1", "0,inf"])
def test_what_is_no_range(text: str) -> None:
    with pytest.raises(ValueError, match="a range of values is LO,HI"):
        ValueRange.parse(text)


def test_bits() -> None:
    assert [ValueRange.of_bits(bits).high for bits in (10, 12, 14)] == [1023, 4095, 16383]
    for bits in (7, 17):
        with pytest.raises(ValueError, match=f"bits must be 8 to 16, found {bits}"):
            ValueRange.of_bits(bits)


RAMP = np.linspace(0, 1, 10_001)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (RAMP, (0, 1)),
        (RAMP * 0.3, (0, 1)),  # images of one set may be dark
        (RAMP * 200, (0, 255)),
        (RAMP * 40_000, (0, 65535)),
        (np.append(RAMP, [50.0] * 9), (0, 1)),  # bright pixels are no range
        (np.append(RAMP, [-50.0, np.nan, np.inf, -np.inf]), (0, 1)),
        (RAMP * 3000, (0, 3000)),  # 12 bits in a float
        (RAMP * 0.01, (0, 0.01)),
        (RAMP * 10 - 5, (-5, 5)),
        (RAMP * 2 + 100, (100, 102)),  # heights, not levels
        (np.append(RAMP + 7, [-9999.0] * 500), (7, 8)),  # what was not measured
        (np.append(RAMP + 7, [0.0] * 5000), (7, 8)),
        (np.append(RAMP, [3e38] * 500), (0, 1)),
        (np.append(np.zeros(10_000), [2.0]), (0, 2)),  # all but a few are black
        (np.full(9, -5), (-5, -4)),
        (np.full(9, 7), (0, 255)),
        (np.array([np.nan]), (0, 1)),
        (np.array([-100, 0, 100], np.int16), (-100, 100)),
    ],
)
def test_robust_range(values: np.ndarray, expected: tuple[float, float]) -> None:
    found = robust_range(values)
    assert np.allclose((found.low, found.high), expected, rtol=1e-3, atol=1e-3)
