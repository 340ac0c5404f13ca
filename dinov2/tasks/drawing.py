"""Predictions drawn on the images that they are about, for people to read."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]  # red, green, blue, 0 to 255

MAX_DISPLAY_PIXELS = 2048  # longer side of a drawn image; what is larger is reduced, for the drawing only
MIN_DISPLAY_PIXELS = 320  # longer side; what is smaller is enlarged by a whole number, so that text fits beside it

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


def depth_table() -> NDArray[np.uint8]:
    """Colours from near (dark blue) to far (yellow) ``[256, 3]``, even for people who see few colours (viridis)."""
    colours: NDArray[np.float64] = matplotlib.colormaps["viridis"](np.arange(256))[:, :3]
    return (colours * 255).round().astype(np.uint8)


def contrasting(colour: Colour) -> Colour:
    """Black or white, whichever is read more easily on a colour."""
    red, green, blue = colour
    return DARK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else TEXT_COLOUR


def display_size(width: int, height: int) -> tuple[int, int]:
    """Width and height at which an image is drawn: its own, but neither too large to look at nor too small to read."""
    longer = max(width, height)
    if longer > MAX_DISPLAY_PIXELS:
        factor = MAX_DISPLAY_PIXELS / longer
        return max(round(width * factor), 1), max(round(height * factor), 1)
    times = -(-MIN_DISPLAY_PIXELS // longer) if longer < MIN_DISPLAY_PIXELS else 1
    return width * times, height * times


def text_pixels(width: int, height: int) -> int:
    """Height of letters on a picture of this size."""
    return min(max(round(max(width, height) * _TEXT_SHARE), _SMALLEST_TEXT), _LARGEST_TEXT)


@lru_cache(maxsize=16)
def load_font(pixels: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and knows Latin, Greek and Cyrillic letters."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", name), pixels)


def fit_text(text: str, font: ImageFont.FreeTypeFont, max_pixels: float) -> str:
    """The text on one line, cut off with "…" where it is wider than allowed; empty where not even that has place."""
    text = " ".join(text.split())
    if font.getlength(text) <= max_pixels:
        return text
    for length in range(len(text) - 1, -1, -1):
        shortened = text[:length].rstrip() + "…"
        if font.getlength(shortened) <= max_pixels:
            return shortened
    return ""


DEPTH_OPACITY = 0.75
_INSIDE_OPACITY = 0.85  # of a panel that covers a part of the picture
_TICKS = 4


@dataclass(frozen=True)
class LegendEntry:
    """One line of a legend.

    Attributes:
        text: what it says.
        colour: of the square before it; None for no square.
        filled: whether the square is full, as the areas that it explains are.
        bold: whether it is the most important one.
    """

    text: str
    colour: Colour | None = None
    filled: bool = True
    bold: bool = False


@dataclass(frozen=True)
class ValueScale:
    """What the colours of a map of values, such as depth, stand for.

    Attributes:
        low: value of the first colour; NaN, like ``high``, where nothing is known anywhere.
        high: value of the last colour.
        unit: of both; empty for relative values.
    """

    low: float
    high: float
    unit: str


def add_panel(
    picture: Image.Image, entries: Sequence[LegendEntry], scale: ValueScale | None = None, *, inside: bool = False
) -> Image.Image:
    """Explains a picture.

    Args:
        picture: RGB.
        entries: lines of the legend.
        scale: of a map of values: drawn as a colour bar.
        inside: keep the picture's size and cover its upper left corner, of at most half its height, with as many
            entries as have place there; otherwise the panel lies below the picture and all entries are there.
    """
    pixels = text_pixels(*picture.size)
    pad = max(pixels // 2, 2)
    width = picture.width - 2 * pad if inside else max(picture.width, MIN_DISPLAY_PIXELS)
    panel = _draw_panel(entries, scale, width, picture.height // 2 if inside else None, pixels)
    if panel is None:
        return picture
    if inside:
        picture = picture.copy()
        below = picture.crop((pad, pad, pad + panel.width, pad + panel.height))
        picture.paste(Image.blend(below, panel, _INSIDE_OPACITY), (pad, pad))
        return picture
    canvas = Image.new("RGB", (width, picture.height + panel.height), PANEL_COLOUR)
    canvas.paste(picture, (0, 0))
    canvas.paste(panel, (0, picture.height))
    return canvas


def _draw_panel(
    entries: Sequence[LegendEntry], scale: ValueScale | None, width: int, max_height: int | None, pixels: int
) -> Image.Image | None:
    """The panel, no wider than ``width``, and no wider than needed where its height is limited; None without place."""
    pad, line = max(pixels // 2, 2), round(pixels * 1.45)
    inner = width - 2 * pad
    rows: list[list[tuple[LegendEntry, float]]] = []  # with the offset from the left
    offset = used = 0.0
    for entry in entries:
        square = 0.0 if entry.colour is None else 1.4 * pixels  # and the space behind it
        length = min(square + load_font(pixels, bold=entry.bold).getlength(entry.text), inner)
        if not rows or offset + length > inner:
            rows.append([])
            offset = 0.0
        rows[-1].append((entry, offset))
        used = max(used, offset + length)
        offset += length + 1.5 * pixels
    bar = 0 if scale is None else 2 * line
    if max_height is not None:
        rows = rows[: max((max_height - 2 * pad - bar) // line, 0)]
        used = used if scale is None else max(used, pixels * 22)
    height = 2 * pad + line * len(rows) + bar
    if inner <= 0 or (not rows and not bar) or (max_height is not None and height > max_height):
        return None
    panel = Image.new("RGB", (width if max_height is None else min(width, round(used) + 2 * pad), height), PANEL_COLOUR)
    draw = ImageDraw.Draw(panel)
    for number, row in enumerate(rows):
        for entry, offset in row:
            left, top = pad + offset, pad + number * line
            if entry.colour is not None:
                box = (left, top + 0.2 * pixels, left + pixels, top + 1.2 * pixels)
                fill = entry.colour if entry.filled else None
                draw.rectangle(box, fill=fill, outline=TEXT_COLOUR, width=max(pixels // 12, 1))
            square = 0.0 if entry.colour is None else 1.4 * pixels
            font = load_font(pixels, bold=entry.bold)
            text = fit_text(entry.text, font, inner - square)
            colour = TEXT_COLOUR if entry.bold or entry.colour is not None else FAINT_TEXT_COLOUR
            place, outline = (left + square, top + 0.1 * pixels), max(pixels // 10, 1)
            draw.text(place, text, colour, font, stroke_width=outline, stroke_fill=DARK)
    if scale is not None:
        _draw_scale(panel, scale, top=pad + line * len(rows), pad=pad, pixels=pixels)
    return panel


def _draw_scale(panel: Image.Image, scale: ValueScale, *, top: int, pad: int, pixels: int) -> None:
    draw = ImageDraw.Draw(panel)
    font = load_font(pixels)
    unit = scale.unit or "relative"
    if not np.isfinite(scale.low):
        draw.text((pad, top), "nothing known", FAINT_TEXT_COLOUR, font)
        return
    unit_text = fit_text(unit, font, (panel.width - 2 * pad) / 3)
    length = round(panel.width - 2 * pad - font.getlength(unit_text) - pixels)
    if length < 2:
        return
    # The colours as they look where they cover a grey image.
    row = depth_table()[np.linspace(0, 255, length).round().astype(int)]
    blended = (row * DEPTH_OPACITY + np.array(BACKGROUND) * (1 - DEPTH_OPACITY)).round().astype(np.uint8)
    bar = np.broadcast_to(blended, (pixels, length, 3))
    panel.paste(Image.fromarray(np.ascontiguousarray(bar)), (pad, top))
    draw.text((pad + length + pixels / 2, top - 0.1 * pixels), unit_text, TEXT_COLOUR, font)
    free = float(pad)  # left end of what no text covers yet
    ticks = MaxNLocator(nbins=_TICKS).tick_values(scale.low, scale.high) if scale.low < scale.high else [scale.low]
    inner = [float(value) for value in ticks if scale.low <= value <= scale.high]
    for value in inner or [scale.low, scale.high]:
        share = 0.5 if scale.high == scale.low else (value - scale.low) / (scale.high - scale.low)
        x = pad + share * (length - 1)
        text = f"{value:.4g}"
        left = min(max(x - font.getlength(text) / 2, pad), panel.width - pad - font.getlength(text))
        if left < free:
            continue
        draw.line((x, top + pixels * 0.7, x, top + pixels * 1.1), fill=TEXT_COLOUR, width=max(pixels // 10, 1))
        draw.text((left, top + pixels * 1.15), text, TEXT_COLOUR, font)
        free = left + font.getlength(text) + pixels / 2


_AREA_OPACITY = 0.45
_EDGE_SHARE = 1 / 400  # thickness of the line around an area, of the longer side
_MIN_COVER = 0.05  # share of a reduced pixel that a class needs to be drawn: a crack of few pixels should not vanish
_PIXELS_AT_ONCE = 2**22
PRESENT_FROM = 0.5  # probability from which on one of several classes is taken to be there


def paint_labels(picture: Image.Image, labels: NDArray[np.uint8]) -> Image.Image:
    """Covers the areas of all classes but 0 with their colours, and their edges with thick lines.

    Args:
        picture: RGB.
        labels: uint8 ``[H, W]`` of the picture's size.
    """
    assert labels.shape == (picture.height, picture.width)
    pixels = np.array(picture)
    table = np.array([class_colour(index) for index in range(256)], dtype=np.uint8)
    table[255] = IGNORED_COLOUR
    coloured = cv2.LUT(cv2.merge([labels] * 3), table[None])
    thickness = max(round(max(picture.size) * _EDGE_SHARE), 1)
    kernel = np.ones((2 * thickness + 1, 2 * thickness + 1), dtype=np.uint8)
    areas = labels != 0
    edges = (cv2.dilate(labels, kernel) != cv2.erode(labels, kernel)) & areas
    blended = cv2.addWeighted(pixels, 1 - _AREA_OPACITY, coloured, _AREA_OPACITY, 0)
    cv2.copyTo(blended, areas.astype(np.uint8), pixels)
    cv2.copyTo(coloured, edges.astype(np.uint8), pixels)
    return Image.fromarray(pixels)


def paint_depth(picture: Image.Image, depth: NDArray[np.float32], depth_range: tuple[float, float]) -> Image.Image:
    """Covers a grey version of a picture with the colours of depths; where none is known it stays grey.

    Args:
        picture: RGB.
        depth: float32 ``[H, W]`` of the picture's size, NaN where unknown.
        depth_range: depths of the first and the last colour; what lies outside has the nearest one's.
    """
    assert depth.shape == (picture.height, picture.width)
    grey = np.array(picture.convert("L").convert("RGB"))
    low, high = depth_range
    known = np.isfinite(depth)
    share = (np.where(known, depth, low) - low) / (high - low) if high > low else np.full(depth.shape, 0.5)
    levels = (np.nan_to_num(share).clip(0, 1) * 255).round().astype(np.uint8)
    coloured = cv2.LUT(cv2.merge([levels] * 3), depth_table()[None])
    blended = cv2.addWeighted(grey, 1 - DEPTH_OPACITY, coloured, DEPTH_OPACITY, 0)
    cv2.copyTo(blended, known.astype(np.uint8), grey)
    return Image.fromarray(grey)


def known_range(*depths: NDArray[np.float32]) -> tuple[float, float]:
    """Smallest and largest depth of all maps; NaN where nothing is known."""
    values = [depth[np.isfinite(depth)] for depth in depths]
    values = [value for value in values if value.size]
    if not values:
        return float("nan"), float("nan")
    return min(float(value.min()) for value in values), max(float(value.max()) for value in values)


def resize_image(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image in RGB at ``(width, height)``; enlarged pixels stay squares."""
    image = image.convert("RGB")
    if image.size == size:
        return image
    larger = size[0] >= image.width and size[1] >= image.height
    return image.resize(size, Image.Resampling.NEAREST if larger else Image.Resampling.BOX)


