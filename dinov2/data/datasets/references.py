"""Images without a defect to compare others with: those that a set names, or good ones of the same part."""

from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from dinov2.data.datasets.base import ImageDataset
from dinov2.data.datasets.boxes import BoxSource
from dinov2.data.datasets.dense_targets import BadTargetError


class ReferenceSource(ABC):
    """A dataset whose items may name an image to compare with, such as the template of a board."""

    @abstractmethod
    def get_reference_path(self, index: int) -> Path | None:
        """Path of the image to compare with; None where the item names none."""


class References:
    """The image that each image of a set is compared with.

    It is the one that the item names, or else the first other image of the same part that is good: known to have no
    boxes, where the set knows boxes, and of class 0 elsewhere.

    Args:
        dataset: the set; its images are not opened.

    Raises:
        FileNotFoundError: an image that is named is not there; the first and the number of all are told.
        ValueError: an image has neither; the first and the number of all are told.
    """

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset
        count = len(dataset)
        self._paths: list[Path | None] = [None] * count
        if isinstance(dataset, ReferenceSource):
            self._paths = [dataset.get_reference_path(index) for index in range(count)]
        absent = [index for index, path in enumerate(self._paths) if path is not None and not path.is_file()]
        if absent:
            raise FileNotFoundError(
                f"{dataset.get_image_path(absent[0])} (image {absent[0]} of the set): its reference "
                f"{self._paths[absent[0]]} does not exist ({len(absent)} of the {count} images miss theirs)"
            )
        self._good = np.full(count, -1, dtype=np.int64)
        unnamed = [index for index, path in enumerate(self._paths) if path is None]
        if not unnamed:
            return
        groups, first_two = dataset.get_group_ids(), dict[str, list[int]]()
        for index in np.flatnonzero(_are_good(dataset)).tolist():
            members = first_two.setdefault(groups[index], [])
            if len(members) < 2:
                members.append(index)
        for index in unnamed:
            self._good[index] = next((other for other in first_two.get(groups[index], ()) if other != index), -1)
        lacking = [index for index in unnamed if self._good[index] < 0]
        if lacking:
            raise ValueError(
                f"{dataset.get_image_path(lacking[0])} (image {lacking[0]} of the set) has nothing to be compared "
                f"with: it names no reference, and its part has no other good image ({len(lacking)} of the {count} "
                "images are like it)"
            )

    def path(self, index: int) -> Path:
        """Path of the image to compare with."""
        return self._paths[index] or self.dataset.get_image_path(int(self._good[index]))

    def read(self, index: int, size: tuple[int, int] | None = None) -> Image.Image:
        """The image to compare with, prepared as the images of the set are; black where preprocessing has cut it.

        Args:
            index: of the image.
            size: its height and width, which the reference must have too; None where the caller looks itself.

        Raises:
            BadTargetError: the reference cannot be read, or is of another size.
        """
        path = self._paths[index]
        try:
            found = (
                self.dataset.get_placed_image(int(self._good[index])).whole
                if path is None
                else self.dataset.read_image(path)
            )
        except OSError as error:
            raise BadTargetError(self.dataset.get_image_path(index), f"its reference: {error}") from error
        if size is not None and (found.height, found.width) != size:
            raise BadTargetError(
                self.dataset.get_image_path(index),
                f"image {index} of the set has {size[0]} x {size[1]} pixels (height x width), its reference "
                f"{self.path(index)} {found.height} x {found.width}: both must show the same in the same place",
            )
        return found


def _are_good(dataset: ImageDataset) -> npt.NDArray[np.bool_]:
    """Which images are known to show no defect ``[N]``."""
    if isinstance(dataset, BoxSource) and dataset.has_boxes:
        return np.array([dataset.knows_boxes(i) and len(dataset.get_box_labels(i)) == 0 for i in range(len(dataset))])
    good: npt.NDArray[np.bool_] = dataset.get_targets() == 0
    return good
