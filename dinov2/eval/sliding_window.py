"""Dense predictions for images of any size: sliding windows, test-time flips and scales, maps resized by bands."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

DenseModel = Callable[[Tensor], Tensor]

_NUMBERS_AT_ONCE = 2**22  # 16 MiB of float32: larger blocks cost more to get from the system than they save


@dataclass(frozen=True, kw_only=True)
class DenseInference:
    """How a dense model is run on images of any size.

    Every pixel gets the mean of what all windows say that see it, flipped or not, and then the mean over the scales.
    With a scale of 2, a window sees half as many rows and columns of the image, twice as large. The last window of a
    row or column lies flush with the border; an image smaller than the window is seen whole.

    Attributes:
        window: height and width that the model sees, in pixels; None for the whole image at once.
        stride: how far apart windows are, in pixels; None for two thirds of the window. At most the window.
        flips: also averages the predictions of windows flipped left to right.
        scales: sizes at which the image is looked at, as factors above 0.
        batch_size: windows that the model sees at once; flipped ones are another batch.
        device: where the model runs; None for where the images are.
        result_device: where predictions are averaged and kept; None for where the images are.

    Raises:
        ValueError: a setting is out of range, or has no effect.
    """

    window: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    flips: bool = False
    scales: Sequence[float] = (1.0,)
    batch_size: int = 8
    device: torch.device | str | None = None
    result_device: torch.device | str | None = None

    def __post_init__(self) -> None:
        if self.window is not None and min(self.window) < 1:
            raise ValueError(f"window must be at least 1 pixel high and wide, found {self.window}")
        if self.stride is not None:
            if self.window is None:
                raise ValueError(f"stride {self.stride} has no effect without a window")
            if min(self.stride) < 1 or self.stride[0] > self.window[0] or self.stride[1] > self.window[1]:
                raise ValueError(f"stride must be from 1 to the window's {self.window}, found {self.stride}")
        if not self.scales or not all(scale > 0 for scale in self.scales):
            raise ValueError(f"scales must be one or more factors above 0, found {list(self.scales)}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, found {self.batch_size}")

    def bands(self, model: DenseModel, images: Tensor) -> Iterator[Tensor]:
        """Predicts from top to bottom, and hands out rows as soon as no window will see them any more.

        A window covers ``w`` rows of the image, its height over the scale. Beside images and model, this takes at most
        ``16 · B · C · w · W`` bytes, added up over the scales, however high the image is: 330 MB for 2 classes, windows
        512 high, one scale and an image 20,000 wide.

        Args:
            model: maps float images ``[n, 3, h, w]`` to what may be averaged, such as probabilities
                ``[n, C, h, w]``; in evaluation mode.
            images: ``[B, 3, H, W]`` on any device; integers reach the model as float32 of the same values.

        Yields:
            ``[B, C, rows, W]``, float32 on ``result_device``: consecutive bands of rows, ``H`` together.

        Raises:
            ValueError: the images are not ``[B, 3, H, W]`` with a pixel, or the model's output is of another size.
        """
        if images.ndim != 4 or 0 in images.shape:
            raise ValueError(f"images must be [B, 3, H, W] and not empty, found {list(images.shape)}")
        height = images.shape[2]
        passes = [_ScalePass(self, model, images, scale) for scale in self.scales]
        done = 0
        while done < height:
            min(passes, key=lambda one: one.complete).advance()
            ready = min(one.complete for one in passes)
            if ready > done:
                yield torch.stack([one.take(ready) for one in passes]).mean(dim=0)
                done = ready

    def predict(self, model: DenseModel, images: Tensor) -> Tensor:
        """All predictions, ``[B, C, H, W]`` float32 on ``result_device``; see `bands`."""
        result: Tensor | None = None
        top = 0
        for band in self.bands(model, images):
            if result is None:
                result = band.new_empty((*band.shape[:2], *images.shape[2:]))
            result[:, :, top : top + band.shape[2]] = band
            top += band.shape[2]
        assert result is not None
        return result


class _ScalePass:
    """The predictions at one scale, in rows of windows from top to bottom; sizes are those of the unscaled image."""

    def __init__(self, settings: DenseInference, model: DenseModel, images: Tensor, scale: float) -> None:
        self.settings = settings
        self.model = model
        self.images = images
        self.device = images.device if settings.device is None else torch.device(settings.device)
        self.result_device = images.device if settings.result_device is None else torch.device(settings.result_device)
        rows, columns = (
            _Axis(
                size,
                window=None if settings.window is None else settings.window[axis],
                stride=None if settings.stride is None else settings.stride[axis],
                scale=scale,
            )
            for axis, size in enumerate(images.shape[2:])
        )
        self.rows, self.columns = rows, columns
        self.rows_of_windows = 0  # finished
        self.first = 0  # number of the first row of the image that is in the sums
        self.sums: Tensor | None = None  # [B, C, rows, W]

    @property
    def complete(self) -> int:
        """Number of the first row that a window may still see."""
        starts = self.rows.starts
        return starts[self.rows_of_windows] if self.rows_of_windows < len(starts) else self.rows.size

    def advance(self) -> None:
        """Runs the next row of windows."""
        top = self.rows.starts[self.rows_of_windows]
        places = [(image, left) for image in range(len(self.images)) for left in self.columns.starts]
        for start in range(0, len(places), self.settings.batch_size):
            batch = places[start : start + self.settings.batch_size]
            for (image, left), output in zip(batch, self._run(batch, top), strict=True):
                # The sums are lengthened by rows of 0 to end below this row of windows.
                held = 0 if self.sums is None else self.sums.shape[2]
                missing = top + self.rows.extent - self.first - held
                if missing > 0:
                    shape = (len(self.images), output.shape[0], missing, self.columns.size)
                    zeros = torch.zeros(shape, device=self.result_device)
                    self.sums = zeros if self.sums is None else torch.cat([self.sums, zeros], dim=2)
                assert self.sums is not None
                self.sums[image, :, top - self.first :, left : left + self.columns.extent] += output
        self.rows_of_windows += 1

    def take(self, end: int) -> Tensor:
        """Hands out the mean predictions of the rows before ``end``, which must be complete, and forgets them."""
        assert self.sums is not None
        count = end - self.first
        seen = self.rows.times_seen(self.result_device)[self.first : end, None] * self.columns.times_seen(
            self.result_device
        )
        band = self.sums[:, :, :count] / seen
        self.sums = self.sums[:, :, count:].clone()  # a view would keep the rows that are gone
        self.first = end
        return band

    @torch.no_grad()
    def _run(self, places: Sequence[tuple[int, int]], top: int) -> Tensor:
        """Predictions ``[n, C, window rows, window columns]`` for windows given by image and left column."""
        height, width = self.rows.extent, self.columns.extent
        crops = torch.stack([self.images[image, :, top : top + height, left : left + width] for image, left in places])
        crops = crops.to(self.device)
        if not crops.is_floating_point():
            crops = crops.float()
        seen_size = (self.rows.seen, self.columns.seen)
        if seen_size != (height, width):
            crops = F.interpolate(crops, seen_size, mode="bilinear", antialias=True)
        outputs = self._outputs(crops)
        if self.settings.flips:
            outputs = (outputs + self._outputs(crops.flip(-1)).flip(-1)) / 2
        if seen_size != (height, width):
            outputs = F.interpolate(outputs, (height, width), mode="bilinear", antialias=True)
        return outputs.to(self.result_device)

    def _outputs(self, crops: Tensor) -> Tensor:
        outputs = self.model(crops)
        if outputs.ndim != 4 or outputs.shape[0] != crops.shape[0] or outputs.shape[2:] != crops.shape[2:]:
            raise ValueError(
                f"for images {list(crops.shape)} the model must give [{len(crops)}, C, {crops.shape[2]}, "
                f"{crops.shape[3]}], found {list(outputs.shape)}"
            )
        return outputs.float()


class _Axis:
    """Where windows lie along one axis of the image."""

    def __init__(self, size: int, *, window: int | None, stride: int | None, scale: float) -> None:
        self.size = size
        whole = max(1, round(size * scale))
        if window is None or whole <= window:
            self.extent = size  # pixels of the image that a window covers
            self.seen = whole  # pixels that the model sees of them
            self.starts = [0]
            return
        self.extent = min(size, max(1, round(window / scale)))
        self.seen = window
        step = max(1, round((2 * window / 3 if stride is None else stride) / scale))
        last = size - self.extent
        self.starts = [*range(0, last, min(step, self.extent)), last]

    def times_seen(self, device: torch.device) -> Tensor:
        """How many windows cover each pixel, ``[size]``, at least 1."""
        counts = torch.zeros(self.size, device=device)
        for start in self.starts:
            counts[start : start + self.extent] += 1
        return counts


@dataclass(frozen=True, eq=False)
class Tile:
    """What a model says about a window of an image.

    Attributes:
        outputs: by name, for a batch of one.
        top: first row of the image that the window covers.
        left: first column.
        size: rows and columns of the image that it covers.
    """

    outputs: dict[str, Tensor]
    top: int
    left: int
    size: tuple[int, int]


def full_size_tiles(outputs: dict[str, Tensor], place: int, size: tuple[int, int]) -> Iterator[Tile]:
    """Bands of the maps ``[B, C, h, w]`` of one image of a batch, resized to the image's size."""
    channels = [value.shape[1] for value in outputs.values()]
    top = 0
    for band in full_size_bands(torch.cat([value[place] for value in outputs.values()]), size):
        parts = dict(zip(outputs, band[None].split(channels, dim=1), strict=True))
        yield Tile(parts, top, 0, (band.shape[1], size[1]))
        top += band.shape[1]


