"""Sliding windows against a mean over pixels taken one by one; bands, flips and scales."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.eval.sliding_window import DenseInference


class DenseNetwork(nn.Module):
    """Pixel logits that depend on neighbours and on the place within the window; remembers what it has seen."""

    def __init__(self, num_classes: int = 3, *, pointwise: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, num_classes, 1 if pointwise else 3, padding=0 if pointwise else 1)
        self.pointwise = pointwise
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.shapes.append(tuple(images.shape))
        logits = self.convolution(images)
        if not self.pointwise:
            logits = logits + torch.linspace(0, 1, images.shape[2])[:, None] * torch.linspace(-2, 1, images.shape[3])
        return logits


def predict_dense(
    model: Callable[[Tensor], Tensor], images: Tensor, *, activation: str = "softmax", **settings: Any
) -> Tensor:
    """What a model predicts for images: mean probabilities of classes, or mean outputs."""
    run = model if activation == "none" else lambda crops: model(crops).float().softmax(dim=1)
    return DenseInference(**settings).predict(run, images)


def photos(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1))


def slow_starts(size: int, window: int, stride: int) -> list[int]:
    starts = [0]
    while starts[-1] + window < size:
        starts.append(min(starts[-1] + stride, size - window))
    return starts


def slow_prediction(
    look: Callable[[Tensor], Tensor], images: Tensor, window: tuple[int, int], stride: tuple[int, int]
) -> Tensor:
    """The mean over all windows that see a pixel, pixel by pixel; ``look`` maps a window to its probabilities."""
    height, width = images.shape[2:]
    extent = min(window[0], height), min(window[1], width)
    seen = {
        (top, left): look(images[:, :, top : top + extent[0], left : left + extent[1]])
        for top in slow_starts(height, extent[0], stride[0])
        for left in slow_starts(width, extent[1], stride[1])
    }
    rows = []
    for y in range(height):
        for x in range(width):
            values = [
                output[:, :, y - top, x - left]
                for (top, left), output in seen.items()
                if 0 <= y - top < extent[0] and 0 <= x - left < extent[1]
            ]
            rows.append(torch.stack(values).mean(dim=0))
    return torch.stack(rows, dim=-1).unflatten(-1, (height, width))


@pytest.mark.parametrize("window", [None, (20, 30), (11, 17)])
@pytest.mark.parametrize("activation", ["softmax", "none"])
def test_an_image_that_fits_is_seen_once_and_whole(window: tuple[int, int] | None, activation: str) -> None:
    model, images = DenseNetwork(), photos(2, 3, 11, 17)
    predicted = predict_dense(model, images, window=window, activation=activation)
    assert model.shapes == [(2, 3, 11, 17)]
    expected = model(images)
    assert torch.equal(predicted, expected.softmax(dim=1) if activation == "softmax" else expected)
    assert not predicted.requires_grad


@pytest.mark.parametrize(
    ("window", "stride"),
    [((8, 10), (5, 4)), ((8, 10), (8, 10)), ((6, 40), (2, 3)), ((40, 7), (1, 7)), ((23, 29), (1, 1)), ((1, 1), (1, 1))],
)
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_windows_equal_a_mean_pixel_by_pixel(window: tuple[int, int], stride: tuple[int, int], batch_size: int) -> None:
    model, images = DenseNetwork(), photos(2, 3, 23, 29)
    predicted = predict_dense(model, images, window=window, stride=stride, batch_size=batch_size)
    assert {shape[2:] for shape in model.shapes} == {(min(window[0], 23), min(window[1], 29))}
    assert max(shape[0] for shape in model.shapes) <= batch_size
    expected = slow_prediction(lambda crop: model(crop).softmax(dim=1), images, window, stride)
    torch.testing.assert_close(predicted, expected)
    torch.testing.assert_close(predicted.sum(dim=1), torch.ones(2, 23, 29))


def test_windows_lie_two_thirds_apart_unless_told() -> None:
    model, images = DenseNetwork(), photos(1, 3, 40, 30)
    predicted = predict_dense(model, images, window=(12, 15))
    assert torch.equal(predicted, predict_dense(model, images, window=(12, 15), stride=(8, 10)))


@pytest.mark.parametrize("window", [None, (8, 10)])
def test_flips_are_averaged(window: tuple[int, int] | None) -> None:
    model, images = DenseNetwork(), photos(2, 3, 20, 21)

    def look(crop: Tensor) -> Tensor:
        return (model(crop).softmax(dim=1) + model(crop.flip(3)).softmax(dim=1).flip(3)) / 2

    predicted = predict_dense(model, images, window=window, stride=window and (5, 6), flips=True)
    expected = slow_prediction(look, images, window or (20, 21), (5, 6))
    torch.testing.assert_close(predicted, expected)
    assert not torch.allclose(predicted, predict_dense(model, images, window=window, stride=window and (5, 6)))


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps, size, mode="bilinear", antialias=True)


def test_scales_of_whole_images_are_averaged() -> None:
    model, images = DenseNetwork(), photos(2, 3, 20, 30)
    predicted = predict_dense(model, images, scales=(0.5, 1.0, 1.5))
    assert model.shapes == [(2, 3, 10, 15), (2, 3, 20, 30), (2, 3, 30, 45)]
    sizes = ((10, 15), (20, 30), (30, 45))
    expected = sum(resized(model(resized(images, size)).softmax(dim=1), (20, 30)) for size in sizes) / 3
    torch.testing.assert_close(predicted, expected)


def test_scales_of_windows_look_closer_or_from_further_away() -> None:
    """At scale 2 a window of 8 x 10 covers 4 x 5 pixels of the image, at scale 0.5 it covers 16 x 20."""
    model, images = DenseNetwork(), photos(2, 3, 23, 29)
    predicted = predict_dense(model, images, window=(8, 10), stride=(4, 6), scales=(2.0, 0.5, 1.0))
    assert {shape[2:] for shape in model.shapes} == {(8, 10)}

    def look(crop: Tensor) -> Tensor:
        size = (crop.shape[2], crop.shape[3])
        return resized(model(resized(crop, (8, 10))).softmax(dim=1), size)

    expected = torch.stack(
        [
            slow_prediction(look, images, (4, 5), (2, 3)),
            slow_prediction(look, images, (16, 20), (8, 12)),
            slow_prediction(lambda crop: model(crop).softmax(dim=1), images, (8, 10), (4, 6)),
        ]
    ).mean(dim=0)
    torch.testing.assert_close(predicted, expected)
    model.shapes.clear()
    predict_dense(model, photos(1, 3, 20, 30), window=(12, 12), scales=(0.4,))
    assert model.shapes == [(1, 3, 8, 12)], "a scaled image that fits is seen whole"


@pytest.mark.parametrize("scales", [(1.0,), (0.5, 1.0, 2.0)])
def test_bands_come_early_and_make_up_the_whole(scales: tuple[float, ...]) -> None:
    model, images = DenseNetwork(), photos(2, 3, 100, 20)
    inference = DenseInference(window=(10, 12), stride=(6, 8), scales=scales, batch_size=4)
    whole = inference.predict(model, images)
    num_runs = len(model.shapes)
    model.shapes.clear()
    bands, runs = [], []
    for band in inference.bands(model, images):
        bands.append(band)
        runs.append(len(model.shapes))
    assert torch.equal(torch.cat(bands, dim=2), whole)
    assert len(bands) >= 100 / 12
    assert max(band.shape[2] for band in bands) <= 12  # the stride at scale 0.5
    assert runs[0] <= num_runs / 5
    assert all(before < after for before, after in pairwise(runs))


def test_integers_reach_the_model_and_half_precision_is_averaged_in_float32() -> None:
    images = torch.randint(0, 256, (1, 3, 20, 20), dtype=torch.uint8)
    model = DenseNetwork()
    predicted = predict_dense(model, images, window=(8, 8), scales=(1.0, 0.5), activation="none")
    assert torch.equal(
        predicted, predict_dense(model, images.float(), window=(8, 8), scales=(1.0, 0.5), activation="none")
    )

    predicted = predict_dense(
        lambda crops: DenseNetwork()(crops).bfloat16(), photos(1, 3, 20, 20), window=(8, 8), stride=(3, 3)
    )
    assert predicted.dtype == torch.float32
    torch.testing.assert_close(predicted.sum(dim=1), torch.ones(1, 20, 20))


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_tiny_and_thin_images(size: tuple[int, int]) -> None:
    model, images = DenseNetwork(), photos(1, 3, *size)
    predicted = predict_dense(model, images, window=(14, 14), scales=(0.5, 1.0), flips=True)
    assert predicted.shape == (1, 3, *size)
    torch.testing.assert_close(predicted.sum(dim=1), torch.ones(1, *size))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_windows_run_on_one_device_and_results_lie_on_another() -> None:
    model, images = DenseNetwork(pointwise=True), photos(2, 3, 30, 40)
    expected = predict_dense(model, images)
    predicted = predict_dense(model.cuda(), images, window=(16, 16), flips=True, device="cuda")
    assert predicted.device == images.device
    torch.testing.assert_close(predicted, expected, rtol=1e-4, atol=1e-4)
    predicted = predict_dense(model, images, window=(16, 16), device="cuda", result_device="cuda")
    assert predicted.device.type == "cuda"
    torch.testing.assert_close(predicted.cpu(), expected, rtol=1e-4, atol=1e-4)


def test_bad_input() -> None:
    model = DenseNetwork()
    for settings, message in (
        ({"window": (0, 4)}, "window must be at least 1 pixel"),
        ({"stride": (2, 2)}, r"stride \(2, 2\) has no effect without a window"),
        ({"window": (4, 4), "stride": (0, 2)}, "stride must be from 1 to the window's"),
        ({"window": (4, 4), "stride": (2, 5)}, "stride must be from 1 to the window's"),
        ({"scales": ()}, "scales must be one or more"),
        ({"scales": (1.0, 0.0)}, "scales must be one or more"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            predict_dense(model, photos(1, 3, 8, 8), **settings)
    for images in (photos(3, 8, 8), torch.zeros(0, 3, 8, 8), torch.zeros(1, 3, 0, 8)):
        with pytest.raises(ValueError, match=r"images must be \[B, 3, H, W\] and not empty"):
            predict_dense(model, images)
    with pytest.raises(ValueError, match=r"must give \[1, C, 8, 8\], found \[1, 3, 4, 4\]"):
        predict_dense(lambda images: images[:, :, ::2, ::2], photos(1, 3, 8, 8))
