"""Predictions for images of any size."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image
from predictor_stand_ins import (
    BLUE,
    GREEN,
    GREY,
    RED,
    ColourModel,
    DepthModel,
    LeftModel,
    halves,
    make_package,
    plain_image,
    write_package,
)
from torch import Tensor
from torchvision import tv_tensors

from dinov2.data.decoding import load_image
from dinov2.data.task_transforms import make_eval_transform
from dinov2.data.value_range import ValueRange
from dinov2.eval.sliding_window import DenseInference, full_size_bands
from dinov2.predict.predictor import Predictor
from dinov2.tasks.inference import choose_batch_size
from dinov2.tasks.predictions import ClassPrediction, SegmentationPrediction
from dinov2.utils.errors import RunError
from dinov2.utils.files import write_with_checksum


def areas(predictor: Predictor, *images: np.ndarray) -> list[SegmentationPrediction]:
    predictions = predictor.predict(images)
    assert all(isinstance(prediction, SegmentationPrediction) for prediction in predictions)
    return predictions


@pytest.mark.parametrize("resize", ["stretch", "shorter_side", "original"])
def test_masks_lie_where_the_colours_are(resize: str) -> None:
    images = [halves(48, 64), halves(17, 90, GREEN, GREY), halves(120, 36, BLUE, RED)]
    predictions = areas(Predictor.of(make_package(ColourModel(), resize=resize)), *images)
    for image, prediction, (left, right) in zip(images, predictions, [(0, 1), (2, 0), (3, 1)], strict=True):
        middle, blur = image.shape[1] // 2, image.shape[1] // 8
        assert prediction.labels.shape == image.shape[:2]
        assert (prediction.labels[:, : middle - blur] == left).all()
        assert (prediction.labels[:, middle + blur :] == right).all()
        probability_of_grey = np.where(prediction.labels == 0, prediction.scores, 1 - prediction.scores)
        certain = prediction.scores > 0.9
        np.testing.assert_allclose(prediction.defect[certain], 1 - probability_of_grey[certain], atol=0.1)


@pytest.mark.parametrize("resize", ["stretch", "shorter_side", "original"])
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (16, 16), (3, 2)])
def test_any_size_is_kept(resize: str, size: tuple[int, int]) -> None:
    image = plain_image(*size, RED)
    (prediction,) = areas(Predictor.of(make_package(ColourModel(), resize=resize)), image)
    assert prediction.labels.shape == size
    assert (prediction.labels == 1).all()
    (depth,) = Predictor.of(make_package(DepthModel(), "depth", resize=resize)).predict([image])
    np.testing.assert_allclose(depth.depth, np.full(size, 1 + 230 / 255), atol=0.01)
    assert depth.unit == "mm"


@pytest.mark.parametrize("resize", ["stretch", "shorter_side", "original"])
def test_a_prediction_does_not_depend_on_its_company(resize: str) -> None:
    rng = np.random.default_rng(0)
    sizes = [(20, 30), (16, 16), (20, 30), (9, 16), (16, 16)]
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    package = make_package(ColourModel(), resize=resize)
    together = areas(Predictor.of(package, batch_size=4), *images)
    for image, expected in zip(images, together, strict=True):
        (alone,) = areas(Predictor.of(package, batch_size=1), image)
        np.testing.assert_array_equal(alone.labels, expected.labels)
        np.testing.assert_allclose(alone.scores, expected.scores, atol=1e-5)
        np.testing.assert_allclose(alone.defect, expected.defect, atol=1e-5)


def prepared_by_hand(image: np.ndarray, resize: str) -> Tensor:
    """A batch of one, as evaluation prepares it."""
    sample = {"image": tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1))}
    return make_eval_transform((16, 16), resize)(sample)["image"][None]


@pytest.mark.parametrize("resize", ["stretch", "shorter_side", "original"])
@pytest.mark.parametrize("size", [(50, 34), (12, 14)])
def test_the_network_sees_what_evaluation_prepares(resize: str, size: tuple[int, int]) -> None:
    """The same transform, then the model, then bilinear enlargement: written out by hand."""
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    output = DepthModel()(prepared_by_hand(image, resize))["depth"]
    larger = output.shape[-1] < size[1]
    expected = F.interpolate(output, size, mode="bilinear", antialias=not larger)
    (prediction,) = Predictor.of(make_package(DepthModel(), "depth", resize=resize)).predict([image])
    np.testing.assert_allclose(prediction.depth, expected[0, 0].numpy(), atol=1e-5)


def test_images_may_be_images_or_arrays() -> None:
    image = halves(20, 30)
    predictor = Predictor.of(make_package(ColourModel()))
    first, second = areas(predictor, image, Image.fromarray(image))
    np.testing.assert_array_equal(first.labels, second.labels)


def test_large_images_go_through_windows() -> None:
    rng = np.random.default_rng(2)
    image = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    model = ColourModel()
    predictor = Predictor.of(make_package(model, resize="original"), batch_size=3, flips=True)
    (prediction,) = areas(predictor, image)
    assert {shape[2:] for shape in model.batches} == {(16, 16)}
    assert max(shape[0] for shape in model.batches) == 3
    prepared = prepared_by_hand(image, "original")
    run = ColourModel()
    inference = DenseInference(window=(16, 16), flips=True)
    (probabilities,) = inference.predict(lambda images: run(images)["logits"].softmax(dim=1), prepared)
    np.testing.assert_array_equal(prediction.labels, probabilities.argmax(dim=0).numpy())
    np.testing.assert_allclose(prediction.defect, 1 - probabilities[0].numpy(), atol=1e-5)


def classes(predictor: Predictor, *images: np.ndarray) -> list[np.ndarray]:
    predictions = predictor.predict(images)
    assert all(isinstance(prediction, ClassPrediction) for prediction in predictions)
    return [prediction.probabilities for prediction in predictions]


def test_several_classes_are_decided_one_by_one() -> None:
    model = ColourModel(dense=False)
    predictor = Predictor.of(make_package(model, "classification", "data.multi_label=true"))
    image = plain_image(16, 16, RED)
    (row,) = classes(predictor, image)
    expected = model(predictor.prepare(image).inputs["image"][None])["logits"].sigmoid()[0]
    np.testing.assert_allclose(row, expected.numpy(), rtol=1e-5)
    assert row.sum() != pytest.approx(1, abs=0.01)


def test_classification_by_the_shorter_side_sees_the_middle() -> None:
    image = plain_image(16, 64, RED)
    image[:, 20:44] = BLUE
    package = make_package(ColourModel(dense=False), "classification", resize="shorter_side")
    (row,) = classes(Predictor.of(package), image)
    assert int(row.argmax()) == 3


def test_flips_average_image_and_mirror_image() -> None:
    image = halves(16, 16, RED, GREEN)
    package = make_package(LeftModel(), "classification", classes=("green", "red"))
    (plain,), (mirrored,) = classes(Predictor.of(package), image), classes(Predictor.of(package), image[:, ::-1])
    assert plain.argmax() != mirrored.argmax()
    (both,) = classes(Predictor.of(package, flips=True), image)
    np.testing.assert_allclose(both, (plain + mirrored) / 2, rtol=1e-5)


def test_standardised_light_evens_out_exposure() -> None:
    bright = np.random.default_rng(3).integers(60, 200, (16, 16, 3), dtype=np.uint8)
    dark = (bright * 0.5).round().astype(np.uint8)

    def mean_depth(image: np.ndarray, light: str) -> float:
        (prediction,) = Predictor.of(make_package(DepthModel(), "depth", light=light)).predict([image])
        return float(prediction.depth.mean())

    assert abs(mean_depth(bright, "original") - mean_depth(dark, "original")) > 0.2
    assert mean_depth(bright, "standardized") == pytest.approx(mean_depth(dark, "standardized"), abs=0.01)


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_without_memory_the_batch_is_halved_and_nothing_is_lost(task: str, caplog: pytest.LogCaptureFixture) -> None:
    colours = [RED, GREEN, BLUE, GREY, RED, BLUE, GREEN]
    model = ColourModel(dense=task == "segmentation", most=2)
    predictor = Predictor.of(make_package(model, task), batch_size=8)
    predictions = predictor.predict([plain_image(16, 16, colour) for colour in colours])
    found = [
        int(one.probabilities.argmax() if isinstance(one, ClassPrediction) else one.labels[0, 0]) for one in predictions
    ]
    assert found == [1, 2, 3, 0, 1, 3, 2]
    assert predictor.batch_size == 2
    assert [record.getMessage().rpartition(" ")[2] for record in caplog.records] == ["4", "2"]
    assert [shape[0] for shape in model.batches] == [7, 4, 2, 2, 2, 1]


def test_an_image_that_never_fits_is_an_error_and_so_is_any_other_failure() -> None:
    with pytest.raises(RunError, match="not even one image fits into the memory of cpu: CUDA out of memory"):
        Predictor.of(make_package(ColourModel(most=0)), batch_size=4).predict([plain_image(16, 16, RED)])

    class Broken(ColourModel):
        def forward(self, images: Tensor) -> dict[str, Tensor]:
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        Predictor.of(make_package(Broken()), batch_size=4).predict([plain_image(16, 16, RED)])


@pytest.mark.parametrize("task", ["classification", "segmentation", "depth"])
@pytest.mark.parametrize("resize", ["stretch", "original"])
def test_an_answer_of_nan_is_none(task: str, resize: str) -> None:
    class Nan(DepthModel if task == "depth" else ColourModel):
        def colours(self, images: Tensor) -> Tensor:
            return super().colours(images) * torch.nan

    if task == "classification" and resize == "original":
        return
    predictor = Predictor.of(make_package(Nan(dense=task != "classification"), task, resize=resize))
    with pytest.raises(RunError, match=r"the model's (probabilities|depth) is NaN, so nothing can be predicted"):
        predictor.predict([plain_image(90, 90, RED)])


def test_thresholds_of_other_classes_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_package(tmp_path / "best.pth", "segmentation")
    content = torch.load(path, weights_only=True)
    for thresholds, said in (({"crack": 0.4}, False), ({"crack": 0.4, "hole": 0.3}, True)):
        content["thresholds"] = thresholds
        write_with_checksum(path, lambda file: torch.save(content, file))
        caplog.clear()
        Predictor.load(path)
        assert ("holds thresholds of ['hole']" in caplog.text) is said


def test_every_door_converts_an_image_alike(tmp_path: Path) -> None:
    """Transparent, turned and deep images, opened by Pillow, give what their files give."""
    predictor = Predictor.of(make_package(ColourModel(), value_range=ValueRange.of_bits(12)))
    values = np.linspace(0, 4095, 16 * 16).reshape(16, 16)
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "float.tif")
    Image.fromarray((values / 16).astype(np.uint8)).save(tmp_path / "turned.jpg", exif=turned)
    Image.new("RGBA", (16, 16), (255, 0, 0, 100)).save(tmp_path / "alpha.png")
    for path in sorted(tmp_path.iterdir()):
        read = load_image(path, ValueRange.of_bits(12))
        expected = predictor.prepare(read).inputs["image"]
        with Image.open(path) as opened:
            assert torch.equal(predictor.prepare(opened).inputs["image"], expected), path.name
    array = predictor.prepare(values.astype(np.float32)).inputs["image"]
    assert torch.equal(
        array, predictor.prepare(load_image(tmp_path / "float.tif", ValueRange(0, 4095))).inputs["image"]
    )
    assert torch.equal(array, predictor.prepare(torch.from_numpy(values)[None]).inputs["image"])
    black_and_white = predictor.prepare(values > 2000).inputs["image"]
    assert black_and_white.max() > black_and_white.min()


def test_what_cannot_be_done_is_said() -> None:
    package = make_package(ColourModel())
    with pytest.raises(ValueError, match=r"scales .* are for dense tasks"):
        Predictor.of(make_package(ColourModel(dense=False), "classification"), scales=(1.0, 2.0))
    predictor = Predictor.of(package)
    for wrong in (np.zeros((4, 4, 5), np.uint8), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"an image must be \[H, W\] or \[H, W, C\]"):
            predictor.prepare(wrong)
    with pytest.raises(ValueError, match="pixels would be resized"):
        Predictor.of(make_package(ColourModel(), image_size=512, resize="shorter_side")).prepare(
            plain_image(1, 30_000, RED)
        )
    assert predictor.predict([]) == []


def test_a_processor_takes_few_images_and_fewer_large_ones() -> None:
    sizes = [choose_batch_size(torch.device("cpu"), (side, side)) for side in (64, 224, 518, 4000)]
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0], sizes[-1]) == (8, 1)


@pytest.mark.gpu
def test_a_gpu_answers_as_the_processor_does() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    images = [np.random.default_rng(4).integers(0, 256, (40, 50, 3), dtype=np.uint8) for _ in range(3)]
    for resize in ("stretch", "original"):
        here = areas(Predictor.of(make_package(ColourModel(), resize=resize), flips=True), *images)
        there = areas(Predictor.of(make_package(ColourModel().cuda(), resize=resize), flips=True), *images)
        for one, other in zip(here, there, strict=True):
            assert (one.labels != other.labels).mean() < 0.001
            np.testing.assert_allclose(one.defect, other.defect, atol=1e-3)
    assert choose_batch_size(torch.device("cuda"), (224, 224)) >= 1


@pytest.mark.parametrize("size", [(16, 12), (40, 33), (17, 100), (16, 12000), (100, 12)])
@pytest.mark.parametrize("numbers_at_once", [1, 500, 2**26])
def test_enlarging_in_bands_is_bilinear(size: tuple[int, int], numbers_at_once: int) -> None:
    maps = torch.rand(3, 16, 12, generator=torch.Generator().manual_seed(0))
    bands = list(full_size_bands(maps, size, numbers_at_once=numbers_at_once))
    expected = F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(torch.cat(bands, dim=1), expected, atol=1e-5, rtol=1e-5)
    assert all(band.numel() <= max(numbers_at_once, 3 * size[1]) for band in bands)


def test_what_gets_smaller_is_averaged() -> None:
    maps = torch.rand(2, 64, 64, generator=torch.Generator().manual_seed(0))
    (one,) = full_size_bands(maps, (1, 1))
    assert one.shape == (2, 1, 1)
    expected = F.interpolate(maps[None], (1, 1), mode="bilinear", antialias=True)[0]
    torch.testing.assert_close(one, expected)
    assert (one - maps.mean(dim=(1, 2), keepdim=True)).abs().max() < 0.05  # a single pixel would be off by up to 0.5
    mixed = torch.cat(list(full_size_bands(maps, (8, 200))), dim=1)
    shrunk = F.interpolate(maps[None], (8, 64), mode="bilinear", antialias=True)
    torch.testing.assert_close(mixed, F.interpolate(shrunk, (8, 200), mode="bilinear")[0], atol=1e-5, rtol=1e-5)
