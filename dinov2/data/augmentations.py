"""The multi-crop augmentation of pretraining: two global and several local crops of every image."""

import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from dinov2.data import photometric
from dinov2.data.transforms import channel_statistics, cut_tilted, mode_of

# What ran when the released weights were trained: the switch of that code was inverted.
RELEASED_BLUR_PROBABILITIES = (0.0, 0.9, 0.5)

_BLUR_SIGMA = (0.1, 2.0)
_LOG_ASPECT = (math.log(3 / 4), math.log(4 / 3))  # of a crop's box, over the shape of the crop itself
_LONGEST = 4.0  # how much longer than the crop's shape an image may be before crops are cut from a piece of it
_SOLARIZE_THRESHOLD = 128
_TRIES_PER_BOX = 10
_RATE_DRAWS = 50  # per size and kind of crop, to estimate how often no box fits
_JITTER_OPERATIONS = (
    photometric.adjust_brightness,
    photometric.adjust_contrast,
    photometric.adjust_saturation,
    photometric.adjust_hue,
)


class Crops(TypedDict):
    """What the augmentation returns: float32 tensors ``[C, H, W]``, normalised, see `channel_statistics`."""

    global_crops: list[Tensor]
    global_crops_teacher: list[Tensor]
    local_crops: list[Tensor]
    offsets: tuple[()]


class CropKind:
    """How crops of one kind are drawn: output (height, width), share of the area, and what may happen to them."""

    def __init__(
        self, size: int | Sequence[int], scale: Sequence[float], blur_probability: float, solarize_probability: float
    ) -> None:
        height, width = (size, size) if isinstance(size, int) else size
        if min(height, width) < photometric.BLUR_KERNEL_SIZE:
            raise ValueError(f"crops need at least {photometric.BLUR_KERNEL_SIZE} pixels a side, got {size}")
        low, high = scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop scales must satisfy 0 < smallest <= largest <= 1, got {tuple(scale)}")
        self.size = (height, width)
        self.scale = (low, high)
        self.blur_probability = blur_probability
        self.solarize_probability = solarize_probability


@dataclass(frozen=True, kw_only=True)
class CropRecipe:
    """Everything random about one crop, drawn before any pixel is touched.

    Attributes:
        box: Left, top, right, bottom in pixels of the source image.
        horizontal_flip: Whether left and right are exchanged.
        vertical_flip: Whether top and bottom are exchanged.
        transpose: Whether rows and columns are exchanged, after the flips.
        tilt: Degrees by which what the box shows is turned anticlockwise about its middle.
        jitter: (operation, amount) pairs in the order they are applied; empty when the jitter does not happen.
            Operations 0..3 are brightness, contrast, saturation, hue.
        grayscale: Whether the colours are dropped.
        blur_sigma: Standard deviation of the blur in pixels; None for no blur.
        solarize: Whether bright values are inverted.
    """

    box: tuple[int, int, int, int]
    horizontal_flip: bool
    vertical_flip: bool
    jitter: tuple[tuple[int, float], ...]
    grayscale: bool
    blur_sigma: float | None
    solarize: bool
    transpose: bool = False
    tilt: float = 0.0


