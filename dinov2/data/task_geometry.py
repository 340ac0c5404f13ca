"""One change of place and size, applied alike to a photo, its mask, its depth and its boxes."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from dinov2.data.datasets.dense_targets import IGNORED
from dinov2.data.task_samples import Depth, TaskSample
from dinov2.data.transforms import IMAGENET_MEAN

_MEAN_COLOUR = tuple(round(255 * mean) for mean in IMAGENET_MEAN)
_SMALLEST_BOX_SIDE = 1.0  # pixels


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """A part of the photo, resized, turned about its middle, cut, turned by right angles and mirrored, in this order.

    All pairs are (height, width) in pixels; a pixel ``i`` covers ``[i, i + 1)``.

    Attributes:
        box: Top, left, height and width of the part. It may reach beyond the photo: images are filled with the mean
            colour of ImageNet there, masks with ``IGNORED``, depth with NaN.
        canvas: Size that the part is resized to; bicubic with antialiasing for images, the nearest pixel for targets.
        angle: Degrees that the canvas is turned by, counter-clockwise; bilinear for images.
        window: Size that is cut from the middle of the turned canvas. The canvas is larger by an even number of pixels,
            and large enough that no corner of the window leaves it.
        quarter_turns: Counter-clockwise right angles, 0..3; the result is ``output`` pixels large.
        horizontal_flip: Whether left and right are exchanged, at the end.
        vertical_flip: Whether top and bottom are exchanged, at the end.
    """

    box: tuple[int, int, int, int]
    canvas: tuple[int, int]
    window: tuple[int, int]
    angle: float = 0.0
    quarter_turns: int = 0
    horizontal_flip: bool = False
    vertical_flip: bool = False

    @property
    def output(self) -> tuple[int, int]:
        """Size of the result."""
        return self.window if self.quarter_turns % 2 == 0 else (self.window[1], self.window[0])

    def leaves(self, image_size: tuple[int, int]) -> bool:
        """Whether the box reaches beyond a photo of this size."""
        top, left, height, width = self.box
        return top < 0 or left < 0 or top + height > image_size[0] or left + width > image_size[1]

    def map_points(self, points: Tensor) -> Tensor:
        """Places ``[..., 2]`` (x, y) of the result that places of the photo come to lie at."""
        top, left, height, width = self.box
        x = (points[..., 0] - left) * (self.canvas[1] / width) - self.canvas[1] / 2
        y = (points[..., 1] - top) * (self.canvas[0] / height) - self.canvas[0] / 2
        cos, sin = math.cos(math.radians(self.angle)), math.sin(math.radians(self.angle))
        x, y = cos * x + sin * y, cos * y - sin * x  # rows count downwards
        for _ in range(self.quarter_turns):
            x, y = y, -x
        x = -x if self.horizontal_flip else x
        y = -y if self.vertical_flip else y
        return torch.stack([x + self.output[1] / 2, y + self.output[0] / 2], dim=-1)

    def shows(self, row: int, column: int) -> bool:
        """Whether the middle of this pixel of the photo lies in the result."""
        x, y = self.map_points(torch.tensor([column + 0.5, row + 0.5], dtype=torch.float64)).tolist()
        return bool(0 <= x < self.output[1] and 0 <= y < self.output[0])


def canvas_of(window: tuple[int, int], angle: float) -> tuple[int, int]:
    """The canvas from whose turned middle a window can be cut: the window itself where nothing is turned."""
    if angle == 0:
        return window
    cos, sin = abs(math.cos(math.radians(angle))), abs(math.sin(math.radians(angle)))
    height, width = window
    # One pixel more on each side: bilinear interpolation looks that far.
    rows = max(0, math.ceil((height * cos + width * sin - height) / 2)) + 1
    columns = max(0, math.ceil((width * cos + height * sin - width) / 2)) + 1
    return height + 2 * rows, width + 2 * columns


def apply_geometry(sample: TaskSample, geometry: Geometry, *, min_box_visibility: float = 0.0) -> TaskSample:
    """The sample seen through a geometry; the one given is left as it is.

    Args:
        sample: as datasets give it.
        geometry: what happens to it.
        min_box_visibility: share, 0..1, of a box's area that must lie in the result. Boxes of which less is left, or
            that are thinner than a pixel then, go with their labels; with 0 all stay. All are clipped. A turned box
            becomes the upright box around it.
    """
    result = sample.copy()
    result["image"] = tv_tensors.Image(
        _move(sample["image"].as_subclass(Tensor), geometry, torch.tensor(_MEAN_COLOUR), smooth=True)
    )
    if "mask" in sample:
        result["mask"] = tv_tensors.Mask(_move_plane(sample["mask"], geometry, IGNORED))
    if "depth" in sample:
        result["depth"] = Depth(_move_plane(sample["depth"], geometry, math.nan))
    if "boxes" in sample:
        result["boxes"], kept = _move_boxes(sample["boxes"], geometry, min_box_visibility)
        if "box_labels" in sample:
            result["box_labels"] = sample["box_labels"][kept]
    return result


def inside_photo(image_size: tuple[int, int], geometry: Geometry) -> Tensor:
    """Bool ``[h, w]``: which pixels of the result come from the photo, and not from beyond its edges."""
    photo = torch.ones(1, 1, 1, dtype=torch.uint8).expand(1, *image_size)
    return _move(photo, geometry, torch.zeros(1), smooth=False)[0].bool()


def _move_plane(plane: Tensor, geometry: Geometry, fill: float) -> Tensor:
    return _move(plane.as_subclass(Tensor)[None], geometry, torch.tensor([fill]), smooth=False)[0]


def _move(planes: Tensor, geometry: Geometry, fill: Tensor, *, smooth: bool) -> Tensor:
    """``[C, H, W]`` to ``[C, h, w]``; ``fill [C]`` stands beyond the edges."""
    planes = _cut(planes, geometry.box, fill)
    if planes.shape[-2:] != geometry.canvas:
        # Nearest-exact takes the pixel in the middle, as bicubic has it; plain nearest would shift targets by half one.
        mode = InterpolationMode.BICUBIC if smooth else InterpolationMode.NEAREST_EXACT
        planes = TF.resize_image(planes, list(geometry.canvas), interpolation=mode, antialias=smooth)
    if geometry.angle != 0:
        mode = InterpolationMode.BILINEAR if smooth else InterpolationMode.NEAREST
        planes = TF.rotate_image(planes, geometry.angle, interpolation=mode)
    height, width = geometry.window
    top, left = (planes.shape[-2] - height) // 2, (planes.shape[-1] - width) // 2
    planes = planes[..., top : top + height, left : left + width]
    planes = torch.rot90(planes, geometry.quarter_turns, dims=(-2, -1)) if geometry.quarter_turns else planes
    flipped = [axis for axis, flip in ((-1, geometry.horizontal_flip), (-2, geometry.vertical_flip)) if flip]
    return planes.flip(flipped).contiguous()


def _cut(planes: Tensor, box: tuple[int, int, int, int], fill: Tensor) -> Tensor:
    top, left, height, width = box
    inside = planes[..., max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)]
    if inside.shape[-2:] == (height, width):
        return inside
    cut = fill.to(planes.dtype)[:, None, None].repeat(1, height, width)
    first_row, first_column = max(-top, 0), max(-left, 0)
    cut[:, first_row : first_row + inside.shape[-2], first_column : first_column + inside.shape[-1]] = inside
    return cut


def _move_boxes(boxes: Tensor, geometry: Geometry, min_visibility: float) -> tuple[Tensor, Tensor]:
    """Boxes of the result, and which of the boxes given they are."""
    corners = TF.convert_bounding_box_format(boxes, new_format=tv_tensors.BoundingBoxFormat.XYXY)
    corners = corners.as_subclass(Tensor).float()
    moved = geometry.map_points(corners[:, [[0, 1], [2, 1], [2, 3], [0, 3]]])
    whole = torch.cat([moved.amin(dim=1), moved.amax(dim=1)], dim=1)
    height, width = geometry.output
    clipped = whole.clamp(min=0).minimum(torch.tensor([width, height, width, height]))
    kept = torch.ones(len(clipped), dtype=torch.bool)
    if min_visibility > 0:
        sides, whole_sides = clipped[:, 2:] - clipped[:, :2], whole[:, 2:] - whole[:, :2]
        kept = sides.prod(dim=1) >= min_visibility * whole_sides.prod(dim=1)
        kept &= (sides >= _SMALLEST_BOX_SIDE).all(dim=1)
    format_ = tv_tensors.BoundingBoxFormat.XYXY
    return tv_tensors.BoundingBoxes(clipped[kept], format=format_, canvas_size=geometry.output), kept
