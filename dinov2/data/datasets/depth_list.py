"""Photos with depth maps, listed as lines ``photo depth-map focal-length`` in a text file per split."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dinov2.data.datasets.base import ImageDataset
from dinov2.data.datasets.compact import CompactStrings
from dinov2.data.datasets.dense_targets import DepthSource
from dinov2.data.datasets.relative_paths import shorten_paths
from dinov2.data.datasets.target_files import DepthReader
from dinov2.data.datasets.text_list import read_text_list

logger = logging.getLogger("dinov2")

_NO_DEPTH = "None"  # in the place of a depth map that does not exist


class DepthList(ImageDataset, DepthSource):
    """What sets in this layout share: depths in metres as 16-bit PNG, 0 where nothing was measured.

    Attributes:
        list_path: the file that lists the split.
        num_without_depth: lines that were skipped because they name no depth map.
    """

    depth_unit = "m"

    def __init__(
        self,
        list_path: Path,
        image_folder: Path,
        depth_folder: Path,
        scale: float,
        *,
        transform: Callable[[Image.Image], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
    ) -> None:
        """Reads the list; photos and depth maps are not touched.

        Args:
            list_path: file with one photo per line.
            image_folder: what the paths of photos are relative to.
            depth_folder: what the paths of depth maps are relative to.
            scale: metres = raw value x scale.
            transform: maps the RGB image.
            target_transform: maps the class index, which is always missing (-1).

        Raises:
            ValueError: when the list is empty or broken, naming its line.
        """
        super().__init__(transform=transform, target_transform=target_transform)
        self.list_path = list_path
        self.image_folder = image_folder
        self.depth_folder = depth_folder
        self._reader = DepthReader(scale=scale, invalid=0)
        images, depths, self.num_without_depth = _read_lines(list_path)
        self._images, self._depths = CompactStrings(images), CompactStrings(depths)
        if self.num_without_depth:
            logger.info("%s: %d lines without a depth map are skipped", list_path, self.num_without_depth)

    def __len__(self) -> int:
        return len(self._images)

    def get_image_path(self, index: int) -> Path:
        return self.image_folder / self._images[index]

    def get_target(self, index: int) -> int | None:
        """Always None: there are no classes."""
        return None

    def get_depth_path(self, index: int) -> Path:
        """Path of the depth map."""
        return self.depth_folder / self._depths[index]

    def get_depth(self, index: int) -> npt.NDArray[np.float32]:
        return self._reader.read(self.get_depth_path(index), self.get_image_size(index))

    def get_group_ids(self) -> list[str]:
        """The recording that each photo comes from: the first folder of its depth map's path."""
        return [path.partition("/")[0] for path in self._depths]


def _read_lines(path: Path) -> tuple[list[str], list[str], int]:
    """Paths of photos and of depth maps, and how many lines have none."""
    rows, skipped = [], 0
    for line, number in zip(*read_text_list(path), strict=True):
        words = line.split()
        if len(words) < 2:
            raise ValueError(f"{path}, line {number}: must read 'photo depth-map focal-length', found {line!r:.200}")
        if words[1] == _NO_DEPTH:
            skipped += 1
        else:
            rows.append((words, number))
    if not rows:
        raise ValueError(f"{path} lists no photo with a depth map ({skipped} without)")
    columns = []
    for column in (0, 1):
        paths = [words[column].removeprefix("/") for words, _ in rows]  # NYU's lists begin paths with a slash
        for position, reason in shorten_paths(paths):
            raise ValueError(f"{path}, line {rows[position][1]}: path {paths[position]!r} {reason}")
        columns.append(paths)
    return columns[0], columns[1], skipped
