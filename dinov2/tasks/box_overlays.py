"""Boxes drawn on a photo, each with its class and score."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from dinov2.tasks.overlay_style import Colour, class_colour, contrasting, display_size, fit_text, load_font, text_pixels
from dinov2.tasks.overlays import class_name, resize_photo

_LINE_SHARE = 1 / 400  # of the longer side


@dataclass(frozen=True)
class Box:
    """A found object; corners are in pixels of the photo, and a pixel ``i`` covers ``[i, i + 1)``.

    Attributes:
        x0: left edge.
        y0: upper edge.
        x1: right edge, at least ``x0``.
        y1: lower edge, at least ``y0``.
        label: index of the class.
        score: in [0, 1].
    """

    x0: float
    y0: float
    x1: float
    y1: float
    label: int
    score: float


def draw_boxes(
    photo: Image.Image | NDArray[np.uint8],
    boxes: Sequence[Box],
    classes: Sequence[str] = (),
    *,
    keep_size: bool = False,
) -> Image.Image:
    """Draws boxes on their photo, the most certain on top.

    Args:
        photo: RGB, or uint8 ``[H, W, 3]``.
        boxes: what was found; corners beyond the photo are clipped.
        classes: names by index. Colours start with the first class, as there is no background.
        keep_size: draw at the photo's own size; otherwise large photos are reduced and small ones enlarged, see
            `draw_overlay`.
    """
    if not isinstance(photo, Image.Image):
        photo = Image.fromarray(photo)
    size = photo.size if keep_size else display_size(*photo.size)
    picture = resize_photo(photo, size).copy()
    draw = ImageDraw.Draw(picture)
    across, down = size[0] / photo.width, size[1] / photo.height
    placed = [
        (
            _place(box, across, down, size),
            class_colour(box.label + 1),
            f"{class_name(classes, box.label)} {box.score:.2f}",
        )
        for box in sorted(boxes, key=lambda box: box.score)
    ]
    line = max(round(max(size) * _LINE_SHARE), 2)
    for corners, colour, _ in placed:
        draw.rectangle(_grow(corners, 1), outline=contrasting(colour), width=line + 2)
        draw.rectangle(corners, outline=colour, width=line)
    for corners, colour, text in placed:  # last, so that no line runs through words
        _draw_label(draw, corners, text, colour, size)
    return picture


def _place(box: Box, across: float, down: float, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """First and last column and row of a box in the picture, as left, top, right and bottom."""
    left, right = (min(max(round(x * across), 0), size[0]) for x in (box.x0, box.x1))
    top, bottom = (min(max(round(y * down), 0), size[1]) for y in (box.y0, box.y1))
    left, top = min(left, size[0] - 1), min(top, size[1] - 1)
    return left, top, max(right - 1, left), max(bottom - 1, top)


def _words(box: Box, classes: Sequence[str]) -> str:
    return f"{class_name(classes, box.label)} {box.score:.2f}"


def _grow(corners: tuple[int, int, int, int], pixels: int) -> tuple[int, int, int, int]:
    left, top, right, bottom = corners
    return left - pixels, top - pixels, right + pixels, bottom + pixels


def _draw_label(
    draw: ImageDraw.ImageDraw, corners: tuple[int, int, int, int], text: str, colour: Colour, size: tuple[int, int]
) -> None:
    width, height = size
    pixels = text_pixels(width, height)
    font = load_font(pixels)
    text = fit_text(text, font, width - pixels / 2)
    text_width, text_height = round(font.getlength(text) + pixels / 2), round(pixels * 1.3)
    if not text or text_height > height:
        return
    left, top = min(corners[0], width - text_width), corners[1]
    # Above the box, or inside it where the photo ends.
    top = top - text_height if top >= text_height else min(top, height - text_height)
    draw.rectangle((left, top, left + text_width - 1, top + text_height - 1), fill=colour)
    draw.text((left + pixels / 4, top), text, contrasting(colour), font)
