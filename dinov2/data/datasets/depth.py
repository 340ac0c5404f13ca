"""NYU Depth V2 and KITTI: images with depth maps, listed in a text file per split."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dinov2.data.datasets.base import ImageDataset, Split
from dinov2.data.datasets.dense_targets import DepthReader, DepthSource
from dinov2.data.datasets.scan import CompactStrings, find_text_list, read_text_list, shorten_paths

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


_LISTS = {
    Split.TRAIN: ("kitti_eigen_train.txt", "eigen_train_files_with_gt.txt"),
    Split.TEST: ("kitti_eigen_test.txt", "eigen_test_files_with_gt.txt"),
}


class KITTIDepth(DepthList):
    """Photos of about 1242×375 pixels with sparse depth maps, split as by Eigen et al.

    Lines of ``root/kitti_eigen_train.txt`` and ``root/kitti_eigen_test.txt`` read ``<photo> <depth map> <focal
    length>``; those with ``None`` in the place of the depth map are skipped and counted. Photos
    (``2011_09_26/<drive>/image_02/data/0000000069.png``) lie below ``root/input``, depth maps
    (``<drive>/proj_depth/groundtruth/image_02/0000000069.png``) below ``root/gt_depth``; where there is no such folder,
    below ``root``. Depth maps are 16-bit PNG, metres x 256, 0 where nothing was measured. Groups are the drives.

    Reference:
        Uhrig et al., Sparsity invariant CNNs, 3DV 2017 (depth maps); Eigen et al., Depth map prediction from a single
        image using a multi-scale deep network, NeurIPS 2014 (split).
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        transform: Callable[[Image.Image], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
    ) -> None:
        """Reads the list of a split.

        Args:
            root: folder with the lists, ``input`` and ``gt_depth``; the lists may also have the names of BTS,
                ``eigen_{train,test}_files_with_gt.txt``.
            split: ``TRAIN`` or ``TEST``, in any case.
            transform: maps the RGB image.
            target_transform: maps the class index, which is always missing (-1).

        Raises:
            FileNotFoundError: when the list is not there.
            ValueError: for another split, or a list that is empty or broken.
        """
        self.root = Path(root)
        self.split = Split.parse(split)
        if self.split not in _LISTS:
            raise ValueError(f"KITTI's split by Eigen et al. has no {self.split.name}; it has TRAIN and TEST")
        image_folder, depth_folder = self.root / "input", self.root / "gt_depth"
        super().__init__(
            find_text_list(self.root, _LISTS[self.split]),
            image_folder if image_folder.is_dir() else self.root,
            depth_folder if depth_folder.is_dir() else self.root,
            scale=1 / 256,
            transform=transform,
            target_transform=target_transform,
        )


_NYU_DEPTH_V2_LISTS = {
    Split.TRAIN: ("nyu_train.txt", "nyudepthv2_train_files_with_gt.txt"),
    Split.TEST: ("nyu_test.txt", "nyudepthv2_test_files_with_gt.txt"),
}


class NYUDepthV2(DepthList):
    """Photos of 640×480 pixels with synchronised depth maps, in the layout of BTS and of DINOv2's depth evaluation.

    Lines of ``root/nyu_train.txt`` and ``root/nyu_test.txt`` read
    ``/kitchen_0028b/rgb_00045.jpg /kitchen_0028b/sync_depth_00045.png 518.8579`` (further words are left out), with
    paths relative to ``root``. Depth maps are 16-bit PNG in millimetres, 0 where nothing was measured. Groups are the
    recordings (``kitchen_0028b``); the test list names only the kind of room (``kitchen``).

    Reference:
        Silberman et al., Indoor segmentation and support inference from RGBD images, ECCV 2012; Lee et al., From big to
        small: multi-scale local planar guidance for monocular depth estimation, 2019 (BTS, the lists).
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        transform: Callable[[Image.Image], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
    ) -> None:
        """Reads the list of a split.

        Args:
            root: folder with the lists and the recordings; the lists may also have the names of BTS,
                ``nyudepthv2_{train,test}_files_with_gt.txt``.
            split: ``TRAIN`` or ``TEST``, in any case.
            transform: maps the RGB image.
            target_transform: maps the class index, which is always missing (-1).

        Raises:
            FileNotFoundError: when the list is not there.
            ValueError: for another split, or a list that is empty or broken.
        """
        self.root = Path(root)
        self.split = Split.parse(split)
        if self.split not in _NYU_DEPTH_V2_LISTS:
            raise ValueError(f"NYU Depth V2 has no split {self.split.name}; it has TRAIN and TEST")
        super().__init__(
            find_text_list(self.root, _NYU_DEPTH_V2_LISTS[self.split]),
            self.root,
            self.root,
            scale=1 / 1000,
            transform=transform,
            target_transform=target_transform,
        )
