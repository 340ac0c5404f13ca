"""Regions: hand-made shapes, measures of them, and the way back to the image."""

from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from dinov2.data.preprocessing import Chain, PreprocessingError
from dinov2.data.preprocessing.regions import region_table
from dinov2.data.preprocessing.step import as_levels

ROWS, COLUMNS = np.mgrid[:60, :80]


def disk(row: float, column: float, radius: float) -> Any:
    return (ROWS - row) ** 2 + (COLUMNS - column) ** 2 <= radius**2


SHAPES = disk(20, 20, 9) | disk(40, 60, 5)


def scene(dtype: str = "uint8", channels: int = 0, dark: bool = False) -> Any:
    levels = as_levels(np.where(SHAPES ^ dark, 0.8, 0.2), np.dtype(dtype))
    return np.dstack([levels] * channels) if channels else levels


def run(image: Any, *steps: Any) -> Any:
    return Chain.parse(list(steps))(image)


FINDERS: list[dict[str, Any]] = [
    {"otsu": {}},
    {"adaptive_threshold": {"size": 41}},
    {"hysteresis_threshold": {}},
    {"chan_vese": {"iterations": 60}},
]


@pytest.mark.parametrize("finder", FINDERS, ids=str)
@pytest.mark.parametrize(("dtype", "channels"), [("uint8", 0), ("uint8", 3), ("uint16", 0), ("uint16", 4)])
def test_shapes_are_found(finder: dict[str, Any], dtype: str, channels: int) -> None:
    frame = run(scene(dtype, channels), finder)
    mask = frame.labels > 0
    assert (mask & SHAPES).sum() / (mask | SHAPES).sum() > 0.9
    assert frame.labels.max() == 2
    assert (frame.image == scene(dtype, channels)).all()
    assert (run(scene(dtype, channels), finder).labels == frame.labels).all()
    name, parameters = next(iter(finder.items()))
    dark = run(scene(dtype, channels, dark=True), {name: {**parameters, "foreground": "dark"}})
    assert ((dark.labels > 0) == mask).mean() > 0.99


@pytest.mark.parametrize("finder", FINDERS, ids=str)
def test_an_even_image_has_no_region(finder: dict[str, Any]) -> None:
    frame = run(np.full((20, 20), 60, np.uint8), finder)
    assert not frame.labels.any()
    assert region_table(frame) == []
    assert run(np.full((20, 20), 60, np.uint8), finder, "crop_to_regions").image.shape == (20, 20)


def test_hysteresis_needs_a_strong_pixel() -> None:
    image = np.zeros((5, 20), np.uint8)
    image[2, 2:8] = image[2, 12:18] = 120  # 0.47
    image[2, 4] = 180  # 0.71
    found = run(image, {"hysteresis_threshold": {"low": 0.4, "high": 0.6}}).labels
    assert np.argwhere(found).tolist() == [[2, column] for column in range(2, 8)]


@pytest.mark.parametrize(
    ("operation", "reference"),
    [("erode", ndimage.binary_erosion), ("dilate", ndimage.binary_dilation),
     ("open", ndimage.binary_opening), ("close", ndimage.binary_closing)],
)  # fmt: skip
def test_morphology_of_the_mask(operation: str, reference: Any) -> None:
    image = scene()
    image[20, 20] = 51  # a hole
    image[5, 70] = 204  # a spot
    found = run(image, "otsu", {"morphology": {"operation": operation, "radius": 1}}).labels > 0
    cross = ndimage.generate_binary_structure(2, 1)
    assert (found == reference(image > 100, structure=cross)).all()


def test_small_things_are_cleaned_away() -> None:
    image = scene()
    image[20, 20] = 51
    image[5, 70:72] = 204
    assert ((run(image, "otsu", {"clean_mask": {"max_area": 2, "max_hole": 1}}).labels > 0) == SHAPES).all()
    kept = run(image, "otsu", {"clean_mask": {"max_area": 1, "max_hole": 0}}).labels > 0
    assert kept[5, 70]
    assert not kept[20, 20]


def test_grey_morphology_keeps_small_things() -> None:
    image = np.full((40, 40), 200, np.uint16)
    image[10, 10:30] = 50
    dark = run(image, {"grey_morphology": {"operation": "black_hat", "radius": 2}}).image
    assert (dark[10, 10:30] == 150).all()
    assert (dark > 0).sum() == 20
    assert not run(image, {"grey_morphology": {"operation": "top_hat", "radius": 2}}).image.any()