class DataAugmentationDINO:
    """Turns a PIL image into two global and ``local_crops_number`` local crops.

    Each crop is a random resized crop (bicubic, see `draw_box`) with flips, then colour jitter, grey, Gaussian blur
    (kernel 9, sigma 0.1..2 pixels), solarisation (second global crop only) and normalisation. An image whose channels
    are all equal is processed as one channel with the same result: hue, saturation and grey are identities on it.

    Of an image that is long, such as a line scan, all crops come from one piece at a random place (see `piece_size`):
    between them the pieces show the whole image, and the crops of a sample show the same part of it.

    One number is drawn from torch's global generator per image; all other draws follow from it.

    Args:
        global_crops_scale: Smallest and largest share of the image's area that a global crop covers.
        local_crops_scale: The same for local crops.
        local_crops_number: How many local crops; may be 0.
        global_crops_size: Side of a global crop in pixels, or (height, width).
        local_crops_size: Side of a local crop in pixels, or (height, width).
        horizontal_flip_probability: Probability of a left-right flip of each crop.
        vertical_flip_probability: Probability of a top-bottom flip of each crop.
        transpose_probability: Probability that rows and columns of a crop are exchanged; with both flips, all eight
            orientations of a square. The box of such a crop has its shape turned, and the crop has its size.
        max_tilt: Degrees, up to 180, by which a crop is turned either way at most; past the border of the image the
            crop shows its mirror image.
        color_jitter_probability: Probability that a crop's colours are jittered.
        color_jitter: Strengths of brightness, contrast, saturation (factors 1 - s .. 1 + s) and hue (turns, up to 0.5).
        grayscale_probability: Probability that a crop loses its colours.
        solarize_probability: Probability that the second global crop is solarised at level 128.
        blur_probabilities: Probability of blur for the first global, the second global and the local crops. The default
            is what the paper states; ``RELEASED_BLUR_PROBABILITIES`` is what the released weights saw.
        num_channels: Of images and crops. Those of other than three have no colours to change.

    Reference: Oquab et al., DINOv2 (2023), appendix B; Caron et al., DINO (2021), section 3.1.
    """

    def __init__(
        self,
        global_crops_scale: Sequence[float],
        local_crops_scale: Sequence[float],
        local_crops_number: int,
        global_crops_size: int | Sequence[int] = 224,
        local_crops_size: int | Sequence[int] = 96,
        *,
        horizontal_flip_probability: float = 0.5,
        vertical_flip_probability: float = 0.0,
        transpose_probability: float = 0.0,
        max_tilt: float = 0.0,
        color_jitter_probability: float = 0.8,
        color_jitter: Sequence[float] = (0.4, 0.4, 0.2, 0.1),
        grayscale_probability: float = 0.2,
        solarize_probability: float = 0.2,
        blur_probabilities: Sequence[float] = (1.0, 0.1, 0.5),
        num_channels: int = 3,
    ) -> None:
        if local_crops_number < 0:
            raise ValueError(f"local_crops_number must be at least 0, got {local_crops_number}")
        if len(blur_probabilities) != 3:
            raise ValueError(f"blur_probabilities needs three values (global 1, 2, local), got {blur_probabilities}")
        if len(color_jitter) != 4 or min(color_jitter) < 0 or color_jitter[3] > 0.5:
            raise ValueError(
                "color_jitter needs four strengths (brightness, contrast, saturation, hue), none negative and hue at "
                f"most 0.5, got {tuple(color_jitter)}"
            )
        if not 0 <= max_tilt <= 180:
            raise ValueError(f"max_tilt must lie in 0..180 degrees, got {max_tilt}")
        self.num_channels = num_channels
        self.max_tilt = max_tilt
        self.horizontal_flip_probability = _probability("horizontal_flip_probability", horizontal_flip_probability)
        self.vertical_flip_probability = _probability("vertical_flip_probability", vertical_flip_probability)
        self.transpose_probability = _probability("transpose_probability", transpose_probability)
        self.color_jitter_probability = _probability("color_jitter_probability", color_jitter_probability)
        self.grayscale_probability = _probability("grayscale_probability", grayscale_probability)
        *factors, hue = color_jitter
        self.jitter_ranges = (*((max(0.0, 1 - strength), 1 + strength) for strength in factors), (-hue, hue))
        solarize = _probability("solarize_probability", solarize_probability)
        blur_1, blur_2, blur_local = (_probability("blur_probabilities", value) for value in blur_probabilities)
        self.global_kinds = (
            CropKind(global_crops_size, global_crops_scale, blur_1, 0.0),
            CropKind(global_crops_size, global_crops_scale, blur_2, solarize),
        )
        self.local_kind = CropKind(local_crops_size, local_crops_scale, blur_local, 0.0)
        self.local_crops_number = local_crops_number

    def __call__(self, image: Image.Image, partner: Image.Image | None = None) -> Crops:
        """Draws all crops of an image (RGB or 8-bit grey, or of ``num_channels``, see `to_pillow`).

        Args:
            image: Where the crops are cut from.
            partner: Another image of the same part, if the second global crop and every second local crop should come
                from it. It need not have the size of ``image``.

        Raises:
            ValueError: An image has other channels.
        """
        rng = random.Random(int(torch.randint(0, 2**63 - 1, ()).item()))
        images = [image] if partner is None else [image, partner]
        pieces = [piece_size(one.size, self.global_kinds[0].size) for one in images]
        if any(piece != one.size for piece, one in zip(pieces, images, strict=True)):
            place = rng.random()  # the same in both: images of a part show it alike
            images = [_cut_piece(one, piece, place) for piece, one in zip(pieces, images, strict=True)]
        first, *others = map(self._one_channel_if_gray, images)
        second = others[0] if others else first
        kinds = (*self.global_kinds, *[self.local_kind] * self.local_crops_number)
        crops = []
        for number, kind in enumerate(kinds):
            source = second if number % 2 else first
            recipe = self.draw_recipe(kind, source.size, rng)
            crops.append(apply_recipe(source, recipe, kind.size, self.num_channels))
        return {
            "global_crops": crops[:2],
            "global_crops_teacher": crops[:2],
            "local_crops": crops[2:],
            "offsets": (),
        }

    def _one_channel_if_gray(self, image: Image.Image) -> Image.Image:
        if image.mode not in (mode_of(self.num_channels), *(["L"] if self.num_channels == 3 else [])):
            raise ValueError(
                f"the augmentation takes images of {self.num_channels} channels (student.in_channels, made by channels "
                f"in data.preprocessing), or 8-bit grey ones for RGB, got mode {image.mode!r}"
            )
        return image.getchannel(0) if image.mode == "RGB" and is_gray(image) else image

    def draw_recipe(self, kind: CropKind, image_size: tuple[int, int], rng: random.Random) -> CropRecipe:
        """Draws one crop of an image of ``image_size`` (width, height, as PIL has it).

        Everything is drawn whether it will be used or not, so that no draw depends on the outcome of another. Only
        the exchange of rows and columns and the tilt, which came later, are not drawn where they never happen.
        """
        transpose = self.transpose_probability > 0 and rng.random() < self.transpose_probability
        tilt = rng.uniform(-self.max_tilt, self.max_tilt) if self.max_tilt else 0.0
        box = draw_box(image_size, kind.scale, rng, kind.size[::-1] if transpose else kind.size)
        order = rng.sample(range(len(_JITTER_OPERATIONS)), len(_JITTER_OPERATIONS))
        jitter = tuple((operation, rng.uniform(*self.jitter_ranges[operation])) for operation in order)
        sigma = rng.uniform(*_BLUR_SIGMA)
        return CropRecipe(
            box=box,
            horizontal_flip=rng.random() < self.horizontal_flip_probability,
            vertical_flip=rng.random() < self.vertical_flip_probability,
            jitter=jitter if rng.random() < self.color_jitter_probability else (),
            grayscale=rng.random() < self.grayscale_probability,
            blur_sigma=sigma if rng.random() < kind.blur_probability else None,
            solarize=rng.random() < kind.solarize_probability,
            transpose=transpose,
            tilt=tilt,
        )