def resize_labels(labels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Labels at ``(width, height)``; when reduced, what covers a twentieth of a pixel wins over the background."""
    width, height = size
    if labels.shape == (height, width):
        return labels
    if width >= labels.shape[1] and height >= labels.shape[0]:
        return np.asarray(cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST), dtype=np.uint8)
    best = np.full((height, width), round(_MIN_COVER * 255), dtype=np.uint8)
    reduced = np.zeros((height, width), dtype=np.uint8)
    for value in np.flatnonzero(count_pixels(labels)[1:]) + 1:
        cover = cv2.resize(np.uint8(255) * (labels == value), size, interpolation=cv2.INTER_AREA)
        reduced[cover > best] = value
        best = np.maximum(best, cover.astype(np.uint8))
    return reduced


def resize_depth(depth: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Depth at ``(width, height)``, each value one of the given ones: means of near and far would be of neither."""
    if depth.shape == (size[1], size[0]):
        return depth
    return np.asarray(cv2.resize(depth, size, interpolation=cv2.INTER_NEAREST), dtype=np.float32)


def count_pixels(labels: NDArray[np.uint8], weights: NDArray[np.float32] | None = None) -> NDArray[np.float64]:
    """How many pixels have each value, or the sum of their weights ``[256]``, in blocks of rows: masks may be large."""
    num_rows = max(_PIXELS_AT_ONCE // labels.shape[1], 1)
    counts = np.zeros(256)
    for top in range(0, labels.shape[0], num_rows):
        rows = slice(top, top + num_rows)
        counts += np.bincount(
            labels[rows].ravel(), None if weights is None else weights[rows].ravel(), minlength=len(counts)
        )
    return counts


def class_name(classes: Sequence[str], index: int) -> str:
    """Name of a class, or its index where it has none."""
    return classes[index] if index < len(classes) else f"class {index}"


_LINE_SHARE = 1 / 400  # of the longer side


@dataclass(frozen=True)
class Box:
    """A found object; corners are in pixels of the image, and a pixel ``i`` covers ``[i, i + 1)``.

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
    image: Image.Image | NDArray[np.uint8],
    boxes: Sequence[Box],
    classes: Sequence[str] = (),
    *,
    keep_size: bool = False,
) -> Image.Image:
    """Draws boxes on their image, the most certain on top.

    Args:
        image: RGB, or uint8 ``[H, W, 3]``.
        boxes: what was found; corners beyond the image are clipped.
        classes: names by index. Colours start with the first class, as there is no background.
        keep_size: draw at the image's own size; otherwise large images are reduced and small ones enlarged, see
            `Prediction.draw`.
    """
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    width, height = size = image.size if keep_size else display_size(*image.size)
    picture = resize_image(image, size).copy()
    draw = ImageDraw.Draw(picture)
    across, down = width / image.width, height / image.height
    line = max(round(max(size) * _LINE_SHARE), 2)
    placed = []
    for box in sorted(boxes, key=lambda box: box.score):
        # First and last column and row of the box in the picture.
        left, right = (min(max(round(x * across), 0), width) for x in (box.x0, box.x1))
        top, bottom = (min(max(round(y * down), 0), height) for y in (box.y0, box.y1))
        left, top = min(left, width - 1), min(top, height - 1)
        right, bottom = max(right - 1, left), max(bottom - 1, top)
        colour = class_colour(box.label + 1)
        outer = (left - 1, top - 1, right + 1, bottom + 1)
        draw.rectangle(outer, outline=contrasting(colour), width=line + 2)
        draw.rectangle((left, top, right, bottom), outline=colour, width=line)
        placed.append((box, left, top, colour))
    pixels = text_pixels(width, height)
    font = load_font(pixels)
    for box, left, top, colour in placed:  # last, so that no line runs through words
        text = fit_text(f"{class_name(classes, box.label)} {box.score:.2f}", font, width - pixels / 2)
        text_width, text_height = round(font.getlength(text) + pixels / 2), round(pixels * 1.3)
        if not text or text_height > height:
            continue
        left = min(left, width - text_width)
        # Above the box, or inside it where the image ends.
        top = top - text_height if top >= text_height else min(top, height - text_height)
        draw.rectangle((left, top, left + text_width - 1, top + text_height - 1), fill=colour)
        draw.text((left + pixels / 4, top), text, contrasting(colour), font)
    return picture
