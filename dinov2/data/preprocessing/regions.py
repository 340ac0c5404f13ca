"""Steps that find regions: thresholds, morphology, watershed and contours, and what is done with the regions.

A region is a set of connected pixels (also over corners), with a number from 1 in ``Frame.labels``. Steps that find
regions replace those that were found before, and leave the image as it is; `UseMask` and `CropToRegions` act on the
image by them.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import cv2
import numpy as np
import numpy.typing as npt
from skimage import feature, filters, measure, morphology, segmentation

from dinov2.config import ConfigError
from dinov2.config.schema import leaf
from dinov2.data.preprocessing.step import Frame, Pixels, Step, luminance, top_of

Mask = npt.NDArray[np.bool_]

_OPERATIONS = {
    "open": cv2.MORPH_OPEN,
    "close": cv2.MORPH_CLOSE,
    "erode": cv2.MORPH_ERODE,
    "dilate": cv2.MORPH_DILATE,
}
_GREY_OPERATIONS = {**_OPERATIONS, "top_hat": cv2.MORPH_TOPHAT, "black_hat": cv2.MORPH_BLACKHAT}
_FOREGROUND = ("bright", "dark")
_FOREGROUND_HELP = "Whether regions are brighter or darker than what surrounds them."
_COLUMNS = ("label", "area", "centroid", "bbox", "eccentricity", "intensity_mean", "intensity_min", "intensity_max")


@dataclass(frozen=True)
class RegionStep(Step):
    """A step that finds regions by the brightness of the image."""

    def run(self, frame: Frame) -> Frame:
        return dataclasses.replace(frame, labels=_label(self.find(luminance(frame.image), frame)))

    def find(self, grey: npt.NDArray[np.float32], frame: Frame) -> Mask:
        """The mask ``[H, W]`` of a brightness from 0 to 1."""
        raise NotImplementedError


@dataclass(frozen=True)
class Otsu(RegionStep):
    """Divides brightness where the two classes differ most (scikit-image's ``threshold_otsu``).

    An image of a single value has no region.

    Reference: Otsu, "A Threshold Selection Method from Gray-Level Histograms", IEEE Trans. SMC 1979.
    """

    name: ClassVar[str] = "otsu"

    foreground: str = leaf("bright", _FOREGROUND_HELP, choices=_FOREGROUND)

    def find(self, grey: npt.NDArray[np.float32], frame: Frame) -> Mask:
        if grey.min() == grey.max():
            return np.zeros(grey.shape, np.bool_)
        is_bright: Mask = grey > filters.threshold_otsu(grey)
        return is_bright if self.foreground == "bright" else ~is_bright


@dataclass(frozen=True)
class AdaptiveThreshold(RegionStep):
    """What differs from its neighbourhood, under uneven light (scikit-image's ``threshold_local``, Gaussian)."""

    name: ClassVar[str] = "adaptive_threshold"

    size: int = leaf(51, "Side of the neighbourhood in pixels, odd.", minimum=3)
    offset: float = leaf(0.05, "Least difference, as a share of the full range.", minimum=0)
    foreground: str = leaf("bright", _FOREGROUND_HELP, choices=_FOREGROUND)

    def check(self) -> None:
        if self.size % 2 == 0:
            raise ConfigError(f"adaptive_threshold.size must be odd, found {self.size}")

    def find(self, grey: npt.NDArray[np.float32], frame: Frame) -> Mask:
        values = _bright(grey, self.foreground)
        found: Mask = values > filters.threshold_local(values, self.size, method="gaussian", offset=-self.offset)
        return found


@dataclass(frozen=True)
class HysteresisThreshold(RegionStep):
    """What is above ``low`` and connected with something above ``high``; dark regions: below, of 1 minus brightness."""

    name: ClassVar[str] = "hysteresis_threshold"

    low: float = leaf(0.4, "Brightness at which regions go on, 0 to 1.", minimum=0, maximum=1)
    high: float = leaf(0.6, "Brightness that a region must reach.", minimum=0, maximum=1)
    foreground: str = leaf("bright", _FOREGROUND_HELP, choices=_FOREGROUND)

    def check(self) -> None:
        if self.low > self.high:
            raise ConfigError(f"hysteresis_threshold.low must not exceed high, found {self.low} and {self.high}")

    def find(self, grey: npt.NDArray[np.float32], frame: Frame) -> Mask:
        found: Mask = filters.apply_hysteresis_threshold(_bright(grey, self.foreground), self.low, self.high)
        return found


@dataclass(frozen=True)
class ChanVese(RegionStep):
    """Divides the image into two parts of even brightness with a short border; no edge is needed (scikit-image).

    The computation begins with a checkerboard. Slow: some seconds per megapixel and hundred iterations.

    Reference: Chan and Vese, "Active Contours Without Edges", IEEE Trans. Image Processing 2001.
    """

    name: ClassVar[str] = "chan_vese"

    mu: float = leaf(0.25, "Price of the border's length: higher for smoother regions.", minimum=0)
    iterations: int = leaf(100, "Most iterations.", minimum=1)
    foreground: str = leaf("bright", _FOREGROUND_HELP, choices=_FOREGROUND)

    def find(self, grey: npt.NDArray[np.float32], frame: Frame) -> Mask:
        if grey.min() == grey.max():
            return np.zeros(grey.shape, np.bool_)
        found: Mask = segmentation.chan_vese(grey.astype(np.float64), mu=self.mu, max_num_iter=self.iterations)
        if found.all() or not found.any():
            return np.zeros(grey.shape, np.bool_)
        is_bright = grey[found].mean() > grey[~found].mean()
        return found if is_bright == (self.foreground == "bright") else ~found


@dataclass(frozen=True)
class GeodesicContour(RegionStep):
    """Moves the border of the regions found before onto edges (scikit-image's morphological geodesic active contour).

    Reference: Márquez-Neila, Baumela and Alvarez, "A Morphological Approach to Curvature-Based Evolution of Curves and
    Surfaces", PAMI 2014.
    """

    name: ClassVar[str] = "geodesic_contour"

    iterations: int = leaf(50, "How often the border moves.", minimum=1)
    smoothing: int = leaf(1, "Smoothing per iteration.", minimum=0)
    balloon: float = leaf(0.0, "Above 0 regions grow where nothing stops them, below 0 they shrink.")
    sigma: float = leaf(2.0, "Width of the blur in pixels before edges are looked for.", above=0)
    alpha: float = leaf(100.0, "How strongly edges stop the border.", above=0)

    def find(self, grey: npt.NDArray[np.float32], frame: Frame) -> Mask:
        start = _mask_of(frame, self.name)
        edges = segmentation.inverse_gaussian_gradient(grey.astype(np.float64), self.alpha, self.sigma)
        found = segmentation.morphological_geodesic_active_contour(
            edges,
            self.iterations,
            init_level_set=start.astype(np.int8),
            smoothing=self.smoothing,
            balloon=self.balloon,
        )
        mask: Mask = np.asarray(found) > 0
        return mask


@dataclass(frozen=True)
class Morphology(RegionStep):
    """Opens, closes, erodes or dilates the mask with a disk (OpenCV)."""

    name: ClassVar[str] = "morphology"

    operation: str = leaf("open", "What is done.", choices=tuple(_OPERATIONS))
    radius: int = leaf(1, "Of the disk in pixels.", minimum=1)

    def find(self, grey: npt.NDArray[np.float32], frame: Frame) -> Mask:
        mask = _mask_of(frame, self.name).astype(np.uint8)
        found: Mask = cv2.morphologyEx(mask, _OPERATIONS[self.operation], morphology.disk(self.radius)) > 0
        return found


@dataclass(frozen=True)
class CleanMask(RegionStep):
    """Takes out regions, and fills holes, that are small (scikit-image)."""

    name: ClassVar[str] = "clean_mask"

    max_area: int = leaf(20, "Regions up to so many pixels are taken out.", minimum=0)
    max_hole: int = leaf(20, "Holes up to so many pixels are filled.", minimum=0)

    def find(self, grey: npt.NDArray[np.float32], frame: Frame) -> Mask:
        mask = morphology.remove_small_holes(_mask_of(frame, self.name), max_size=self.max_hole, connectivity=1)
        cleaned: Mask = morphology.remove_small_objects(mask, max_size=self.max_area, connectivity=2)
        return cleaned


@dataclass(frozen=True)
class Watershed(Step):
    """Divides regions that touch at their necks: scikit-image's ``watershed`` on the distance to their borders."""

    name: ClassVar[str] = "watershed"

    min_distance: int = leaf(10, "Least distance in pixels between the middles of two regions.", minimum=1)

    def run(self, frame: Frame) -> Frame:
        mask = _mask_of(frame, self.name)
        distance = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        peaks = feature.peak_local_max(
            distance, min_distance=self.min_distance, labels=_label(mask), exclude_border=False
        )
        markers = np.zeros(mask.shape, np.int32)
        markers[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
        labels = segmentation.watershed(-distance, markers, mask=mask, connectivity=2)
        return dataclasses.replace(frame, labels=labels.astype(np.int32))


@dataclass(frozen=True)
class GreyMorphology(Step):
    """Morphology of the image with a disk (OpenCV): ``top_hat`` keeps small bright things, ``black_hat`` dark."""

    name: ClassVar[str] = "grey_morphology"

    operation: str = leaf("black_hat", "What is done.", choices=tuple(_GREY_OPERATIONS))
    radius: int = leaf(5, "Of the disk in pixels; things that are narrower are small.", minimum=1)

    def apply(self, image: Pixels) -> Pixels:
        operation, disk = _GREY_OPERATIONS[self.operation], morphology.disk(self.radius)
        return cv2.morphologyEx(np.ascontiguousarray(image), operation, disk).reshape(image.shape)


@dataclass(frozen=True)
class UseMask(Step):
    """Blackens what lies in no region, or makes the mask (white on black) the image or a channel beside it."""

    name: ClassVar[str] = "use_mask"
    changes_channels: ClassVar[bool] = True

    output: str = leaf("blacken", "What is done.", choices=("blacken", "replace", "append"))

    def run(self, frame: Frame) -> Frame:
        mask = _mask_of(frame, self.name)
        if self.output == "blacken":
            outside = ~mask if frame.image.ndim == 2 else ~mask[..., None]
            return dataclasses.replace(frame, image=np.where(outside, 0, frame.image).astype(frame.image.dtype))
        white = (mask * top_of(frame.image)).astype(frame.image.dtype)
        if self.output == "append":
            return dataclasses.replace(frame, channels=(*frame.channels, white))
        return dataclasses.replace(frame, image=white)


@dataclass(frozen=True)
class CropToRegions(Step):
    """Crops to the rectangle around all regions, or around the largest; without any the image stays whole."""

    name: ClassVar[str] = "crop_to_regions"
    crops: ClassVar[bool] = True

    margin: int = leaf(0, "Pixels kept around it.", minimum=0)
    largest: bool = leaf(False, "Only the region with most pixels.")

    def run(self, frame: Frame) -> Frame:
        mask = _mask_of(frame, self.name)
        if not mask.any():
            return frame
        assert frame.labels is not None
        if self.largest:
            mask = frame.labels == np.bincount(frame.labels[mask]).argmax()
        left, top, width, height = cv2.boundingRect(mask.astype(np.uint8))
        bottom, right = top + height + self.margin, left + width + self.margin
        return _cropped(frame, max(0, top - self.margin), max(0, left - self.margin), bottom, right)


@dataclass(frozen=True)
class Crop(Step):
    """Crops to a rectangle that is the same for all images, which must hold it."""

    name: ClassVar[str] = "crop"
    crops: ClassVar[bool] = True

    top: int = leaf(0, "First row.", minimum=0)
    left: int = leaf(0, "First column.", minimum=0)
    height: int = leaf(0, "Rows; must be given.", minimum=1)
    width: int = leaf(0, "Columns; must be given.", minimum=1)

    def run(self, frame: Frame) -> Frame:
        bottom, right = self.top + self.height, self.left + self.width
        if bottom > frame.image.shape[0] or right > frame.image.shape[1]:
            raise ValueError(
                f"rows {self.top} to {bottom} and columns {self.left} to {right} do not lie in an image of "
                f"{frame.image.shape[:2]} pixels"
            )
        return _cropped(frame, self.top, self.left, bottom, right)


REGION_STEPS = (
    Otsu,
    AdaptiveThreshold,
    HysteresisThreshold,
    ChanVese,
    GeodesicContour,
    Morphology,
    CleanMask,
    Watershed,
    GreyMorphology,
    UseMask,
    CropToRegions,
    Crop,
)


def region_table(frame: Frame) -> list[dict[str, Any]]:
    """Measures of each region of a frame; empty where none was found or looked for.

    Returns:
        A row per region: ``label``, ``area`` in pixels, ``top left bottom right`` (the last two behind the region) and
        ``centroid_row centroid_column`` in the image that the chain was given, ``eccentricity`` (0 a circle, towards 1
        a line) and ``intensity_mean intensity_min intensity_max`` of the brightness from 0 to 1 after the chain.
    """
    if frame.labels is None or not frame.labels.any():
        return []
    measured = measure.regionprops_table(frame.labels, luminance(frame.image), properties=_COLUMNS)
    top, left = frame.origin
    columns = {
        "label": measured["label"],
        "area": measured["area"].astype(np.int64),
        "top": measured["bbox-0"] + top,
        "left": measured["bbox-1"] + left,
        "bottom": measured["bbox-2"] + top,
        "right": measured["bbox-3"] + left,
        "centroid_row": measured["centroid-0"] + top,
        "centroid_column": measured["centroid-1"] + left,
        **{name: measured[name] for name in _COLUMNS[4:]},
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*_python_lists(columns.values()), strict=True)]


def _python_lists(columns: Iterable[npt.NDArray[Any]]) -> list[list[Any]]:
    return [column.tolist() for column in columns]


def _label(mask: Mask) -> npt.NDArray[np.int32]:
    labels: npt.NDArray[np.int32] = measure.label(mask, connectivity=2).astype(np.int32)
    return labels


def _mask_of(frame: Frame, name: str) -> Mask:
    if frame.labels is None:
        raise ValueError(f"no step before {name} has looked for regions; put one such as otsu before it")
    mask: Mask = frame.labels > 0
    return mask


def _bright(grey: npt.NDArray[np.float32], foreground: str) -> npt.NDArray[np.float32]:
    return grey if foreground == "bright" else 1 - grey


def _cropped(frame: Frame, top: int, left: int, bottom: int, right: int) -> Frame:
    area = (slice(top, bottom), slice(left, right))
    return dataclasses.replace(
        frame,
        image=frame.image[area],
        channels=tuple(channel[area] for channel in frame.channels),
        labels=None if frame.labels is None else frame.labels[area],
        valid=None if frame.valid is None else frame.valid[area],
        origin=(frame.origin[0] + top, frame.origin[1] + left),
    )
