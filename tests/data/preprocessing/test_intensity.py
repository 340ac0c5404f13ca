"""Steps that change brightness: hand-made cases, and what holds for 8 and 16 bits, grey and colour."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from skimage import exposure, restoration

from dinov2.data.preprocessing import Chain, PreprocessingError
from dinov2.data.preprocessing.step import as_levels, as_unit

STEPS: list[dict[str, Any]] = [
    {"window": {}},
    {"window": {"by": "value", "low": 20, "high": 200}},
    {"clahe": {}},
    {"flatten_background": {"sigma": 5}},
    {"flatten_background": {"sigma": 5, "mode": "divide"}},
    {"gamma": {"gamma": 0.5}},
    {"median": {"size": 3}},
    {"median": {"size": 7}},
    {"bilateral": {}},
    {"non_local_means": {"distance": 3}},
]


def image_of(dtype: str, channels: int = 0) -> Any:
    random = np.random.default_rng(0)
    shape = (33, 41, channels) if channels else (33, 41)
    values = np.linspace(0.2, 0.7, 41)[:, None] if channels else np.linspace(0.2, 0.7, 41)
    return as_levels(values + random.normal(0, 0.05, shape), np.dtype(dtype))


def run(step: dict[str, Any], image: Any) -> Any:
    return Chain.parse([step])(image).image


@pytest.mark.parametrize("step", STEPS, ids=str)
@pytest.mark.parametrize("channels", [0, 1, 3, 4])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_shape_and_dtype_stay_and_nothing_is_left_to_chance(step: dict[str, Any], dtype: str, channels: int) -> None:
    image = image_of(dtype, channels)
    before = image.copy()
    result = run(step, image)
    assert (result.shape, result.dtype) == (image.shape, image.dtype)
    assert (image == before).all(), "the image that is given stays"
    assert (run(step, image) == result).all()
    assert (run(step, np.asfortranarray(image)) == result).all()
    assert (run(step, np.full_like(image, 7)).std(axis=(0, 1)) == 0).all(), "a constant image stays constant"


@pytest.mark.parametrize("step", [step for step in STEPS if "clahe" not in step and "value" not in str(step)], ids=str)
def test_8_and_16_bits_mean_the_same(step: dict[str, Any]) -> None:
    image = image_of("uint8")
    short = run(step, image.astype(np.uint16) * 257)
    assert np.abs(short / 257 - run(step, image)).max() <= 1


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_window_by_hand(dtype: str) -> None:
    top = np.iinfo(dtype).max
    image = np.array([[0, 10, 20, 30, 40]], dtype)
    assert run({"window": {"by": "value", "low": 10, "high": 30}}, image).tolist() == [[0, 0, round(top / 2), top, top]]
    assert run({"window": {"low": 25, "high": 75}}, image).tolist() == [[0, 0, round(top / 2), top, top]]
    narrow = run({"window": {"low": 0, "high": 100, "bits": 8}}, image)
    assert (narrow.dtype, narrow.tolist()) == (np.uint8, [[0, 64, 128, 191, 255]])
    assert not run({"window": {}}, np.full((3, 3), 9, dtype)).any(), "no contrast is black"


def test_clahe_is_that_of_opencv_and_colours_stay() -> None:
    for dtype in ("uint8", "uint16"):
        grey = image_of(dtype)
        expected = cv2.createCLAHE(3.0, (4, 4)).apply(grey)
        assert (run({"clahe": {"clip_limit": 3.0, "tiles": 4}}, grey) == expected).all()
        colours = run({"clahe": {"clip_limit": 3.0, "tiles": 4}}, np.dstack([grey] * 3))
        assert np.abs(colours - expected[..., None].astype(float)).max() <= 1, "grey in colours stays grey"
    assert grey.std() < expected.std(), "contrast grows"


@pytest.mark.parametrize("mode", ["subtract", "divide"])
def test_a_background_is_flattened(mode: str) -> None:
    columns = np.linspace(0.5, 1.0, 200)
    image = as_levels(np.tile(columns * 0.6, (200, 1)), np.dtype(np.uint16))
    image[95:105, 95:105] = image[95:105, 95:105] // 2
    flat = run({"flatten_background": {"sigma": 25, "mode": mode}}, image)
    inner = flat[20:80, 50:150].mean(axis=0)
    assert np.ptp(inner) < 0.15 * np.ptp(image[0, 50:150])
    assert flat[100, 100] < 0.7 * inner.mean(), "a small defect stays"
    assert flat.mean() == pytest.approx(image.mean(), rel=0.05)


def test_gamma_by_hand() -> None:
    assert run({"gamma": {"gamma": 2}}, np.array([[0, 51, 255]], np.uint8)).tolist() == [[0, 10, 255]]
    image = image_of("uint16")
    expected = exposure.adjust_gamma(image / 65535, 0.5) * 65535
    assert np.abs(run({"gamma": {"gamma": 0.5}}, image) - expected).max() < 1


@pytest.mark.parametrize("size", [3, 5, 7])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_median_is_the_same_by_either_library(size: int, dtype: str) -> None:
    image = image_of(dtype)
    assert (run({"median": {"size": size}}, image) == ndimage.median_filter(image, size, mode="nearest")).all()
    spot = np.zeros((9, 9), dtype)
    spot[4, 4] = 200
    assert not run({"median": {"size": size}}, spot).any()


def test_denoising_keeps_an_edge_and_takes_noise() -> None:
    random = np.random.default_rng(0)
    clean = np.repeat([[0.3] * 20 + [0.7] * 20], 40, axis=0)
    noisy = as_levels(clean + random.normal(0, 0.02, clean.shape), np.dtype(np.uint16))
    for step in ({"bilateral": {"sigma_color": 0.1}}, {"non_local_means": {"strength": 0.03}}):
        smooth = as_unit(run(step, noisy))
        assert smooth[:, :18].std() < 0.5 * as_unit(noisy)[:, :18].std()
        assert np.abs(np.diff(smooth.mean(axis=0)))[19] > 0.3
    expected = restoration.denoise_nl_means(as_unit(noisy), patch_size=5, patch_distance=6, h=0.03, fast_mode=True)
    assert np.abs(as_unit(run({"non_local_means": {"strength": 0.03}}, noisy)) - expected).max() < 1e-4


def save(path: Path, image: Any) -> str:
    Image.fromarray(image).save(path)
    return str(path)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("channels", [0, 3])
def test_calibration_undoes_offset_and_gain(tmp_path: Path, dtype: str, channels: int) -> None:
    random = np.random.default_rng(0)
    top = np.iinfo(dtype).max
    dark = random.integers(0, top // 20, (8, 9)).astype(dtype)
    gain = random.uniform(0.5, 1.0, (8, 9))
    flat = np.rint(dark + gain * 0.8 * top).astype(dtype)
    scene = random.uniform(0.1, 0.9, (8, 9))
    image = np.rint(dark + gain * 0.8 * top * scene).astype(dtype)
    image = np.dstack([image] * channels) if channels else image
    step = {"flat_field": {"flat": save(tmp_path / "f.png", flat), "dark": save(tmp_path / "d.png", dark)}}
    mean = (flat - dark.astype(float)).mean()
    expected = scene[..., None] * mean if channels else scene * mean
    assert np.abs(run(step, image) - expected).max() < 3


def test_dead_pixels_take_the_value_of_a_neighbour(tmp_path: Path) -> None:
    flat = np.full((20, 20), 100, np.uint8)
    flat[3, 4] = 0
    image = np.full((20, 20), 60, np.uint8)
    image[3, 4] = 0
    assert (run({"flat_field": {"flat": save(tmp_path / "f.png", flat)}}, image) == 60).all()


def test_calibration_that_does_not_fit(tmp_path: Path) -> None:
    good = save(tmp_path / "good.png", np.full((4, 4), 100, np.uint8))
    dull = save(tmp_path / "dull.png", np.full((4, 4), 0, np.uint8))
    small = save(tmp_path / "small.png", np.full((4, 3), 1, np.uint8))
    cases: list[tuple[dict[str, str], Any, str]] = [
        ({"flat": good}, np.zeros((4, 5), np.uint8), r"flat image .*good\.png has the shape \[4, 4\]"),
        ({"flat": good}, np.zeros((4, 4), np.uint16), r"good\.png is uint8, the image uint16"),
        ({"flat": good, "dark": small}, np.zeros((4, 4), np.uint8), r"small\.png has \(4, 3\)"),
        ({"flat": dull}, np.zeros((4, 4), np.uint8), "no brighter than 0"),
        ({"flat": str(tmp_path / "none.png")}, np.zeros((4, 4), np.uint8), r"none\.png: no such file"),
    ]
    for parameters, image, message in cases:
        with pytest.raises(PreprocessingError, match=rf"^c\.png: .*\(flat_field\): .*{message}"):
            Chain.parse([{"flat_field": parameters}])(image, "c.png")
