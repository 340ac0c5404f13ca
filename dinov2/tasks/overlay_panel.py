"""What explains a drawing: a legend, or a colour bar with its unit, below a picture or inside a video frame."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw

from dinov2.tasks.overlay_style import (
    BACKGROUND,
    DARK,
    FAINT_TEXT_COLOUR,
    LEAST_DISPLAY_PIXELS,
    PANEL_COLOUR,
    TEXT_COLOUR,
    Colour,
    depth_table,
    fit_text,
    load_font,
    text_pixels,
)

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
class DepthScale:
    """What the colours of a depth map stand for.

    Attributes:
        low: depth of the first colour; NaN, like ``high``, where nothing is known anywhere.
        high: depth of the last colour.
        unit: of both; empty for relative depth.
    """

    low: float
    high: float
    unit: str


def add_panel(
    picture: Image.Image, entries: Sequence[LegendEntry], scale: DepthScale | None = None, *, inside: bool = False
) -> Image.Image:
    """Explains a picture.

    Args:
        picture: RGB.
        entries: lines of the legend.
        scale: of a depth map: drawn as a colour bar.
        inside: keep the picture's size and cover its upper left corner, of at most half its height, with as many
            entries as have place there; otherwise the panel lies below the picture and all entries are there.
    """
    pixels = text_pixels(*picture.size)
    gap = max(pixels // 2, 2)
    width = picture.width - 2 * gap if inside else max(picture.width, LEAST_DISPLAY_PIXELS)
    most = picture.height // 2 if inside else None
    panel = _draw_panel(entries, scale, width=width, most_height=most, pixels=pixels, shrink=inside)
    if panel is None:
        return picture
    if inside:
        picture = picture.copy()
        place = (gap, gap)
        below = picture.crop((*place, gap + panel.width, gap + panel.height))
        picture.paste(Image.blend(below, panel, _INSIDE_OPACITY), place)
        return picture
    canvas = Image.new("RGB", (width, picture.height + panel.height), PANEL_COLOUR)
    canvas.paste(picture, (0, 0))
    canvas.paste(panel, (0, picture.height))
    return canvas


def _draw_panel(
    entries: Sequence[LegendEntry],
    scale: DepthScale | None,
    *,
    width: int,
    most_height: int | None,
    pixels: int,
    shrink: bool,
) -> Image.Image | None:
    """The panel, no wider than ``width``; None where nothing has place."""
    pad, line = max(pixels // 2, 2), round(pixels * 1.45)
    rows = _flow(entries, width - 2 * pad, pixels)
    bar = 0 if scale is None else 2 * line
    if most_height is not None:
        rows = rows[: max((most_height - 2 * pad - bar) // line, 0)]
    height = 2 * pad + line * len(rows) + bar
    if width <= 2 * pad or (not rows and not bar) or (most_height is not None and height > most_height):
        return None
    used = max((offset + length for row in rows for _, offset, length in row), default=0.0)
    if shrink and scale is None:
        width = min(width, round(used) + 2 * pad)
    elif shrink:
        width = min(width, max(round(used), pixels * 22) + 2 * pad)
    panel = Image.new("RGB", (width, height), PANEL_COLOUR)
    draw = ImageDraw.Draw(panel)
    for number, row in enumerate(rows):
        for entry, offset, _ in row:
            _draw_entry(draw, entry, (pad + offset, pad + number * line), width - 2 * pad, pixels)
    if scale is not None:
        _draw_scale(panel, scale, top=pad + line * len(rows), pad=pad, pixels=pixels)
    return panel


def _flow(entries: Sequence[LegendEntry], width: float, pixels: int) -> list[list[tuple[LegendEntry, float, float]]]:
    """Entries in rows, each with its offset from the left and its length."""
    rows: list[list[tuple[LegendEntry, float, float]]] = []
    offset = 0.0
    for entry in entries:
        length = min(_square(entry, pixels) + load_font(pixels, bold=entry.bold).getlength(entry.text), width)
        if not rows or offset + length > width:
            rows.append([])
            offset = 0.0
        rows[-1].append((entry, offset, length))
        offset += length + 1.5 * pixels
    return rows


def _square(entry: LegendEntry, pixels: int) -> float:
    """Width of an entry's square and the space behind it."""
    return 0.0 if entry.colour is None else 1.4 * pixels


def _draw_entry(
    draw: ImageDraw.ImageDraw, entry: LegendEntry, place: tuple[float, float], width: float, pixels: int
) -> None:
    left, top = place
    square = _square(entry, pixels)
    if entry.colour is not None:
        box = (left, top + 0.2 * pixels, left + pixels, top + 1.2 * pixels)
        line = max(pixels // 12, 1)
        draw.rectangle(box, fill=entry.colour if entry.filled else None, outline=TEXT_COLOUR, width=line)
    font = load_font(pixels, bold=entry.bold)
    text = fit_text(entry.text, font, width - square)
    colour = TEXT_COLOUR if entry.bold or entry.colour is not None else FAINT_TEXT_COLOUR
    outline = max(pixels // 10, 1)
    draw.text((left + square, top + 0.1 * pixels), text, colour, font, stroke_width=outline, stroke_fill=DARK)


def _draw_scale(panel: Image.Image, scale: DepthScale, *, top: int, pad: int, pixels: int) -> None:
    draw = ImageDraw.Draw(panel)
    font = load_font(pixels)
    unit = scale.unit or "relative"
    if not np.isfinite(scale.low):
        draw.text((pad, top), "no depth known", FAINT_TEXT_COLOUR, font)
        return
    unit_text = fit_text(unit, font, (panel.width - 2 * pad) / 3)
    length = round(panel.width - 2 * pad - font.getlength(unit_text) - pixels)
    if length < 2:
        return
    # The colours as they look where they cover a grey photo.
    row = depth_table()[np.linspace(0, 255, length).round().astype(int)]
    blended = (row * DEPTH_OPACITY + np.array(BACKGROUND) * (1 - DEPTH_OPACITY)).round().astype(np.uint8)
    bar = np.broadcast_to(blended, (pixels, length, 3))
    panel.paste(Image.fromarray(np.ascontiguousarray(bar)), (pad, top))
    draw.text((pad + length + pixels / 2, top - 0.1 * pixels), unit_text, TEXT_COLOUR, font)
    free = float(pad)  # left end of what no text covers yet
    for value in _ticks(scale.low, scale.high):
        share = 0.5 if scale.high == scale.low else (value - scale.low) / (scale.high - scale.low)
        x = pad + share * (length - 1)
        text = f"{value:.4g}"
        left = min(max(x - font.getlength(text) / 2, pad), panel.width - pad - font.getlength(text))
        if left < free:
            continue
        draw.line((x, top + pixels * 0.7, x, top + pixels * 1.1), fill=TEXT_COLOUR, width=max(pixels // 10, 1))
        draw.text((left, top + pixels * 1.15), text, TEXT_COLOUR, font)
        free = left + font.getlength(text) + pixels / 2


def _ticks(low: float, high: float) -> list[float]:
    """Round values between two depths."""
    if low == high:
        return [low]
    inner = [float(value) for value in MaxNLocator(nbins=_TICKS).tick_values(low, high) if low <= value <= high]
    return inner or [low, high]
