"""What describes an image: class token, mean and deviation of the patches, or several of them."""

import logging
from dataclasses import fields
from statistics import fmean, pstdev

import numpy as np
import pytest
import torch
from eval_stand_ins import Backbone, MemoryDataset, random_set, tiny_transformer
from PIL import Image
from torch import Tensor, nn

from dinov2.config.schema import EvaluationOptions
from dinov2.data.transforms import make_classification_eval_transform
from dinov2.eval.features import (
    FEATURES,
    Features,
    ModelWithFeatures,
    check_finite_features,
    common_classes,
    evaluating,
    extract_features,
    few_shot_subset,
    make_eval_transform,
    shared_parts,
    warn_of_idle_aggregation,
    warn_of_shared_parts,
    warn_of_unseen_classes,
)
from dinov2.eval.metrics.classification import LevelScores, MetricValue, Scores
from dinov2.eval.results import mean_scores, summarise_tries
from dinov2.eval.retrieval.ranking import describe_images
from dinov2.eval.utils import ModelWithNormalize


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (4, 0), (7, 0), (100, 0), (4, 2)])
def test_rows_follow_the_dataset(batch_size: int, num_workers: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dinov2")
    model, dataset = Backbone(), random_set(7, 3, seed=0)
    features = extract_features(model, dataset, batch_size=batch_size, num_workers=num_workers)
    expected = torch.cat([model(dataset[index][0][None]) for index in range(7)]).detach()
    torch.testing.assert_close(features.embeddings, expected)
    assert features.embeddings.dtype == torch.float32
    assert features.labels.tolist() == dataset.labels
    assert features.group_ids == dataset.groups
    assert features.paths == [f"set/{index}.png" for index in range(7)]
    assert len(features) == 7
    assert not features.embeddings.requires_grad
    assert "features: 7 of 7" in caplog.text


def test_every_module_gets_its_mode_back() -> None:
    model = nn.Sequential(Backbone(), nn.Dropout(0.9), nn.BatchNorm1d(8))
    model.train()
    model[2].eval()
    first = extract_features(model, random_set(5, 2, seed=0), num_workers=0)
    second = extract_features(model, random_set(5, 2, seed=0), num_workers=0)
    assert torch.equal(first.embeddings, second.embeddings)  # no dropout
    assert [module.training for module in model] == [True, True, False]
    with pytest.raises(RuntimeError, match="inside"), evaluating(model):
        raise RuntimeError("inside")
    assert model.training


def test_autocast_changes_precision_only() -> None:
    model, dataset = Backbone(), random_set(6, 2, seed=0)
    exact = extract_features(model, dataset, num_workers=0)
    rounded = extract_features(model, dataset, num_workers=0, autocast_dtype=torch.bfloat16)
    assert rounded.embeddings.dtype == torch.float32
    assert not torch.equal(exact.embeddings, rounded.embeddings)
    torch.testing.assert_close(exact.embeddings, rounded.embeddings, rtol=0.05, atol=0.05)


def test_progress_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "dinov2"):
        extract_features(Backbone(), random_set(5, 2, seed=0), batch_size=2, num_workers=0)
    assert "features: 5 of 5" in caplog.text


