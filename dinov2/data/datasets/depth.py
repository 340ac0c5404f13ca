"""NYU Depth V2 and KITTI: images with depth maps, listed in a text file per split."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Unpack

import numpy as np
import numpy.typing as npt

from dinov2.data.datasets.base import ListedImages, Split, Transforms
from dinov2.data.datasets.dense_targets import DepthReader, DepthSource
from dinov2.data.datasets.scan import CompactStrings, find_text_list, read_text_list, shorten_paths

logger = logging.getLogger("dinov2")

_NO_DEPTH = "None"  # in the place of a depth map that does not exist


class DepthList(ListedImages, DepthSource):
    """What sets in this layout share: depths in metres as 16-bit PNG, 0 where nothing was measured.

    Attributes:
        title: name of the set in errors.
        lists: names that the list of each split may have.
        folders: of images and depth maps below the root; where there is none, their paths are relative to the root.
        scale: metres = raw value x scale.
        list_path: the file that lists the split.
        num_without_depth: lines that were skipped because they name no depth map.
    """

    depth_unit = "m"
    title: ClassVar[str]
    lists: ClassVar[Mapping[Split, tuple[str, ...]]]
    folders: ClassVar[tuple[str, str]] = ("", "")
    scale: ClassVar[float]

    def __init__(self, root: str | Path, split: str, depth_scale: float = 0, **transforms: Unpack[Transforms]) -> None:
        """Reads the list of a split; images and depth maps are not touched.

        Args:
            root: folder with the lists; they may also have the names of BTS, such as
                ``eigen_train_files_with_gt.txt`` or ``nyudepthv2_train_files_with_gt.txt``.
            split: ``TRAIN`` or ``TEST``, in any case.
            depth_scale: metres = value in the file x this, for files of any kind; 0 for the layout's own scale, which
                is that of 16-bit files: with it, 8-bit and floating-point depth maps are refused.
            **transforms: see `ImageDataset`.

        Raises:
            FileNotFoundError: when the list is not there.
            ValueError: for another split, a scale below 0, or a list that is empty or broken, naming its line.
        """
        self.root = Path(root)
        self.split = Split.parse(split)
        if self.split not in self.lists:
            raise ValueError(f"{self.title} has no {self.split.name}; it has TRAIN and TEST")
        self.list_path = find_text_list(self.root, *self.lists[self.split])
        image_folder, self.depth_folder = (
            self.root / name if (self.root / name).is_dir() else self.root for name in self.folders
        )
        if not 0 <= depth_scale < np.inf:
            raise ValueError(f"depth_scale must be a number above 0, found {depth_scale:g}")
        assumed = "" if depth_scale else f"16-bit files, metres x {1 / self.scale:g}"
        self._reader = DepthReader(scale=depth_scale or self.scale, invalid=0, assumed=assumed)
        images, depths, self.num_without_depth = _read_lines(self.list_path)
        self._depths = CompactStrings(depths)
        super().__init__(image_folder, images, **transforms)
        if self.num_without_depth:
            logger.info("%s: %d lines without a depth map are skipped", self.list_path, self.num_without_depth)

    def get_depth_path(self, index: int) -> Path:
        """Path of the depth map."""
        return self.depth_folder / self._depths[index]

    def get_depth(self, index: int) -> npt.NDArray[np.float32]:
        depth = self._reader.read(self.get_depth_path(index), self.get_image_size(index))
        return self.fill_uncounted(index, depth, np.nan)

    def get_group_ids(self) -> list[str]:
        """The recording that each image comes from: the first folder of its depth map's path."""
        return [path.partition("/")[0] for path in self._depths]


def _read_lines(path: Path) -> tuple[list[str], list[str], int]:
    """Paths of images and of depth maps, and how many lines have none."""
    rows, skipped = [], 0
    for line, number in zip(*read_text_list(path), strict=True):
        words = line.split()
        if len(words) < 2:
            raise ValueError(f"{path}, line {number}: must read 'image depth-map focal-length', found {line!r:.200}")
        if words[1] == _NO_DEPTH:
            skipped += 1
        else:
            rows.append((words, number))
    if not rows:
        raise ValueError(f"{path} lists no image with a depth map ({skipped} without)")
    columns = []
    for column in (0, 1):
        paths = [words[column].removeprefix("/") for words, _ in rows]  # NYU's lists begin paths with a slash
        for position, reason in shorten_paths(paths):
            raise ValueError(f"{path}, line {rows[position][1]}: path {paths[position]!r} {reason}")
        columns.append(paths)
    return columns[0], columns[1], skipped


class KITTIDepth(DepthList):
    """Images of about 1242×375 pixels with sparse depth maps, split as by Eigen et al.

    Lines of ``root/kitti_eigen_train.txt`` and ``root/kitti_eigen_test.txt`` read ``<image> <depth map> <focal
    length>``; those with ``None`` in the place of the depth map are skipped and counted. Images
    (``2011_09_26/<drive>/image_02/data/0000000069.png``) lie below ``root/input``, depth maps
    (``<drive>/proj_depth/groundtruth/image_02/0000000069.png``) below ``root/gt_depth``; where there is no such folder,
    below ``root``. Depth maps are 16-bit PNG, metres x 256, 0 where nothing was measured. Groups are the drives.

    Reference:
        Uhrig et al., Sparsity invariant CNNs, 3DV 2017 (depth maps); Eigen et al., Depth map prediction from a single
        image using a multi-scale deep network, NeurIPS 2014 (split).
    """

    title = "KITTI's split by Eigen et al."
    lists: ClassVar = {
        Split.TRAIN: ("kitti_eigen_train.txt", "eigen_train_files_with_gt.txt"),
        Split.TEST: ("kitti_eigen_test.txt", "eigen_test_files_with_gt.txt"),
    }
    folders = ("input", "gt_depth")
    scale = 1 / 256


class NYUDepthV2(DepthList):
    """Images of 640×480 pixels with synchronised depth maps, in the layout of BTS and of DINOv2's depth evaluation.

    Lines of ``root/nyu_train.txt`` and ``root/nyu_test.txt`` read
    ``/kitchen_0028b/rgb_00045.jpg /kitchen_0028b/sync_depth_00045.png 518.8579`` (further words are left out), with
    paths relative to ``root``. Depth maps are 16-bit PNG in millimetres, 0 where nothing was measured. Groups are the
    recordings (``kitchen_0028b``); the test list names only the kind of room (``kitchen``).

    Reference:
        Silberman et al., Indoor segmentation and support inference from RGBD images, ECCV 2012; Lee et al., From big to
        small: multi-scale local planar guidance for monocular depth estimation, 2019 (BTS, the lists).
    """

    title = "NYU Depth V2"
    lists: ClassVar = {
        Split.TRAIN: ("nyu_train.txt", "nyudepthv2_train_files_with_gt.txt"),
        Split.TEST: ("nyu_test.txt", "nyudepthv2_test_files_with_gt.txt"),
    }
    scale = 1 / 1000
