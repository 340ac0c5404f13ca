"""Boxes on photos."""

import numpy as np
import pytest
from PIL import Image

from dinov2.tasks.drawing import Box, class_colour, contrasting, draw_boxes

GREY = (128, 128, 128)


def drawn(size: tuple[int, int], *boxes: Box, keep_size: bool = True) -> np.ndarray:
    return np.array(draw_boxes(Image.new("RGB", size, GREY), boxes, ("nut", "bolt"), keep_size=keep_size))


def test_a_line_runs_along_the_edge_of_the_box_and_the_inside_stays_visible() -> None:
    pixels = drawn((400, 400), Box(100, 150, 201, 251, 1, 0.5))
    colour = np.array(class_colour(2))
    for x, y in [(100, 200), (200, 200), (150, 150), (150, 250)]:  # first and last column and row
        np.testing.assert_array_equal(pixels[y, x], colour)
    for x, y in [(99, 200), (201, 200), (195, 149), (195, 251)]:  # a thin line around it
        np.testing.assert_array_equal(pixels[y, x], contrasting(class_colour(2)))
    np.testing.assert_array_equal(pixels[160:240, 110:190], np.broadcast_to(GREY, (80, 80, 3)))
    assert (pixels[132:148, 100:150] != GREY).any()  # the label above
    assert (pixels[260:, :] == GREY).all()


def test_boxes_are_scaled_with_the_photo() -> None:
    small = drawn((100, 100), Box(20, 30, 60, 70, 0, 0.5), keep_size=False)
    assert small.shape == (400, 400, 3)
    np.testing.assert_array_equal(small[200, 80], class_colour(1))
    np.testing.assert_array_equal(small[200, 239], class_colour(1))


def test_the_most_certain_box_lies_on_top() -> None:
    boxes = Box(50, 50, 150, 150, 0, 0.9), Box(50, 50, 150, 150, 1, 0.3)
    for order in (boxes, boxes[::-1]):
        np.testing.assert_array_equal(drawn((300, 300), *order)[100, 50], class_colour(1))


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 3), (400, 300)])
def test_boxes_at_and_beyond_the_border_are_clipped(size: tuple[int, int]) -> None:
    width, height = size
    boxes = [
        Box(-50, -50, width + 50, height + 50, 0, 1.0),
        Box(width - 1, height - 1, width, height, 1, 0.1),
        Box(width, height, width, height, 5, 0.0),
    ]
    pixels = drawn(size, *boxes)
    assert pixels.shape == (height, width, 3)
    np.testing.assert_array_equal(pixels[0, -1], class_colour(1))


def test_score_and_name_are_written() -> None:
    reference = drawn((300, 300), Box(50, 50, 150, 150, 0, 0.9))
    assert (drawn((300, 300), Box(50, 50, 150, 150, 0, 0.8)) != reference).any()
    other = np.array(draw_boxes(Image.new("RGB", (300, 300), GREY), [Box(50, 50, 150, 150, 0, 0.9)], keep_size=True))
    assert (other != reference).any()
    assert (drawn((300, 300)) == GREY).all()
