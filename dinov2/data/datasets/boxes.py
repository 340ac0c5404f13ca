"""Datasets that know boxes: what they offer, and how the boxes of a set are checked, clipped and kept."""

import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, Unpack

import cv2
import numpy as np
import numpy.typing as npt

from dinov2.data.datasets.base import ListedImages, Transforms
from dinov2.data.datasets.dense_targets import IGNORED, BadTargetError
from dinov2.data.preprocessing.step import points_in

logger = logging.getLogger("dinov2")

Boxes = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


class BoxSource(ABC):
    """A dataset that knows boxes around objects, and their classes.

    Attributes:
        box_classes: names of the classes by label; there is none for the background.
    """

    box_classes: tuple[str, ...]

    @property
    def has_boxes(self) -> bool:
        """Whether the set knows boxes at all; where it does not, everything else here is a ValueError."""
        return True

    @abstractmethod
    def get_boxes(self, index: int) -> tuple[Boxes, Labels]:
        """Boxes of an image.

        Returns:
            Corners x1 y1 x2 y2 in pixels of the image, inside it and of an area above 0, float32 ``[n, 4]``; labels,
            int64 ``[n]``.

        Raises:
            UnreadableImageError: when the size of the image cannot be read.
            BadTargetError: when boxes were drawn on an image of another size.
        """

    def get_crowd(self, index: int) -> Flags:
        """Which boxes stand for a group of objects ``[n]``: nothing is learnt from them, and finding them is no error.

        They are evaluated as COCO does.
        """
        return np.zeros(len(self.get_boxes(index)[0]), dtype=np.bool_)

    def get_objects(self, index: int) -> tuple[Boxes, Labels]:
        """The boxes to learn from, those of `get_boxes` that are no crowds, and their labels."""
        (boxes, labels), kept = self.get_boxes(index), ~self.get_crowd(index)
        return boxes[kept], labels[kept]

    def get_box_labels(self, index: int) -> Labels:
        """Labels of the boxes to learn from, found without reading the image where that is possible."""
        return self.get_objects(index)[1]

    def knows_boxes(self, index: int) -> bool:
        """Whether an image without boxes is known to show nothing; False where nobody has looked."""
        return True


@dataclass(frozen=True, eq=False)
class BoxTable:
    """The checked boxes of all images of a set.

    Attributes:
        boxes: corners x1 y1 x2 y2, float32 ``[M, 4]``, in pixels, or as shares of width and height.
        labels: int64 ``[M]``.
        crowd: bool ``[M]``, see `BoxSource.get_crowd`.
        starts: where the boxes of each image begin and the last ends, int64 ``[N + 1]``.
        sizes: height and width that the annotation says of each image, int64 ``[N, 2]``; 0 where it says nothing.
        are_shares: whether corners are shares of the image's size.
    """

    boxes: Boxes
    labels: Labels
    crowd: Flags
    starts: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    are_shares: bool = False

    @classmethod
    def build(
        cls,
        boxes: Sequence[Sequence[float]],
        labels: Sequence[int],
        images: Sequence[int],
        num_images: int,
        *,
        source: Path,
        where: Callable[[int], str],
        crowd: Sequence[bool] | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
        are_shares: bool = False,
    ) -> Self:
        """Checks the boxes of a set, clips what reaches beyond its image, and drops what then has no area.

        What is clipped or dropped is counted and told in one line each.

        Args:
            boxes: corners x1 y1 x2 y2 of all boxes ``[M]``, in any order of images.
            labels: of the boxes ``[M]``, inside the classes.
            images: number of the image that each box is of ``[M]``.
            num_images: of the set, ``N``.
            source: file or folder that the boxes come from, for messages.
            where: names a box, by its position, for messages.
            crowd: see `BoxSource.get_crowd`; None for none.
            sizes: height and width that the annotation says of each image ``[N]``, 0 where it says nothing; None
                where it never does.
            are_shares: whether corners are shares of the image's size.

        Raises:
            ValueError: a corner is not finite, or the corners are in the wrong order; the box is named.
        """
        corners = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
        numbers = np.asarray(images, dtype=np.int64)
        known = np.zeros((num_images, 2), dtype=np.int64) if sizes is None else np.asarray(sizes, dtype=np.int64)
        known = known.reshape(num_images, 2)
        for wrong, reason in (
            (~np.isfinite(corners).all(axis=1), "has a corner that is no finite number"),
            ((corners[:, 2:] < corners[:, :2]).any(axis=1), "has a right or lower edge before its left or upper one"),
        ):
            if wrong.any():
                first, count = int(wrong.argmax()), int(wrong.sum())
                more = f" ({count} such boxes in all)" if count > 1 else ""
                raise ValueError(
                    f"{source}: {where(first)}: the box (x1, y1, x2, y2) {corners[first].tolist()} {reason}{more}"
                )
        limits = known[numbers][:, ::-1].astype(np.float64)  # width, height
        limits[limits.min(axis=1) <= 0] = 1.0 if are_shares else np.inf
        flat = (corners[:, 2:] == corners[:, :2]).any(axis=1)
        clipped = _clip(corners, limits)
        outside = (clipped[:, 2:] <= clipped[:, :2]).any(axis=1) & ~flat
        # Shares are rounded to a few digits when they are written: a millionth is no sign of a mistake.
        beyond = (np.abs(clipped - corners) > (1e-4 if are_shares else 0)).any(axis=1) & ~outside & ~flat
        for found, what, level in (
            (beyond, "reach beyond their image and are clipped to it", logging.INFO),
            (outside, "lie wholly outside their image and are left out", logging.WARNING),
            (flat, "have no area and are left out", logging.WARNING),
        ):
            if found.any():
                logger.log(
                    level, "%s: %d of %d boxes %s, such as %s", source, found.sum(), len(corners), what,
                    where(int(found.argmax())),
                )  # fmt: skip
        order = np.argsort(numbers, kind="stable")
        order = order[~(flat | outside)[order]]
        counts = np.bincount(numbers[order], minlength=num_images)
        return cls(
            boxes=clipped[order].astype(np.float32),
            labels=np.asarray(labels, dtype=np.int64)[order],
            crowd=np.zeros(len(order), dtype=np.bool_) if crowd is None else np.asarray(crowd, dtype=np.bool_)[order],
            starts=np.concatenate([np.zeros(1, dtype=np.int64), counts.cumsum()]),
            sizes=known,
            are_shares=are_shares,
        )

    def rows(self, index: int) -> slice:
        """Where the boxes of an image stand."""
        return slice(int(self.starts[index]), int(self.starts[index + 1]))

    def read(self, index: int, size: tuple[int, int], path: Path) -> tuple[Boxes, Labels, Flags]:
        """Boxes of an image in pixels, inside it, their labels, and which are crowds.

        Args:
            index: of the image.
            size: its height and width.
            path: names it.

        Raises:
            BadTargetError: when the annotation says another size.
        """
        rows, said = self.rows(index), tuple(self.sizes[index].tolist())
        if min(said) > 0 and said != size:
            turned = "; it is turned: the image's EXIF orientation counts" if said == size[::-1] else ""
            raise BadTargetError(
                path, f"has {size[1]}x{size[0]} pixels (width x height), its boxes were drawn on {said[1]}x{said[0]}"
                f"{turned}"
            )  # fmt: skip
        limits = np.array([[size[1], size[0]]], dtype=np.float32)
        boxes = self.boxes[rows] * np.tile(limits, 2) if self.are_shares else self.boxes[rows]
        clipped = _clip(boxes, limits)
        kept = (clipped[:, 2:] > clipped[:, :2]).all(axis=1)
        if not kept.all():
            _say_outside(path, int((~kept).sum()))
        return clipped[kept], self.labels[rows][kept], self.crowd[rows][kept]


