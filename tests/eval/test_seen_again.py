"""Re-identification: images turned, cropped and relit, and whether they find themselves."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from eval_stand_ins import MemoryDataset, tiny_transformer
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize
from torchvision.transforms import functional as TF

from dinov2.data.photometric import standardize_light
from dinov2.data.transforms import mode_of, to_pillow
from dinov2.eval.results import EvaluationResults
from dinov2.eval.retrieval import RetrievalSettings, eval_retrieval
from dinov2.eval.retrieval.seen_again import ImagesSeenAgain, View, draw_view, see_again
from dinov2.eval.yardsticks import extract_pixels


class Noise(MemoryDataset):
    """Images of noise of their own, 24 x 16 pixels."""

    def __init__(self, num_images: int, groups: list[str] | None = None) -> None:
        super().__init__([(0, 0, 0)] * num_images, [None] * num_images, groups)
        self.transform = lambda image: TF.to_tensor(image.resize((28, 28)))

    def get_image(self, index: int) -> Image.Image:
        return standardize_light(noise(index)) if self.light == "standardized" else noise(index)


class Peek(nn.Module):
    """Mean colours of the nine parts of an image."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images, 3).flatten(1)


def noise(index: int) -> Image.Image:
    coarse = np.random.default_rng(index).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((24, 16), Image.Resampling.BICUBIC)


def evaluate(dataset: MemoryDataset, model: nn.Module | None = None, **options: Any) -> EvaluationResults:
    settings = RetrievalSettings(ks=(1, 2), num_workers=0, num_resamples=50, **options.pop("settings", {}))
    return eval_retrieval(model or Peek(), None, dataset, reidentification=True, settings=settings, **options)


def test_views_keep_within_their_bounds_and_fill_them() -> None:
    views = [draw_view(0, index) for index in range(500)]
    nearest = [min((90, 180, 270), key=lambda quarter: abs(view.angle - quarter)) for view in views]
    tilts = [view.angle - quarter for view, quarter in zip(views, nearest, strict=True)]
    assert set(nearest) == {90, 180, 270}
    for values, low, high in (
        (tilts, -10, 10),
        ([view.area for view in views], 0.6, 0.8),
        ([view.light for view in views], 0.7, 1.3),
        ([view.place[0] for view in views], 0, 1),
        ([view.place[1] for view in views], 0, 1),
    ):
        assert low <= min(values) < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < max(values) <= high
    assert views == [draw_view(0, index) for index in range(500)]
    assert views[0] != draw_view(1, 0)


