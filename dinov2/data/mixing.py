"""Training samples made of several: mosaics, and objects pasted from other images, with their boxes and masks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as TF

from dinov2.data.datasets.boxes import boxes_of_mask
from dinov2.data.task_dataset import ReadOther, TaskSample
from dinov2.data.task_transforms import MIN_BOX_VISIBILITY, crop, uniform

_MARGIN = 0.15  # of an object's sides: how much of its surroundings is pasted, fading out
_MIN_MARGIN = 2  # pixels
_MOST_PASTED = 8  # objects
_TRIES = 10  # to find a free place for an object


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """Mixes a sample with others, before it is transformed; all draws come from torch's global generator.

    Attributes:
        mosaic: chance of a mosaic of four images.
        copy_paste: chance that objects of another image are pasted.
        mosaic_until: position in the run's stream of samples from which on there is no mosaic any more; the last
            images are to look as they will in use.
    """

    mosaic: float = 0.0
    copy_paste: float = 0.0
    mosaic_until: int = 0

    def __call__(self, sample: TaskSample, read_other: ReadOther, position: int) -> TaskSample:
        """The sample, a mosaic of it and three others, or with objects of another one pasted into it."""
        if uniform(0, 1) < self.copy_paste and (donor := read_other()) is not None:
            sample = paste_objects(sample, donor)
        if position < self.mosaic_until and uniform(0, 1) < self.mosaic:
            others = [read_other() for _ in range(3)]
            sample = make_mosaic([sample, *(sample if other is None else other for other in others)])
        return sample


def make_mosaic(samples: Sequence[TaskSample]) -> TaskSample:
    """Four images around a random point, each cut at random to its corner, at the size of the first.

    Images keep their scale, so that small defects stay as large as they are. Boxes are cut with them, and go where less
    than ``MIN_BOX_VISIBILITY`` of them is left; the corner beyond a small image is as beyond the edges of any image.

    Args:
        samples: four, not transformed, with the same kinds of targets.

    Reference: Bochkovskiy, Wang, Liao, YOLOv4 (2020), section 3.3, who resize the images too.
    """
    height, width = TF.get_size(samples[0]["image"])
    row, column = (round(side * uniform(0.25, 0.75)) for side in (height, width))
    corners = [
        (top, left, bottom - top, right - left)
        for top, bottom in ((0, row), (row, height))
        for left, right in ((0, column), (column, width))
    ]
    order = torch.randperm(len(corners)).tolist()
    pieces = [_cut(sample, corners[place]) for sample, place in zip(samples, order, strict=True)]
    mixed: dict[str, Any] = dict(samples[0])
    for key, whole in mixed.items():
        if isinstance(whole, tv_tensors.Image | tv_tensors.Mask):
            canvas = torch.empty_like(whole.as_subclass(Tensor))
            for piece, place in zip(pieces, order, strict=True):
                top, left, rows, columns = corners[place]
                canvas[..., top : top + rows, left : left + columns] = piece[key]
            mixed[key] = tv_tensors.wrap(canvas, like=whole)
    if "boxes" in mixed:
        offsets = [torch.tensor(corners[place][1::-1] * 2) for place in order]
        boxes = [piece["boxes"] + offset for piece, offset in zip(pieces, offsets, strict=True)]
        mixed["boxes"] = _boxes_of(torch.cat(boxes), (height, width))
        mixed["box_labels"] = torch.cat([piece["box_labels"] for piece in pieces])
    return cast(TaskSample, mixed)


def _cut(sample: TaskSample, corner: tuple[int, int, int, int]) -> dict[str, Any]:
    """A random part of a sample of the size of a corner (top, left, height, width); its boxes are plain tensors."""
    rows, columns = TF.get_size(sample["image"])
    top, left = (
        round(uniform(*sorted((0.0, float(whole - part))))) for whole, part in ((rows, corner[2]), (columns, corner[3]))
    )
    piece: dict[str, Any] = {
        key: crop(value, (top, left, corner[2], corner[3])).as_subclass(Tensor)
        for key, value in sample.items()
        if isinstance(value, tv_tensors.Image | tv_tensors.Mask)
    }
    if "boxes" in sample:
        whole = sample["boxes"].as_subclass(Tensor) - torch.tensor([left, top, left, top])
        seen = torch.minimum(whole.clamp(min=0), torch.tensor([corner[3], corner[2]] * 2))
        kept = _areas(seen) >= MIN_BOX_VISIBILITY * _areas(whole)
        piece |= {"boxes": seen[kept], "box_labels": sample["box_labels"][kept]}
    return piece


def paste_objects(sample: TaskSample, donor: TaskSample) -> TaskSample:
    """A sample with some objects of another one at free places, each with a little of its surroundings that fades out.

    Objects are the boxes, or without boxes the connected defects of the mask. The same is done to references: where the
    donor's template lies beside a pasted defect, the two differ by the defect alone.

    Args:
        sample: not transformed; it is not changed.
        donor: not transformed, with the same kinds of targets.

    Reference: Ghiasi et al., Simple copy-paste is a strong data augmentation method for instance segmentation (2021);
    Dwibedi, Misra, Hebert, Cut, paste and learn (2017), on seams.
    """
    objects, taken, size = _objects(donor), _objects(sample), TF.get_size(sample["image"])
    most = min(len(objects), _MOST_PASTED)
    chosen = torch.randperm(len(objects))[: int(torch.randint(1, most + 1, ()))].tolist() if most else []
    mixed: dict[str, Any] = dict(sample)
    pasted: Mapping[str, Any] = donor
    for number in chosen:
        patch = _with_margin(objects[number], TF.get_size(donor["image"]))
        place = _free_place(patch, size, taken)
        if place is None:
            continue
        shift = torch.tensor([place[1] - patch[1], place[0] - patch[0]] * 2)
        taken = torch.cat([taken, (objects[number] + shift)[None]])
        fade = _fade(patch, objects[number])
        for key, value in mixed.items():
            if isinstance(value, tv_tensors.Image | tv_tensors.Mask):
                mixed[key] = _paste(value, pasted[key], patch, place, fade)
        if "boxes" in mixed:
            moved = donor["boxes"].as_subclass(Tensor)[number, None] + shift
            mixed["boxes"] = _boxes_of(torch.cat([mixed["boxes"].as_subclass(Tensor), moved]), size)
            mixed["box_labels"] = torch.cat([mixed["box_labels"], donor["box_labels"][number, None]])
    return cast(TaskSample, mixed)


def _objects(sample: TaskSample) -> Tensor:
    """Boxes around objects, from the mask where there are no boxes; in whole pixels, ``[n, 4]``."""
    if "boxes" in sample:
        boxes = sample["boxes"].as_subclass(Tensor)
        return torch.cat([boxes[:, :2].floor(), boxes[:, 2:].ceil()], dim=1).long()
    if "mask" in sample:
        return torch.from_numpy(boxes_of_mask(sample["mask"].as_subclass(Tensor).numpy())[0]).long()
    return torch.zeros(0, 4, dtype=torch.int64)


def _with_margin(box: Tensor, size: Sequence[int]) -> tuple[int, int, int, int]:
    """Top, left, height and width of a box with some of its surroundings, inside the image."""
    left, top, right, bottom = box.tolist()
    columns, rows = (max(_MIN_MARGIN, round(_MARGIN * side)) for side in (right - left, bottom - top))
    top, left, bottom, right = max(0, top - rows), max(0, left - columns), bottom + rows, right + columns
    return top, left, min(bottom, size[0]) - top, min(right, size[1]) - left


def _free_place(patch: tuple[int, int, int, int], size: Sequence[int], taken: Tensor) -> tuple[int, int] | None:
    """Top and left of a random place for a patch that covers no object; None where a few tries find none."""
    _, _, rows, columns = patch
    if rows > size[0] or columns > size[1]:
        return None
    for _ in range(_TRIES):
        top, left = (int(torch.randint(whole - part + 1, ())) for whole, part in ((size[0], rows), (size[1], columns)))
        beside = (taken[:, 0] >= left + columns) | (taken[:, 2] <= left)
        above = (taken[:, 1] >= top + rows) | (taken[:, 3] <= top)
        if bool((beside | above).all()):
            return top, left
    return None


def _fade(patch: tuple[int, int, int, int], box: Tensor) -> Tensor:
    """Weight of a patch's pixels ``[h, w]``: 1 on the object, falling to 0 at the edge of the patch."""
    left, top, right, bottom = box.tolist()
    ramps = []
    for start, length, low, high in ((patch[0], patch[2], top, bottom), (patch[1], patch[3], left, right)):
        places = start + torch.arange(length) + 0.5
        before, after = (low - places) / max(low - start, 1), (places - high) / max(start + length - high, 1)
        ramps.append(1 - torch.maximum(before, after).clamp(min=0))
    return torch.outer(*ramps)


def _paste(
    value: Tensor, donor: Tensor, patch: tuple[int, int, int, int], place: tuple[int, int], fade: Tensor
) -> Tensor:
    """A copy of an image or a mask with a patch of another one in it; classes do not fade."""
    top, left, rows, columns = patch
    source = donor.as_subclass(Tensor)[..., top : top + rows, left : left + columns]
    result = value.as_subclass(Tensor).clone()
    target = result[..., place[0] : place[0] + rows, place[1] : place[1] + columns]
    if isinstance(value, tv_tensors.Mask):
        target.copy_(torch.where(fade >= 0.5, source, target))
    else:
        target.copy_((target + fade * (source.float() - target)).round())
    pasted: Tensor = tv_tensors.wrap(result, like=value)
    return pasted


def _boxes_of(boxes: Tensor, size: Sequence[int]) -> tv_tensors.BoundingBoxes:
    return tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=tuple(size))


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=1)
