"""Series of radiographs with boxes, in the layout of GDXray: a folder per series, with a table of boxes in it."""

from pathlib import Path
from typing import Unpack

from dinov2.data.datasets.base import Transforms
from dinov2.data.datasets.boxes import BoxTable, ListedBoxes
from dinov2.data.datasets.scan import find_images

_TABLE = "ground_truth.txt"
_COLUMNS = 5


class GDXray(ListedBoxes):
    """Images ``Castings/C0001/C0001_0001.png`` of 8 or 16 bits; a series shows one object, and is a part.

    ``ground_truth.txt`` in a series has a row per box: number of the image, x1, x2, y1, y2, in pixels that count from
    1, the last one in the box. A series without the file has no box that is known; its images are left out unless
    ``unlabelled`` is set.

    Attributes:
        root: folder that holds the series.

    Reference: Mery et al., GDXray: The database of X-ray images for nondestructive testing, J. Nondestr. Eval. 34
    (2015).
    """

    def __init__(
        self, root: str | Path, series: str = "", unlabelled: bool = False, **transforms: Unpack[Transforms]
    ) -> None:
        """Reads the tables of boxes; images are not opened.

        Args:
            root: folder that holds the series, such as ``GDXray/Castings``.
            series: names, divided by commas, such as ``C0001,C0007``; empty for all. The set has no splits: give
                train, val and test series of their own.
            unlabelled: whether images of series without boxes are taken too, as for pretraining.
            **transforms: see `ImageDataset`.

        Raises:
            FileNotFoundError: the folder, a series, or an image of a box is not there; no series has boxes.
            ValueError: a row that is no box, naming file and line.
        """
        self.root = Path(root)
        there = sorted(path.name for path in self.root.iterdir() if path.is_dir()) if self.root.is_dir() else []
        names = [name.strip() for name in series.split(",")] if series else there
        missing = [name for name in names if name not in there]
        if missing or not there:
            what = f"no series {', '.join(missing)}" if there else "no folder of a series, such as C0001"
            raise FileNotFoundError(f"{self.root} has {what}" + (f"; there are {', '.join(there)}" if there else ""))
        paths: list[str] = []
        self._series: list[str] = []
        self._labelled: list[bool] = []
        rows: list[tuple[list[float], int, str]] = []
        for name in names:
            table = self.root / name / _TABLE
            if not table.is_file() and not unlabelled:
                continue
            images = find_images(self.root / name)
            numbers = {_number_of(path): len(paths) + place for place, path in enumerate(images)}
            for line, text in enumerate(table.read_text().splitlines() if table.is_file() else (), start=1):
                if text.strip():
                    number, box = _read_row(text, f"{table}, line {line}")
                    if number not in numbers:
                        raise FileNotFoundError(f"{table}, line {line}: there is no image {number} in {name}")
                    rows.append((box, numbers[number], f"{table}, line {line}"))
            paths += [f"{name}/{path}" for path in images]
            self._series += [name] * len(images)
            self._labelled += [table.is_file()] * len(images)
        if not paths:
            raise FileNotFoundError(f"{self.root}: none of the series {', '.join(names)} has images and {_TABLE}")
        boxes = BoxTable.build(
            [box for box, _, _ in rows],
            [0] * len(rows),
            [image for _, image, _ in rows],
            len(paths),
            source=self.root,
            where=lambda position: rows[position][2],
        )
        super().__init__(self.root, paths, ("defect",), boxes, **transforms)

    def get_group_ids(self) -> list[str]:
        """The series of each image."""
        return self._series.copy()

    def knows_boxes(self, index: int) -> bool:
        return self._labelled[index]


def _number_of(path: str) -> int:
    """Number of an image in its series: ``C0001_0027.png`` is 27; -1 where the name has none."""
    digits = path.rpartition("/")[2].partition(".")[0].rpartition("_")[2]
    return int(digits) if digits.isdecimal() else -1


def _read_row(text: str, where: str) -> tuple[int, list[float]]:
    try:
        values = [float(word) for word in text.replace(",", " ").split()]
    except ValueError:
        values = []
    if len(values) != _COLUMNS or not values[0].is_integer():
        raise ValueError(f"{where}: must be the number of an image, x1, x2, y1 and y2, found {text.strip()[:80]!r}")
    number, left, right, top, bottom = values
    return int(number), [left - 1, top - 1, right, bottom]