@pytest.mark.parametrize("size", [(40, 40), (60, 20), (30, 50)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_is_seen_is_what_the_view_says(size: tuple[int, int], seed: int) -> None:
    """Red and green of the image name the place of every pixel: where they come to lie tells turn, crop and border."""
    width, height = size
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([columns * 4, rows * 4, np.full_like(rows, 100)], axis=2).astype(np.uint8)
    view = draw_view(seed, 7)
    seen = np.asarray(see_again(Image.fromarray(pixels), view)).astype(float) / view.light
    assert seen.shape[0] * seen.shape[1] == pytest.approx(view.area * width * height, rel=0.06)
    assert seen[..., 2] == pytest.approx(100, abs=1), "no pixel is black because it was not in the image"
    x, y = seen[..., 0] / 4, seen[..., 1] / 4
    assert -1 < x.min() <= x.max() < width
    assert -1 < y.min() <= y.max() < height
    middle = (
        slice(seen.shape[0] // 2 - 3, seen.shape[0] // 2 + 3),
        slice(seen.shape[1] // 2 - 3, seen.shape[1] // 2 + 3),
    )
    # A step to the right in the crop is a step along (cos, sin) in the image, y pointing down.
    step = np.diff(x[middle], axis=1).mean(), np.diff(y[middle], axis=1).mean()
    expected = math.cos(math.radians(view.angle)), math.sin(math.radians(view.angle))
    assert step == pytest.approx(expected, abs=0.12)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_images_of_any_channels_are_seen_again(channels: int) -> None:
    seen = see_again(to_pillow(np.full((9, 12, channels), 100, np.uint8)), View(90, 0.7, 1.2, (0.5, 0.5)))
    assert (seen.mode, set(np.asarray(seen).flat)) == (mode_of(channels), {120})


def test_whole_quarters_are_those_of_pillow_and_white_stays_white() -> None:
    image = noise(0)
    for quarter, turn in ((90, "ROTATE_90"), (180, "ROTATE_180"), (270, "ROTATE_270")):
        seen = see_again(image, View(quarter, 1.0, 1.0, (0.5, 0.5)))
        expected = np.asarray(image.transpose(Image.Transpose[turn])).astype(float)
        np.testing.assert_allclose(np.asarray(seen), expected, atol=1)
    bright = np.asarray(see_again(image, View(180, 1.0, 1.3, (0.5, 0.5)))).astype(int)
    expected = np.asarray(image.transpose(Image.Transpose.ROTATE_180)).astype(float) * 1.3
    np.testing.assert_allclose(bright, expected.clip(max=255), atol=2)
    assert see_again(Image.new("RGB", (1, 1), (9, 9, 9)), draw_view(0, 0)).size == (1, 1)


def test_light_is_standardised_after_it_has_changed() -> None:
    dataset = Noise(3)
    dataset.light = "standardized"
    seen = ImagesSeenAgain(dataset, seed=5).get_image(1)
    expected = standardize_light(see_again(noise(1), draw_view(5, 1)))
    np.testing.assert_array_equal(np.asarray(seen), np.asarray(expected))
    assert dataset.light == "standardized"


def test_every_image_seeks_itself_among_all_others_but_those_of_its_part() -> None:
    groups = [str(index // 2) for index in range(9)]
    dataset, seed = Noise(9, groups), 3
    results = evaluate(dataset, settings={"seed": seed})
    seen = ImagesSeenAgain(dataset, seed)
    bank = normalize(torch.stack([Peek()(dataset[index][0][None])[0] for index in range(9)]), dim=1)
    precisions, hits = [], []
    for query in range(9):
        asked = normalize(Peek()(seen[query][0][None]), dim=1)[0]
        ours = float(asked @ bank[query])
        others = [float(asked @ bank[other]) for other in range(9) if groups[other] != groups[query]]
        rank = 1 + sum(other > ours for other in others)
        precisions.append(1.0 if rank == 1 else 0.5 / rank)  # by trapezia
        hits.append(rank == 1)
    scores = results.scores["reidentification"].image
    assert 0 < sum(hits) < 9, "a case that says something"
    assert scores.count == 9
    assert scores.metrics["map"].value == pytest.approx(np.mean(precisions))
    assert scores.metrics["recall@1"].value == scores.metrics["hit@1"].value == pytest.approx(np.mean(hits))
    assert results.settings["reidentification"]["areas"] == [0.6, 0.8]


def test_yardsticks_see_the_same_queries() -> None:
    dataset, model = Noise(12), tiny_transformer()
    results = evaluate(dataset, model, random_backbone=model)
    assert list(results.yardsticks) == ["chance", "image statistics", "32x32 grey pixels", "random backbone"]
    assert results.yardsticks["random backbone"] == results.scores["reidentification"]
    assert results.yardsticks["chance"].image.metrics["recall@1"].value == pytest.approx(1 / 12)
    asked, bank = (normalize(extract_pixels(found, num_workers=0).embeddings, dim=1)
                   for found in (ImagesSeenAgain(dataset, 0), dataset))  # fmt: skip
    hits = (asked @ bank.T).argmax(dim=1) == torch.arange(12)
    pixels = results.yardsticks["32x32 grey pixels"].image.metrics["recall@1"]
    assert pixels.value == pytest.approx(hits.double().mean().item())
    assert None not in (pixels.low, pixels.high)
    assert {(one.yardstick, one.metric) for one in results.comparisons} == {
        (name, metric) for name in results.yardsticks for metric in ("map", "recall@1")
    }
    again = evaluate(dataset, model, random_backbone=model)
    assert again.as_dict() == results.as_dict()
    other = evaluate(dataset, model, settings={"seed": 1}, image_statistics=False)
    assert other.scores != results.scores
    assert list(other.yardsticks) == ["chance"]


def test_images_of_a_single_part_cannot_be_told_apart() -> None:
    with pytest.raises(ValueError, match="the gallery holds no two parts"):
        evaluate(Noise(3, ["a", "a", "a"]))