def test_touching_disks_are_divided() -> None:
    touching = disk(30, 25, 11) | disk(30, 45, 11)
    image = as_levels(touching * 0.8, np.dtype(np.uint8))
    assert run(image, "otsu").labels.max() == 1
    divided = run(image, "otsu", {"watershed": {"min_distance": 5}}).labels
    assert divided.max() == 2
    assert ((divided > 0) == touching).all()
    assert divided[30, 25] != divided[30, 45]
    assert abs(int((divided == 1).sum()) - int((divided == 2).sum())) < 0.1 * touching.sum()


def test_a_contour_moves_onto_edges() -> None:
    target = disk(30, 40, 15)
    image = as_levels(np.where(target, 0.8, 0.2), np.dtype(np.uint8))
    steps = ["otsu", {"morphology": {"operation": "dilate", "radius": 4}}, {"geodesic_contour": {"iterations": 20}}]
    start, end = (run(image, *steps[:count]).labels > 0 for count in (2, 3))
    assert (start & target).sum() / (start | target).sum() < 0.7
    assert (end & target).sum() / (end | target).sum() > 0.85


def test_measures_are_those_of_the_image_also_after_a_crop() -> None:
    whole = run(scene("uint16"), "otsu")
    rows = region_table(whole)
    assert [row["area"] for row in rows] == [disk(20, 20, 9).sum(), disk(40, 60, 5).sum()]
    first = rows[0]
    assert (first["centroid_row"], first["centroid_column"]) == (20, 20)
    assert [first[name] for name in ("top", "left", "bottom", "right")] == [11, 11, 30, 30]
    assert first["eccentricity"] == pytest.approx(0, abs=0.05)
    assert first["intensity_mean"] == pytest.approx(0.8, abs=1e-4)
    for crop in ({"crop_to_regions": {"margin": 3}}, {"crop": {"top": 8, "left": 6, "height": 45, "width": 70}}):
        frame = run(scene("uint16"), "otsu", {"lbp": {"output": "append"}}, crop)
        assert frame.image.shape == frame.labels.shape == frame.channels[0].shape != (60, 80)
        assert region_table(frame) == rows
        assert (frame.to_image_map(frame.labels) == whole.labels).all()
    largest = run(scene(), "otsu", {"crop_to_regions": {"largest": True}})
    assert (largest.origin, largest.image.shape) == ((11, 11), (19, 19))
    twice = run(scene(), {"crop": {"top": 2, "left": 3, "height": 50, "width": 60}}, "otsu", "crop_to_regions")
    assert twice.to_image_points([[0, 0]]).tolist() == [[11, 11]]


@pytest.mark.parametrize("channels", [0, 3])
def test_what_a_mask_is_used_for(channels: int) -> None:
    image = scene("uint16", channels)
    black = run(image, "otsu", "use_mask").image
    assert (black[SHAPES] == image[SHAPES]).all()
    assert not black[~SHAPES].any()
    white = SHAPES * np.uint16(65535)
    assert (run(image, "otsu", {"use_mask": {"output": "replace"}}).image == white).all()
    assert (run(image, "otsu", {"use_mask": {"output": "append"}}).stacked[..., -1] == white).all()


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("morphology", "no step before morphology has looked for regions"),
        ("watershed", "no step before watershed"),
        ("use_mask", "no step before use_mask"),
        ("geodesic_contour", "no step before geodesic_contour"),
        ({"crop": {"height": 61, "width": 5}}, r"rows 0 to 61 .* do not lie in an image of \(60, 80\)"),
    ],
)
def test_what_cannot_be_done(step: Any, message: str) -> None:
    with pytest.raises(PreprocessingError, match=rf"^p\.png: preprocessing step 1 .*{message}"):
        Chain.parse([step])(scene(), "p.png")


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"adaptive_threshold": {"size": 4}}, "size must be odd"),
        ({"hysteresis_threshold": {"low": 0.7}}, "low must not exceed high"),
        ("crop", "crop.height: must be at least 1"),
    ],
)
def test_what_is_refused(step: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Chain.parse([step])
