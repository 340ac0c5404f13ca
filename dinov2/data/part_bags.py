"""The photos of a part together, for heads that judge parts."""

import logging
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from dinov2.data.datasets.base import MISSING_TARGET
from dinov2.data.pretraining import SampleKey
from dinov2.data.task_dataset import MAX_SUBSTITUTES, TaskDataset
from dinov2.data.task_samples import TaskSample
from dinov2.utils.errors import RunError

logger = logging.getLogger("dinov2")


class PartBags(Dataset[TaskSample]):
    """One item per part: up to ``max_photos`` of its photos, each transformed by itself, and the part's label.

    In training the photos are a random subset, drawn anew every time; in evaluation they are evenly spaced over the
    part, in the order of the dataset. Bags with fewer photos are filled up with zeros that ``valid`` marks.

    Where the labels of a part's photos differ, the part gets the label by which parts are scored
    (`dinov2.eval.part_scores`): with two classes 1 as soon as one photo has it, for a defect is often seen in one photo
    only; with more classes the most frequent label, of equally frequent ones the lowest. Photos without a label do not
    count; a part without any label has -1.

    Photos that cannot be read are left out in training, and other photos of the part take their place; a part without
    any readable photo is replaced by another one. In evaluation they are an error.

    Args:
        photos: reads and transforms single photos, for classification with one label.
        max_photos: largest number ``P`` of photos of a bag, at least 1.

    Attributes:
        part_ids: the parts, in the order in which they first occur.
        labels: ``[parts]``, -1 where missing.
        num_mixed: parts whose photos have different labels.
        spares: parts that may take the place of one without a readable photo, by default all.

    Raises:
        ValueError: for photos of another task or with several labels, or ``max_photos`` below 1.
    """

    def __init__(self, photos: TaskDataset, *, max_photos: int) -> None:
        if photos.task != "classification" or photos.multi_label:
            raise ValueError("bags of photos have one label per part: they need classification without multi_label")
        if max_photos < 1:
            raise ValueError(f"max_photos must be at least 1, got {max_photos}")
        self.photos = photos
        self.max_photos = max_photos
        members: dict[str, list[int]] = {}
        for index, part in enumerate(photos.dataset.get_group_ids()):
            members.setdefault(part, []).append(index)
        self.part_ids = tuple(members)
        self._members = [np.array(indices, dtype=np.int64) for indices in members.values()]
        targets = photos.dataset.get_targets()
        self.labels = np.array([part_label(targets[indices], photos.num_classes) for indices in self._members])
        self.spares: Sequence[int] = range(len(self._members))
        self.num_mixed = sum(len(set(targets[indices].tolist()) - {MISSING_TARGET}) > 1 for indices in self._members)
        if self.num_mixed:
            logger.info("%d of %d parts have photos of different labels", self.num_mixed, len(self))

    def __len__(self) -> int:
        return len(self._members)

    def members(self, part: int) -> npt.NDArray[np.int64]:
        """Indices of all photos of a part."""
        return self._members[part]

    def __getitem__(self, key: int | SampleKey) -> TaskSample:
        """Returns ``image [P, 3, h, w]``, ``valid [P]``, ``label`` and ``index``, the number of the part.

        Raises:
            OSError: in evaluation, for a photo that cannot be read.
            ValueError: photos of different sizes, or what `TaskDataset` refuses.
            RunError: in training, when neither the part nor any of its substitutes has a readable photo.
        """
        photos = self.photos
        unreadable: list[str] = []
        with photos.random_state(key):
            for part in photos.substitutes(key, self.spares):
                samples = self._load(part, unreadable)
                if samples:
                    return self._join(part, samples, unreadable)
        raise RunError(f"no part with a readable photo after {MAX_SUBSTITUTES} substitutes: {', '.join(unreadable)}")

    def _load(self, part: int, unreadable: list[str]) -> list[TaskSample]:
        indices = self._members[part]
        if not self.photos.training:
            places = np.linspace(0, len(indices) - 1, min(self.max_photos, len(indices))).round().astype(np.int64)
            return [self.photos.load(index) for index in indices[places].tolist()]
        samples: list[TaskSample] = []
        for index in indices[torch.randperm(len(indices)).numpy()].tolist():
            if len(samples) == self.max_photos:
                break
            try:
                samples.append(self.photos.load(index))
            except OSError as error:
                unreadable.append(self.photos.note_unreadable(index, error))
        return samples

    def _join(self, part: int, samples: Sequence[TaskSample], unreadable: Sequence[str]) -> TaskSample:
        images = [sample["image"] for sample in samples]
        sizes = sorted({tuple(image.shape[-2:]) for image in images})
        if len(sizes) > 1:
            raise ValueError(
                f"photos of part {self.part_ids[part]!r} have the sizes {sizes} after the transform; bags need one: "
                "use resize=stretch, or center_crop"
            )
        image = images[0].new_zeros(self.max_photos, *images[0].shape)
        image[: len(images)] = torch.stack(images)
        return {
            "image": image,
            "valid": torch.arange(self.max_photos) < len(images),
            "label": torch.tensor(int(self.labels[part])),
            "index": part,
            "unreadable": tuple(dict.fromkeys(unreadable)),
        }


def part_label(labels: npt.NDArray[np.int64], num_classes: int) -> int:
    """The label of a part whose photos have ``labels``, -1 where missing; see `PartBags`."""
    known = labels[labels != MISSING_TARGET]
    if len(known) == 0:
        return MISSING_TARGET
    return int(known.max()) if num_classes == 2 else int(np.bincount(known).argmax())
