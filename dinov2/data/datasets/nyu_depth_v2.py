"""NYU Depth V2: rooms, with depth from a Kinect."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from dinov2.data.datasets.depth_list import DepthList
from dinov2.data.datasets.splits import Split
from dinov2.data.datasets.text_list import find_text_list

_LISTS = {
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
        if self.split not in _LISTS:
            raise ValueError(f"NYU Depth V2 has no split {self.split.name}; it has TRAIN and TEST")
        super().__init__(
            find_text_list(self.root, _LISTS[self.split]),
            self.root,
            self.root,
            scale=1 / 1000,
            transform=transform,
            target_transform=target_transform,
        )
