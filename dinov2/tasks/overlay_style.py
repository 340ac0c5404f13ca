"""Colours, letters and sizes of what is drawn on photos."""

from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import ImageFont

Colour = tuple[int, int, int]  # red, green, blue, 0 to 255

MOST_DISPLAY_PIXELS = 2048  # longer side of a drawn photo; what is larger is reduced, for the drawing only
LEAST_DISPLAY_PIXELS = 320  # longer side; what is smaller is enlarged by a whole number, so that text fits beside it

BACKGROUND: Colour = (128, 128, 128)
IGNORED_COLOUR: Colour = (60, 60, 60)
PANEL_COLOUR: Colour = (24, 24, 26)
TEXT_COLOUR: Colour = (245, 245, 245)
FAINT_TEXT_COLOUR: Colour = (170, 170, 174)
DARK: Colour = (0, 0, 0)

# Seven colours that people with any colour vision tell apart, those first that stand out on grey parts.
# Reference: Okabe and Ito, Color Universal Design, 2008.
_BASIC: tuple[Colour, ...] = (
    (213, 94, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (204, 121, 167), (0, 114, 178), (230, 159, 0),
)  # fmt: skip
_LIGHTER, _DARKER = 0.5, 0.45  # share of white, share of black

_SMALLEST_TEXT, _LARGEST_TEXT = 12, 64  # pixels
_TEXT_SHARE = 1 / 50  # of the longer side


def class_colour(index: int) -> Colour:
    """Colour of a class: grey for 0, then 21 that differ in hue or, after seven, in lightness; then they come again."""
    if index == 0:
        return BACKGROUND
    level, place = divmod((index - 1) % (3 * len(_BASIC)), len(_BASIC))
    colour = np.array(_BASIC[place], dtype=np.float64)
    if level == 1:
        colour += (255 - colour) * _LIGHTER
    elif level == 2:
        colour *= 1 - _DARKER
    red, green, blue = (int(value) for value in colour.round())
    return red, green, blue


def label_table() -> NDArray[np.uint8]:
    """Colour of every mask value ``[256, 3]``; that of ignored pixels (255) is dark grey."""
    table = np.array([class_colour(index) for index in range(256)], dtype=np.uint8)
    table[255] = IGNORED_COLOUR
    return table


def depth_table() -> NDArray[np.uint8]:
    """Colours from near (dark blue) to far (yellow) ``[256, 3]``, even for people who see few colours (viridis)."""
    colours: NDArray[np.float64] = matplotlib.colormaps["viridis"](np.arange(256))[:, :3]
    return (colours * 255).round().astype(np.uint8)


def contrasting(colour: Colour) -> Colour:
    """Black or white, whichever is read more easily on a colour."""
    red, green, blue = colour
    return DARK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else TEXT_COLOUR


def display_size(width: int, height: int) -> tuple[int, int]:
    """Width and height at which a photo is drawn: its own, but neither too large to look at nor too small to read."""
    longer = max(width, height)
    if longer > MOST_DISPLAY_PIXELS:
        factor = MOST_DISPLAY_PIXELS / longer
        return max(round(width * factor), 1), max(round(height * factor), 1)
    times = -(-LEAST_DISPLAY_PIXELS // longer) if longer < LEAST_DISPLAY_PIXELS else 1
    return width * times, height * times


def text_pixels(width: int, height: int) -> int:
    """Height of letters on a picture of this size."""
    return min(max(round(max(width, height) * _TEXT_SHARE), _SMALLEST_TEXT), _LARGEST_TEXT)


@lru_cache(maxsize=16)
def load_font(pixels: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and knows Latin, Greek and Cyrillic letters."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", name), pixels)


def fit_text(text: str, font: ImageFont.FreeTypeFont, most_pixels: float) -> str:
    """The text on one line, cut off with "…" where it is wider than allowed; empty where not even that has place."""
    text = " ".join(text.split())
    if font.getlength(text) <= most_pixels:
        return text
    for length in range(len(text) - 1, -1, -1):
        shortened = text[:length].rstrip() + "…"
        if font.getlength(shortened) <= most_pixels:
            return shortened
    return ""