def full_size_bands(
    maps: Tensor, size: tuple[int, int], *, numbers_at_once: int = _NUMBERS_AT_ONCE
) -> Iterator[Tensor]:
    """Resizes maps bilinearly (corners not aligned), as ``F.interpolate`` does; what gets smaller is averaged.

    Args:
        maps: float ``[C, h, w]``.
        size: height and width wanted.
        numbers_at_once: how many numbers a band may hold; it has one row at least.

    Yields:
        ``[C, rows, W]`` from top to bottom, ``H`` rows together.
    """
    height, width = size
    smaller = min(maps.shape[1], height), min(maps.shape[2], width)
    if smaller != maps.shape[1:]:
        maps = F.interpolate(maps[None], smaller, mode="bilinear", antialias=True)[0]
    places = (torch.arange(height, dtype=torch.float64) + 0.5) * (smaller[0] / height) - 0.5
    places = places.clamp(min=0)
    upper = places.floor().long()
    lower = (upper + 1).clamp(max=smaller[0] - 1)
    share = (places - upper).to(maps)[:, None]
    upper, lower = upper.to(maps.device), lower.to(maps.device)
    num_rows = max(numbers_at_once // (maps.shape[0] * width), 1)
    for top in range(0, height, num_rows):
        rows = slice(top, top + num_rows)
        band = torch.lerp(maps[:, upper[rows]], maps[:, lower[rows]], share[rows])
        yield F.interpolate(band[None], (band.shape[1], width), mode="bilinear")[0]
