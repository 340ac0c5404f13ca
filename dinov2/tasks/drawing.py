"""Predictions drawn on the images that they are about, for people to read."""

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
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

_NO_FONT = "Last Resort High-Efficiency"  # comes with matplotlib and has a box for every letter
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


@lru_cache(maxsize=1024)
def font_for(text: str, pixels: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """A font that has the letters of a text: DejaVu Sans where it does, else one of the system, as for Chinese names.

    Where none has them it is DejaVu Sans, and `legible` says what to write instead.
    """
    own = load_font(pixels, bold=bold)
    letters = frozenset(map(ord, text)) - {ord(" ")}
    if letters <= _letters_of(str(own.path)):
        return own
    path = _system_font(letters)
    return own if path is None else ImageFont.truetype(path, pixels)


@lru_cache(maxsize=64)
def _letters_of(path: str) -> frozenset[int]:
    return frozenset(FT2Font(path).get_charmap())


@lru_cache(maxsize=256)
def _system_font(letters: frozenset[int]) -> str | None:
    """The first font of the system that has all letters."""
    for path in sorted({entry.fname for entry in font_manager.fontManager.ttflist if entry.name != _NO_FONT}):
        try:
            if letters <= _letters_of(path):
                return path
        except (OSError, RuntimeError):  # removed since the list was made, or damaged
            continue
    return None


def legible(name: str, index: int) -> str:
    """A class's name as it can be drawn: with its number where no font has its letters, which would be empty boxes."""
    name = unicodedata.normalize("NFC", " ".join(name.split()))
    letters = frozenset(map(ord, name)) - {ord(" ")}
    known = _letters_of(str(load_font(_SMALLEST_TEXT).path))
    if letters <= known or _system_font(letters) is not None:
        return name
    shown = "".join(letter if ord(letter) in known or letter == " " else "?" for letter in name)
    return f"class {index} ({shown})"


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
MAX_COVER = 0.2  # share of a picture that a panel inside it may cover
_INSIDE_OPACITY = 0.85  # of a panel that covers a part of the picture
_TEXT_FACTORS = (1.0, 0.8, 0.65)  # of the letters on such a panel, as far as they have place
_SMALLEST_INSIDE = 9  # pixels
_SCALE_LETTERS = 22  # width of a colour bar, in heights of a letter
_TICKS = 4


@dataclass(frozen=True)
class LegendEntry:
    """One line of a legend.

    Attributes:
        text: what it says; is cut where it is too long.
        value: stands behind it and is never cut.
        colour: of the square before it; None for no square.
        filled: whether the square is full, as the areas that it explains are.
        bold: whether it is the most important one.
    """

    text: str
    value: str = ""
    colour: Colour | None = None
    filled: bool = True
    bold: bool = False

    @property
    def words(self) -> str:
        """Text and value."""
        return f"{self.text}  {self.value}" if self.value else self.text

    def fitted(self, font: ImageFont.FreeTypeFont, max_pixels: float) -> str:
        """The words on one line that is no wider than allowed."""
        if not self.value:
            return fit_text(self.text, font, max_pixels)
        text = fit_text(self.text, font, max_pixels - font.getlength(f"  {self.value}"))
        return f"{text}  {self.value}" if text else fit_text(self.value, font, max_pixels)


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
        entries: lines of the legend, in the order in which they are drawn.
        scale: of a map of values: drawn as a colour bar.
        inside: keep the picture's size and cover its upper left corner, of at most a fifth of it: letters become
            smaller and the last entries are left out where they have no place. Otherwise the panel lies below the
            picture and all entries are there.
    """
    pixels = text_pixels(*picture.size)
    if not inside:
        width = max(picture.width, MIN_DISPLAY_PIXELS)
        panel = _draw_panel(_lay_out(entries, scale, width, pixels, fill=True))
        if panel is None:
            return picture
        canvas = Image.new("RGB", (width, picture.height + panel.height), PANEL_COLOUR)
        canvas.paste(picture, (0, 0))
        canvas.paste(panel, (0, picture.height))
        return canvas
    panel = _draw_panel(_fit_inside(entries, scale, picture.size, pixels))
    if panel is None:
        return picture
    pad = max(pixels // 2, 2)
    picture = picture.copy()
    below = picture.crop((pad, pad, pad + panel.width, pad + panel.height))
    picture.paste(Image.blend(below, panel, _INSIDE_OPACITY), (pad, pad))
    return picture


@dataclass(frozen=True)
class _Layout:
    """Where the entries of a panel stand: rows of entries with their offsets from the left."""

    rows: list[list[tuple[LegendEntry, float]]]
    scale: ValueScale | None
    size: tuple[int, int]  # width and height
    pixels: int

    @property
    def pad(self) -> int:
        return max(self.pixels // 2, 2)

    @property
    def line(self) -> int:
        return round(self.pixels * 1.45)


def _lay_out(
    entries: Sequence[LegendEntry], scale: ValueScale | None, width: int, pixels: int, *, fill: bool = False
) -> _Layout:
    """A panel no wider than ``width``, and no wider than needed unless it shall ``fill`` it."""
    pad, line = max(pixels // 2, 2), round(pixels * 1.45)
    inner = width - 2 * pad
    rows: list[list[tuple[LegendEntry, float]]] = []
    offset = used = 0.0
    for entry in entries:
        length = min(_square(entry, pixels) + _text_length(entry.words, pixels, entry.bold), inner)
        if not rows or offset + length > inner:
            rows.append([])
            offset = 0.0
        rows[-1].append((entry, offset))
        used = max(used, offset + length)
        offset += length + 1.5 * pixels
    if scale is not None:
        used = max(used, min(inner, _SCALE_LETTERS * pixels))
    height = 2 * pad + line * len(rows) + (0 if scale is None else 2 * line)
    return _Layout(rows, scale, (width if fill else min(width, math.ceil(used) + 2 * pad), height), pixels)


def _fit_inside(
    entries: Sequence[LegendEntry], scale: ValueScale | None, picture: tuple[int, int], pixels: int
) -> _Layout:
    """The panel with most entries that covers no more than its share of the picture; with none where none fits."""
    width, height = picture
    sizes = sorted({max(round(pixels * factor), min(pixels, _SMALLEST_INSIDE)) for factor in _TEXT_FACTORS})[::-1]

    def fits(layout: _Layout) -> bool:
        across, down = layout.size
        margin = 2 * max(pixels // 2, 2)
        within = across + margin <= width and down + margin <= height
        return within and across * down <= MAX_COVER * width * height

    for shown, bar in ((entries, scale), ((), scale), (entries, None)):
        for size in sizes if shown or bar else ():  # letters as large as possible
            layout = _lay_out(shown, bar, width - 2 * max(pixels // 2, 2), size)
            if fits(layout):
                return layout
    for count in range(len(entries) - 1, 0, -1):
        some = [*entries[:count], LegendEntry(f"+ {len(entries) - count} more")]
        layout = _lay_out(some, None, width - 2 * max(pixels // 2, 2), sizes[-1])
        if fits(layout):
            return layout
    layout = _lay_out(entries[:1], None, width - 2 * max(pixels // 2, 2), sizes[-1])
    return layout if fits(layout) else _Layout([], None, (0, 0), pixels)


def _square(entry: LegendEntry, pixels: int) -> float:
    """Width of the coloured square before an entry, and the space behind it."""
    return 0.0 if entry.colour is None else 1.4 * pixels


@lru_cache(maxsize=4096)
def _text_length(text: str, pixels: int, bold: bool) -> float:
    return float(font_for(text, pixels, bold=bold).getlength(text))


def _draw_panel(layout: _Layout) -> Image.Image | None:
    """None where there is nothing on it, or no place."""
    pixels, pad, line = layout.pixels, layout.pad, layout.line
    width, height = layout.size
    if width <= 2 * pad or not (layout.rows or layout.scale):
        return None
    panel = Image.new("RGB", (width, height), PANEL_COLOUR)
    draw = ImageDraw.Draw(panel)
    for number, row in enumerate(layout.rows):
        for entry, offset in row:
            left, top = pad + offset, pad + number * line
            if entry.colour is not None:
                box = (left, top + 0.2 * pixels, left + pixels, top + 1.2 * pixels)
                fill = entry.colour if entry.filled else None
                draw.rectangle(box, fill=fill, outline=TEXT_COLOUR, width=max(pixels // 12, 1))
            square = _square(entry, pixels)
            font = font_for(entry.words, pixels, bold=entry.bold)
            text = entry.fitted(font, width - 2 * pad - square)
            colour = TEXT_COLOUR if entry.bold or entry.colour is not None else FAINT_TEXT_COLOUR
            place, outline = (left + square, top + 0.1 * pixels), max(pixels // 10, 1)
            draw.text(place, text, colour, font, stroke_width=outline, stroke_fill=DARK)
    if layout.scale is not None:
        _draw_scale(panel, layout.scale, top=pad + line * len(layout.rows), pad=pad, pixels=pixels)
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
    for box, left, top, colour in placed:  # last, so that no line runs through words
        words = f"{legible(class_name(classes, box.label), box.label)} {box.score:.2f}"
        font = font_for(words, pixels)
        text = fit_text(words, font, width - pixels / 2)
        text_width, text_height = round(font.getlength(text) + pixels / 2), round(pixels * 1.3)
        if not text or text_height > height:
            continue
        left = min(left, width - text_width)
        # Above the box, or inside it where the image ends.
        top = top - text_height if top >= text_height else min(top, height - text_height)
        draw.rectangle((left, top, left + text_width - 1, top + text_height - 1), fill=colour)
        draw.text((left + pixels / 4, top), text, contrasting(colour), font)
    return picture