class NotFinite(nn.Module):
    """Spoils the features of images whose red value is 255."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, images: Tensor) -> Tensor:
        means = images.mean(dim=(2, 3))
        return torch.where(means[:, :1] == 1, torch.full_like(means, self.value), means)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("normalise", [False, True])
def test_features_that_are_not_finite(value: float, normalise: bool) -> None:
    dataset = MemoryDataset([(255, 0, 0), (9, 0, 0), (255, 1, 1)], [0, 1, 0], name="photos")
    model: nn.Module = NotFinite(value)
    model = ModelWithNormalize(model) if normalise else model
    with pytest.raises(ValueError, match=r"features of 2 of 3 images are NaN or infinite: photos/0.png, photos/2.png$"):
        extract_features(model, dataset, num_workers=0)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_image_that_cannot_be_read(num_workers: int) -> None:
    dataset = MemoryDataset([(1, 2, 3)] * 4, [0] * 4, unreadable=frozenset({2}), name="line 4")
    with pytest.raises(ValueError, match=r"evaluation needs every image, but line 4/2.png: truncated"):
        extract_features(Backbone(), dataset, num_workers=num_workers)


def test_normalised_rows_have_unit_length_in_float32() -> None:
    model = ModelWithNormalize(Backbone().to(torch.bfloat16))
    rows = model(torch.rand(5, 3, 4, 4).to(torch.bfloat16))
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(5))


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def framed(width: int, height: int, border: int) -> Image.Image:
    """A grey image with a red border."""
    pixels = np.full((height, width, 3), 128, dtype=np.uint8)
    for edge in (np.s_[:border], np.s_[-border:], np.s_[:, :border], np.s_[:, -border:]):
        pixels[edge] = (255, 0, 0)
    return Image.fromarray(pixels)


def test_default_is_the_published_transform() -> None:
    image = noise(300, 260)
    assert torch.equal(make_eval_transform()(image), make_classification_eval_transform()(image))


@pytest.mark.parametrize("image_size", [28, 224, (42, 70), (70, 42)])
@pytest.mark.parametrize("whole_image", [False, True])
@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (20, 20)])
def test_size_of_the_result(image_size: int | tuple[int, int], whole_image: bool, shape: tuple[int, int]) -> None:
    result = make_eval_transform(image_size, whole_image=whole_image)(noise(*shape))
    expected = (image_size, image_size) if isinstance(image_size, int) else image_size
    assert tuple(result.shape) == (3, *expected)
    assert result.dtype == torch.float32


@pytest.mark.parametrize("image_size", [56, (56, 84)])
def test_whole_image_shows_the_border_and_a_crop_does_not(image_size: int | tuple[int, int]) -> None:
    image = framed(448, 448, border=14)
    whole = make_eval_transform(image_size, whole_image=True)(image)
    cropped = make_eval_transform(image_size)(image)
    for edge in (whole[:, 0], whole[:, -1], whole[:, :, 0], whole[:, :, -1]):
        assert (edge[0] > 2).all()  # red, normalised
    assert cropped[0].max() < 0.5


def test_a_crop_that_is_not_square_keeps_the_shape_of_things() -> None:
    pixels = np.zeros((400, 400, 3), dtype=np.uint8)
    pixels[150:250, 150:250] = 255  # a square
    white = make_eval_transform((100, 200))(Image.fromarray(pixels))[0] > 0.5
    assert abs(int(white.any(dim=1).sum()) - int(white.any(dim=0).sum())) <= 1


IMAGE = (1, 2, 3)


def test_shared_parts_are_told_once_and_shortened(caplog: pytest.LogCaptureFixture) -> None:
    train, val = [f"p{index}" for index in range(9)] * 2, [f"p{index}" for index in range(2, 12)]
    expected = [f"p{index}" for index in range(2, 9)]
    assert shared_parts(train, val) == expected
    assert caplog.text == ""
    assert warn_of_shared_parts(train, val) == expected
    assert warn_of_shared_parts(["a"], ["b"]) == []
    assert [record.getMessage() for record in caplog.records] == [
        "7 parts are in both the training and the validation set, so the scores are too good: p2, p3, p4, p5, p6, …"
    ]


def test_features_that_are_not_finite_are_named() -> None:
    embeddings = torch.zeros(4, 2, 3)
    names = list("abcd")
    check_finite_features(embeddings, names)
    embeddings[1, 0, 2], embeddings[3, 1, 0] = float("nan"), float("inf")
    with pytest.raises(ValueError, match=r"features of 2 of 4 images of the test set are NaN or infinite: b, d$"):
        check_finite_features(embeddings, names, "test")


def test_classes_without_a_training_image_are_named(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_unseen_classes([0, 1, 1], ("a", "b"))
    assert caplog.text == ""
    warn_of_unseen_classes([2, 0, 2], ("a", "b", "c", "d"))
    assert "no training image shows b, d: it will never be predicted" in caplog.text


@pytest.mark.parametrize(
    ("aggregation", "num_classes", "told"), [("topk_mean", 3, True), ("topk_mean", 2, False), ("mean", 3, False)]
)
def test_a_part_aggregation_that_does_nothing_is_told(
    caplog: pytest.LogCaptureFixture, aggregation: str, num_classes: int, told: bool
) -> None:
    warn_of_idle_aggregation(aggregation, ("a", "b", "c")[:num_classes])
    assert ("part_aggregation=topk_mean has no effect with 3 classes" in caplog.text) == told


def test_features_are_those_of_the_tokens() -> None:
    backbone, images = tiny_transformer(), torch.randn(3, 3, 28, 42)
    tokens = backbone(images, is_training=True)
    cls, mean = tokens["x_norm_clstoken"], tokens["x_norm_patchtokens"].mean(dim=1)
    torch.testing.assert_close(ModelWithFeatures(backbone)(images), cls)
    torch.testing.assert_close(ModelWithFeatures(backbone, "patch_mean")(images), mean)
    both = ModelWithFeatures(backbone, "cls_patch_mean")(images)
    torch.testing.assert_close(both.norm(dim=1), torch.full((3,), 2**0.5))
    torch.testing.assert_close(both[:, :24], cls / cls.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("size", [(28, 42), (14, 14)])
def test_patch_statistics_are_the_class_token_and_mean_and_deviation_of_every_channel(size: tuple[int, int]) -> None:
    backbone, images = tiny_transformer(), torch.randn(3, 3, *size)
    tokens = backbone(images, is_training=True)
    expected = []
    for cls, patches in zip(tokens["x_norm_clstoken"].tolist(), tokens["x_norm_patchtokens"].tolist(), strict=True):
        channels = list(zip(*patches, strict=True))
        means = [fmean(values) for values in channels]
        expected.append([*cls, *means, *map(pstdev, channels)])
    found = ModelWithFeatures(backbone, "cls_patch_statistics")(images)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-6)
    assert found.shape == (3, FEATURES["cls_patch_statistics"] * 24)
    if size == (14, 14):
        assert not found[:, 48:].any(), "a single patch does not deviate"


def test_the_options_know_the_same_features() -> None:
    options = {field.name: field for field in fields(EvaluationOptions)}
    assert options["features"].metadata["choices"] == tuple(FEATURES)


def test_a_network_without_patches_is_refused_at_once() -> None:
    network = nn.Sequential(nn.Flatten())
    assert ModelWithFeatures(network)(torch.zeros(2, 3, 4, 4)).shape == (2, 48)
    with pytest.raises(ValueError, match=r"Sequential gives no patch tokens, .* must be cls, found 'patch_mean'"):
        ModelWithFeatures(network, "patch_mean")
    with pytest.raises(ValueError, match=r"Sequential gives no patch tokens, .* must be cls, found 'gem'"):
        describe_images(network, "gem")


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("per_class", [1, 5])
def test_reference_subsets(reference, seed: int, per_class: int) -> None:
    values = reference("eval_fixture.pt")["knn"]
    expected = values["few_shot_indices"][f"n{per_class}_seed{seed}"]
    assert torch.equal(few_shot_subset(values["train_labels"], per_class, seed), expected)


def test_every_class_gives_the_same_number_or_all_it_has() -> None:
    labels = torch.tensor([3, 0, 3, 0, 3, 0, 0, 7])
    subset = few_shot_subset(labels, 3, seed=0)
    assert labels[subset].bincount().tolist() == [3, 0, 0, 3, 0, 0, 0, 1]
    assert len(subset.unique()) == len(subset)


def test_a_metric_of_a_single_try_does_not_spread() -> None:
    both = {name: MetricValue(value=0.8, low=0, high=1) for name in ("accuracy", "auroc")}
    levels = [LevelScores(count=9, metrics=metrics) for metrics in (both, {"accuracy": MetricValue(value=0.6)})]
    tries = [Scores(image=level, part=level) for level in levels]
    assert summarise_tries(tries)["image"]["auroc"] == {"mean": 0.8, "std": 0.0, "values": [0.8]}
    mean = mean_scores(tries)
    assert mean.image.metrics["accuracy"] == MetricValue(value=pytest.approx(0.7))
    assert (mean.part.count, mean.part.confusion) == (9, ())


def test_selected_rows_belong_together_and_missing_labels_are_kept() -> None:
    features = extract_features(Backbone(), random_set(7, 3, seed=0), num_workers=0)
    some = features.select(torch.tensor([5, 2]))
    assert some.paths == ["set/5.png", "set/2.png"]
    assert some.group_ids == [features.group_ids[5], features.group_ids[2]]
    assert torch.equal(some.embeddings, features.embeddings[[5, 2]])
    assert torch.equal(some.labels, features.labels[[5, 2]])
    unlabelled = extract_features(Backbone(), MemoryDataset([(1, 2, 3), (4, 5, 6)], [None, 1]), num_workers=0)
    assert unlabelled.labels.tolist() == [-1, 1]
    assert unlabelled.group_ids == ["set/0.png", "set/1.png"]


def test_random_numbers_of_the_caller_are_left_alone() -> None:
    model = Backbone()
    before = torch.get_rng_state()
    extract_features(model, random_set(5, 2, seed=0), num_workers=0)
    few_shot_subset(torch.tensor([0, 0, 1]), 1, seed=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_bad_input() -> None:
    untransformed = random_set(2, 2, seed=0)
    untransformed.transform = None
    red, unreadable = MemoryDataset([(255, 0, 0)] * 9, [0] * 9), MemoryDataset([IMAGE] * 2, [0] * 2)
    unreadable.unreadable = frozenset({0, 1})
    for model, dataset, error, message in (
        (Backbone(), MemoryDataset([], []), ValueError, "has no images"),
        (nn.Identity(), random_set(2, 2, seed=0), ValueError, r"shape \[B, D\], not \(2, 3, 4, 4\)"),
        (Backbone(), untransformed, TypeError, "must return a tensor, not Image"),
        (Backbone(), unreadable, ValueError, "none of the 2 images can be read"),
        (NotFinite(float("nan")), red, ValueError, r"features of 9 of 9 .*set/4.png, …$"),
    ):
        with pytest.raises(error, match=message):
            extract_features(model, dataset, num_workers=0)
    with pytest.raises(ValueError, match=r"equally long, not \[2, 3\]"):
        Features(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), ["a"] * 3, ["a"] * 2)
    with pytest.raises(ValueError, match="'max' is not one of cls, patch_mean, cls_patch_mean, cls_patch_statistics"):
        ModelWithFeatures(Backbone(), "max")
    for image_size in (0, (14, -1)):
        with pytest.raises(ValueError, match="image_size must be at least 1"):
            make_eval_transform(image_size)
    with pytest.raises(ValueError, match="must be at least 1, found 0"):
        few_shot_subset(torch.tensor([0]), 0, seed=0)


def test_classes_of_both_sets() -> None:
    named = MemoryDataset([IMAGE], [0], classes=("good", "defect"))
    assert common_classes(named, named) == ("good", "defect")
    assert common_classes(MemoryDataset([IMAGE], [0]), MemoryDataset([IMAGE], [2])) == ("0", "1", "2")
    half, empty = (
        MemoryDataset([IMAGE] * 2, [0, None], classes=named.classes),
        MemoryDataset([], [], classes=named.classes),
    )
    swapped = MemoryDataset([IMAGE], [0], classes=("defect", "good"))
    for train, val, message in (
        (half, named, "1 of 2 images of the training set have no label"),
        (named, half, "1 of 2 images of the validation set have no label"),
        (empty, named, "training set has no images"),
        (named, empty, "validation set has no images"),
        (named, swapped, r"differ: training \['good', 'defect'\], validation \['defect', 'good'\]"),
        (named, MemoryDataset([IMAGE], [2], classes=named.classes), "label 2 is outside the 2 classes"),
    ):
        with pytest.raises(ValueError, match=message):
            common_classes(train, val)