def draw_box(
    image_size: tuple[int, int], scale: tuple[float, float], rng: random.Random, crop_size: tuple[int, int] = (1, 1)
) -> tuple[int, int, int, int]:
    """Draws the box of a random resized crop: (left, top, right, bottom).

    The area's share is uniform in ``scale``; the log of the aspect ratio, over that of the crop itself, is uniform
    between 3/4 and 4/3. Where ten tries do not fit, the last one is made as much longer as the image demands, and lies
    at a random place: it has its share of the area and spans the image's shorter side.

    Args:
        image_size: Width and height in pixels.
        scale: Smallest and largest share of the area.
        rng: Source of randomness.
        crop_size: Height and width that the box is resized to; only their ratio counts.
    """
    sides, target, aspect = _draw_sides(image_size, scale, rng, crop_size)
    image_width, image_height = image_size
    if sides is None:
        # Whatever the share, one of these bounds is met by a whole side of the image.
        aspect = min(max(aspect, target / image_height**2), image_width**2 / target)
        sides = (
            min(image_width, max(1, round(math.sqrt(target * aspect)))),
            min(image_height, max(1, round(math.sqrt(target / aspect)))),
        )
    width, height = sides
    top = rng.randint(0, image_height - height)
    left = rng.randint(0, image_width - width)
    return left, top, left + width, top + height


def _draw_sides(
    image_size: tuple[int, int], scale: tuple[float, float], rng: random.Random, crop_size: tuple[int, int]
) -> tuple[tuple[int, int] | None, float, float]:
    """Width and height of the first of ten boxes that fits, None where none does; area and aspect ratio of the last."""
    image_width, image_height = image_size
    area = image_width * image_height
    shape = math.log(crop_size[1] / crop_size[0])
    target, aspect = float(area), 1.0
    for _ in range(_TRIES_PER_BOX):
        target = area * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(_LOG_ASPECT[0] + shape, _LOG_ASPECT[1] + shape))
        width = round(math.sqrt(target * aspect))
        height = round(math.sqrt(target / aspect))
        if 0 < width <= image_width and 0 < height <= image_height:
            return (width, height), target, aspect
    return None, target, aspect


def piece_size(image_size: tuple[int, int], crop_size: tuple[int, int]) -> tuple[int, int]:
    """Width and height of the part of an image that the crops of one sample come from: all of it, but for long ones.

    A box with a fixed share of a long image would squeeze it beyond recognition, and two that are not squeezed would
    hardly ever show the same place. So a piece is at most four times as long as the crop's shape. Where the image has
    few pixels across, it has at least as many along as the crop, which shrinks nothing.

    Args:
        image_size: Width and height in pixels.
        crop_size: Height and width of the global crops.
    """
    (width, height), (crop_height, crop_width) = image_size, crop_size
    shape = crop_width / crop_height
    longest_width = max(math.ceil(_LONGEST * height * shape), crop_width)
    longest_height = max(math.ceil(_LONGEST * width / shape), crop_height)
    return min(width, longest_width), min(height, longest_height)


