"""A sheet of small pictures in rows, as a PNG file."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL.Image import Image

from dinov2.utils.files import write_atomically

_WIDEST_PANEL = 2.4  # inches
_NARROWEST_PANEL = 1.3
_WIDEST_SHEET = 22.0
_DOTS_PER_INCH = 120
_LINE_INCHES = 0.19


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One small picture.

    Attributes:
        picture: a photo, colours ``[h, w, 3]`` in [0, 1], or values ``[h, w]``, which are drawn from 0 (dark) to 1.
        title: text above it.
        frame: colour of a frame around it; none by default.
    """

    picture: Image | npt.NDArray[np.floating]
    title: str = ""
    frame: str | None = None


def write_panels(
    path: str | Path,
    rows: Sequence[Sequence[Panel | None]],
    *,
    row_titles: Sequence[str] | None = None,
    aspect: float = 1.0,
    heading: str = "",
) -> None:
    """Writes a sheet with one row of panels per entry; the same panels give the same bytes.

    Args:
        path: PNG file; its folder is created where needed.
        rows: panels from left to right; None leaves a place empty, and so does a short row.
        row_titles: text left of each row.
        aspect: height of a panel over its width.
        heading: text above the sheet.
    """
    columns = max(len(row) for row in rows)
    panel_width = min(max(_WIDEST_SHEET / columns, _NARROWEST_PANEL), _WIDEST_PANEL)
    title_inches = sum(
        _LINE_INCHES * max((panel.title.count("\n") + 1 for panel in row if panel and panel.title), default=0)
        for row in rows
    )
    heading_inches = _LINE_INCHES * 1.5 * (heading.count("\n") + 1) if heading else 0.0
    size = (panel_width * columns, panel_width * aspect * len(rows) + title_inches + heading_inches + 0.2)
    figure = Figure(figsize=size, dpi=_DOTS_PER_INCH, layout="constrained")
    if heading:
        figure.suptitle(heading, fontsize=11, parse_math=False)
    for number, row in enumerate(rows):
        for column, panel in enumerate(row):
            if panel is None:
                continue
            axes = figure.add_subplot(len(rows), columns, number * columns + column + 1)
            _draw(axes, panel)
            if column == 0 and row_titles is not None:
                axes.set_ylabel(row_titles[number], fontsize=9, parse_math=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, partial(figure.savefig, format="png"))


def _draw(axes: Axes, panel: Panel) -> None:
    axes.imshow(panel.picture, interpolation="nearest", cmap="inferno", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(panel.frame is not None)
    if panel.frame is not None:
        axes.spines[:].set(color=panel.frame, linewidth=4)
    if panel.title:
        axes.set_title(panel.title, fontsize=9, parse_math=False)