def _clip(boxes: npt.NDArray[np.floating], limits: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """Corners ``[M, 4]`` moved into images of the given width and height ``[M, 2]``."""
    clipped: npt.NDArray[np.floating] = np.clip(boxes, 0, np.tile(limits, 2))
    return clipped


@functools.cache  # said once per image and process
def _say_outside(path: Path, count: int) -> None:
    logger.warning("%s: %d of its boxes lie wholly outside of it and are left out", path, count)


class ListedBoxes(ListedImages, BoxSource):
    """Images below one folder with boxes, all listed when the set is opened."""

    def __init__(
        self,
        image_folder: Path,
        paths: Sequence[str],
        classes: Sequence[str],
        boxes: BoxTable,
        **transforms: Unpack[Transforms],
    ) -> None:
        """Keeps the lists.

        Args:
            image_folder: what paths are relative to.
            paths: of the images ``[N]``, with ``/`` between folders.
            classes: names by label.
            boxes: of the ``N`` images.
            **transforms: see `ImageDataset`.
        """
        super().__init__(image_folder, paths, **transforms)
        self.box_classes = tuple(classes)
        self.box_table = boxes

    def get_boxes(self, index: int) -> tuple[Boxes, Labels]:
        return self._read(index)[:2]

    def get_crowd(self, index: int) -> Flags:
        return self._read(index)[2]

    def get_objects(self, index: int) -> tuple[Boxes, Labels]:
        boxes, labels, crowd = self._read(index)
        return boxes[~crowd], labels[~crowd]

    def _read(self, index: int) -> tuple[Boxes, Labels, Flags]:
        found = self.box_table.read(index, self.get_image_size(index), self.get_image_path(index))
        return boxes_that_count(self.counted_region(index), *found)

    def get_box_labels(self, index: int) -> Labels:
        if self.preprocessing.has_region:
            return self.get_objects(index)[1]
        rows = self.box_table.rows(index)
        return self.box_table.labels[rows][~self.box_table.crowd[rows]]


def boxes_that_count(
    region: npt.NDArray[np.bool_] | None, boxes: Boxes, labels: Labels, crowd: Flags
) -> tuple[Boxes, Labels, Flags]:
    """Boxes whose middle lies in the region of an image that counts; all without a region."""
    if region is None:
        return boxes, labels, crowd
    kept = points_in(region, (boxes[:, :2] + boxes[:, 2:]) / 2)
    return boxes[kept], labels[kept], crowd[kept]


def boxes_of_mask(mask: npt.NDArray[np.uint8]) -> tuple[Boxes, Labels]:
    """Boxes around the connected pixels of each class of a mask, corners counting as connected.

    Args:
        mask: classes ``[H, W]``, 0 for the background, or ``IGNORED``.

    Returns:
        Corners in pixels ``[n, 4]``, the end excluded; labels ``[n]``, the class in the mask less 1.
    """
    boxes, labels = [np.zeros((0, 4), dtype=np.float32)], [np.zeros(0, dtype=np.int64)]
    for value in np.unique(mask).tolist():
        if value in (0, IGNORED):
            continue
        _, _, stats, _ = cv2.connectedComponentsWithStats((mask == value).astype(np.uint8), connectivity=8)
        left, top, width, height = stats[1:, :4].T  # the first is what is not of the class
        boxes.append(np.stack([left, top, left + width, top + height], axis=1).astype(np.float32))
        labels.append(np.full(len(left), value - 1, dtype=np.int64))
    return np.concatenate(boxes), np.concatenate(labels)


def four_numbers(value: object) -> bool:
    """Whether something is a list of four numbers, as a box is in JSON; they need not be finite."""
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(isinstance(number, int | float) and not isinstance(number, bool) for number in value)
    )