def _cut_piece(image: Image.Image, size: tuple[int, int], place: float) -> Image.Image:
    """The piece of an image at ``place``, 0..1 along it."""
    left, top = (round(place * (whole - part)) for whole, part in zip(image.size, size, strict=True))
    return image.crop((left, top, left + size[0], top + size[1]))


@dataclass(frozen=True, kw_only=True)
class CropFit:
    """How a set's images suit the crops, as shares of 0..1.

    Attributes:
        pieces: Images that are so long that crops come from pieces of them.
        global_fallback: Global crops for which no box of the published shapes fits.
        local_fallback: The same of local crops.
    """

    pieces: float
    global_fallback: float
    local_fallback: float


def crop_fit(augmentation: DataAugmentationDINO, image_sizes: Sequence[tuple[int, int]]) -> CropFit:
    """Estimates how often the crops of images of these sizes (width, height; at least one) need a fallback."""
    kinds = (augmentation.global_kinds[0], augmentation.local_kind)
    pieces = [piece_size(size, kinds[0].size) for size in image_sizes]
    rates = []
    for kind in kinds:
        rng = random.Random(0)
        misses = sum(
            _draw_sides(size, kind.scale, rng, kind.size)[0] is None for size in pieces for _ in range(_RATE_DRAWS)
        )
        rates.append(misses / (len(pieces) * _RATE_DRAWS))
    cut = sum(piece != size for piece, size in zip(pieces, image_sizes, strict=True))
    return CropFit(pieces=cut / len(pieces), global_fallback=rates[0], local_fallback=rates[1])


def apply_recipe(image: Image.Image, recipe: CropRecipe, size: tuple[int, int], num_channels: int = 3) -> Tensor:
    """Computes one crop: float32 ``[C, H, W]``, normalised; ``size`` is (height, width)."""
    width_and_height = size if recipe.transpose else size[::-1]
    left, top, right, bottom = recipe.box
    if recipe.tilt:
        crop = cut_tilted(image, ((left + right) / 2, (top + bottom) / 2), (right - left, bottom - top), recipe.tilt)
    else:
        crop = image.crop(recipe.box)
    crop = crop.resize(width_and_height, Image.Resampling.BICUBIC)
    if recipe.horizontal_flip:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if recipe.vertical_flip:
        crop = crop.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    if recipe.transpose:
        crop = crop.transpose(Image.Transpose.TRANSPOSE)
    pixels = np.array(crop)
    for operation, amount in recipe.jitter:
        pixels = _JITTER_OPERATIONS[operation](pixels, amount)
    if recipe.grayscale:
        pixels = photometric.to_grayscale(pixels)
    if recipe.blur_sigma is not None:
        pixels = photometric.gaussian_blur(pixels, recipe.blur_sigma)
    if recipe.solarize:
        pixels = photometric.solarize(pixels, _SOLARIZE_THRESHOLD)
    return normalize(pixels, num_channels)


def normalize(pixels: npt.NDArray[np.uint8], num_channels: int = 3) -> Tensor:
    """Float32 ``[C, H, W]`` of uint8 ``[H, W, C]`` or grey ``[H, W]``, normalised, see `channel_statistics`."""
    planes = torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1)
    values = planes.to(torch.float32, memory_format=torch.contiguous_format)
    bias, scale = _normalization(num_channels)
    return torch.addcmul(bias, values, scale)


@functools.cache
def _normalization(num_channels: int) -> tuple[Tensor, Tensor]:
    """``(x / 255 - mean) / std`` as an addition and a multiplication of levels: ``[C, 1, 1]`` each."""
    mean, std = channel_statistics(num_channels)
    bias = torch.tensor([-middle / spread for middle, spread in zip(mean, std, strict=True)])
    scale = torch.tensor([1 / (255 * spread) for spread in std])
    return bias.view(-1, 1, 1), scale.view(-1, 1, 1)


def is_gray(image: Image.Image) -> bool:
    """Whether the three channels of an RGB image are equal everywhere."""
    pixels = np.asarray(image)
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    # A few rows tell most colour images apart before the whole is compared.
    rows = slice(None, None, max(1, pixels.shape[0] // 8))
    if not np.array_equal(red[rows], green[rows]):
        return False
    return np.array_equal(red, green) and np.array_equal(green, blue)


def _probability(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in 0..1, got {value}")
    return value
