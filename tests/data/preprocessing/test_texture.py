"""Texture and edges: hand-made cases, agreement with the libraries, and where the maps go."""

from typing import Any

import numpy as np
import pytest
from skimage import feature, filters

from dinov2.data.preprocessing import Chain
from dinov2.data.preprocessing.step import as_levels, as_unit

STEPS = ("lbp", "canny", "sobel", "scharr", "laplacian_of_gaussian", "gabor")


def run(name: str, image: Any, **parameters: Any) -> Any:
    return Chain.parse([{name: parameters}])(image)


def noise(dtype: str, channels: int = 0) -> Any:
    shape = (24, 30, channels) if channels else (24, 30)
    return as_levels(np.random.default_rng(0).uniform(0, 1, shape), np.dtype(dtype))


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("channels", [0, 1, 3, 4])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_maps_replace_the_image_or_stand_beside_it(name: str, dtype: str, channels: int) -> None:
    image = noise(dtype, channels)
    replaced = run(name, image)
    assert (replaced.image.shape, replaced.image.dtype) == ((24, 30), image.dtype)
    beside = run(name, image, output="append")
    assert (beside.image == image).all()
    assert len(beside.channels) == 1
    assert (beside.stacked[..., -1] == replaced.image).all()
    assert beside.stacked.shape == (24, 30, max(channels, 1) + 1)
    assert (run(name, image).image == replaced.image).all()


def test_later_steps_go_on_with_the_image() -> None:
    image = noise("uint8")
    frame = Chain.parse([{"lbp": {"output": "append"}}, {"sobel": {"output": "append"}}, {"gamma": {"gamma": 2}}])(
        image
    )
    assert (frame.stacked[..., 1] == run("lbp", image).image).all()
    assert (frame.stacked[..., 2] == run("sobel", image).image).all()
    assert (frame.stacked[..., 0] == run("gamma", image, gamma=2).image).all()


@pytest.mark.parametrize("name", STEPS)
def test_an_even_image_has_no_texture(name: str) -> None:
    maps = run(name, np.full((20, 20), 90, np.uint8)).image
    assert (maps == maps[0, 0]).all()
    assert maps[0, 0] == {"lbp": round(255 * 8 / 9), "laplacian_of_gaussian": 128}.get(name, 0)


@pytest.mark.parametrize(("method", "theirs"), [("uniform", "uniform"), ("rotation_invariant", "ror")])
def test_patterns(method: str, theirs: str) -> None:
    image = noise("uint16")
    top = {"uniform": 9, "ror": 255}[theirs]
    expected = feature.local_binary_pattern(image, 8, 1, theirs) / top * 65535
    found = run("lbp", image, method=method).image
    assert np.abs(found - expected)[1:-1, 1:-1].max() <= 0.5
    dimmed = (image // 2).astype(np.uint16) * 2
    assert (run("lbp", dimmed // 2, method=method).image == run("lbp", dimmed, method=method).image).all()
    turned = run("lbp", np.rot90(image).copy(), method=method).image
    assert (np.rot90(found)[1:-1, 1:-1] == turned[1:-1, 1:-1]).mean() > 0.99
    spot = np.zeros((5, 5), np.uint8)
    spot[2, 2] = 9
    assert run("lbp", spot, method=method).image[2, 2] == 0, "no neighbour is as bright"


def test_edges_by_hand() -> None:
    image = np.repeat([[0] * 10 + [255] * 10], 20, axis=0).astype(np.uint8)
    edges = run("canny", image).image
    assert set(np.unique(edges)) == {0, 255}
    columns = np.flatnonzero(edges[5:15].all(axis=0))
    assert set(columns) <= {9, 10}
    assert len(columns) >= 1
    for name, theirs in (("sobel", filters.sobel), ("scharr", filters.scharr)):
        strength = run(name, image).image
        assert np.flatnonzero(strength[10]).tolist() == [9, 10]
        assert np.abs(as_unit(strength) - theirs(image / 255)).max() < 1 / 255
        faint = (image // 10).astype(np.uint8)
        assert run(name, faint, gain=2).image.max() == pytest.approx(2 * run(name, faint).image.max(), abs=1)


def test_blobs_answer_at_their_size() -> None:
    rows, columns = np.mgrid[:41, :41] - 20
    image = np.where(rows**2 + columns**2 <= 4**2, 0, 255).astype(np.uint8)
    answers = {sigma: int(run("laplacian_of_gaussian", image, sigma=sigma).image[20, 20]) for sigma in (1, 2.83, 6)}
    assert max(answers, key=lambda sigma: answers[sigma]) == 2.83
    assert answers[2.83] > 128
    assert run("laplacian_of_gaussian", 255 - image, sigma=2.83).image[20, 20] < 128


def test_waves_answer_to_their_frequency_and_direction() -> None:
    columns = np.arange(80)
    image = as_levels(np.tile(0.5 + 0.3 * np.cos(2 * np.pi * 0.1 * columns), (80, 1)), np.dtype(np.uint16))
    bank = run("gabor", image, frequencies=[0.1, 0.25], orientations=4, combine="channels").image
    assert bank.shape == (80, 80, 8)
    middle = as_unit(bank)[40, 40]
    assert middle.argmax() == 0
    assert middle[0] == pytest.approx(0.3, abs=0.03)
    assert (run("gabor", image, frequencies=[0.1, 0.25]).image == bank.max(axis=2)).all()
    real, imaginary = filters.gabor(image / 65535 - (image / 65535).mean(), 0.1, mode="reflect")
    assert np.abs(as_unit(bank[..., 0]) - np.hypot(real, imaginary) * 2).max() < 1e-3


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("canny", {"low": 0.3}, "canny.low must not exceed canny.high"),
        ("lbp", {"method": "ror"}, "not one of uniform, rotation_invariant"),
        ("lbp", {"output": "extra"}, "not one of replace, append"),
        ("gabor", {"frequencies": [0.6]}, "gabor.frequencies: must be at most 0.5"),
        ("gabor", {"frequencies": []}, "expected a list"),
    ],
)
def test_what_is_refused(name: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Chain.parse([{name: parameters}])
