"""KITTI: streets, with depth from a laser scanner."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from dinov2.data.datasets.depth_list import DepthList
from dinov2.data.datasets.splits import Split
from dinov2.data.datasets.text_list import find_text_list

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
