"""What supervised tasks are fed: one photo, or the photos of one part, with whatever is known about them."""

from typing import TypedDict

from torch import Tensor
from torchvision import tv_tensors


class Depth(tv_tensors.Mask):  # type: ignore[misc]  # torchvision ships no types
    """Depth or height at every pixel: float32 ``[H, W]``, NaN where nothing was measured.

    As a kind of mask it is resampled by nearest neighbour wherever torchvision's v2 transforms handle it, so values are
    never mixed across edges. What those transforms add around the photo must be filled with NaN (their ``fill``);
    `dinov2.data.task_geometry` does so by itself.
    """


class TaskSample(TypedDict, total=False):
    """One photo with its targets; a key is absent where nothing is known.

    Attributes:
        image: uint8 `tv_tensors.Image` ``[3, H, W]``; after a transform float32 ``[3, h, w]``, normalised by the
            ImageNet statistics; in a bag ``[P, 3, h, w]``.
        mask: uint8 `tv_tensors.Mask` ``[H, W]``, classes or ``IGNORED``; after a transform int64 ``[h, w]``.
        depth: `Depth` ``[H, W]``; after a transform float32 ``[h, w]``, NaN where unknown.
        boxes: `tv_tensors.BoundingBoxes` ``[n, 4]``; after a transform in XYXY pixels, float32.
        box_labels: int64 ``[n]``, class of each box.
        label: int64 scalar, -1 where it is missing; float32 ``[C]`` of zeros and ones for several labels at once, all
            -1 where they are missing.
        valid: bool ``[P]``, in a bag only: which of its places hold a photo.
        index: number of the photo, or of the part, in its dataset.
        unreadable: paths of images that came first but could not be read.
    """

    image: Tensor
    mask: Tensor
    depth: Tensor
    boxes: Tensor
    box_labels: Tensor
    label: Tensor
    valid: Tensor
    index: int
    unreadable: tuple[str, ...]
