"""What scores are compared with, and what is said about it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_stand_ins import (
    TINY,
    Backbone,
    MemoryDataset,
    TokenBackbone,
    dataset_flags,
    make_parts,
    random_set,
    tiny_transformer,
    two_sets,
)
from PIL import Image
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torchvision.transforms import functional as TF

from dinov2.data.loaders import make_dataset
from dinov2.eval import knn, linear, log_regression, yardsticks
from dinov2.eval.command import build_random_backbone
from dinov2.eval.features import FEATURES, Features
from dinov2.eval.knn import KnnSettings, choose_k, eval_knn, neighbour_probabilities
from dinov2.eval.linear import LinearProtocol, eval_linear
from dinov2.eval.log_regression import LogRegressionSettings, eval_log_regression
from dinov2.eval.metrics import classification
from dinov2.eval.metrics.classification import (
    MetricValue,
    ScoringSettings,
    deciding_metric,
    score_predictions,
)
from dinov2.eval.results import EvaluationResults
from dinov2.eval.retrieval import RetrievalSettings, eval_retrieval
from dinov2.eval.yardsticks import (
    STATISTICS,
    compare,
    extract_statistics,
    image_statistics,
    knn_by_statistics,
    logistic_by_statistics,
    standardize,
)
from dinov2.models.vision_transformer import DinoVisionTransformer

PROTOCOL = LinearProtocol(learning_rates=(0.1,), n_last_blocks=(1,), epochs=1, epoch_length=10, num_resamples=50)


def evaluate(evaluator: str, train: MemoryDataset, val: MemoryDataset, **options: object) -> EvaluationResults:
    common = {"num_workers": 0, **options}
    if evaluator == "linear":
        return eval_linear(TokenBackbone(), train, val, PROTOCOL, **common)
    if evaluator == "log_regression":
        settings = LogRegressionSettings(cs=(0.1, 1.0), num_resamples=50)
        return eval_log_regression(Backbone(), train, val, settings, **common)
    return eval_knn(Backbone(), train, val, nb_knn=(1, 5), num_resamples=50, **common)


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level("INFO", "dinov2")
    return caplog


EVALUATORS = ["knn", "linear", "log_regression"]


@pytest.mark.parametrize("evaluator", EVALUATORS)
@pytest.mark.parametrize("num_classes", [2, 3])
def test_every_table_shows_what_has_to_be_beaten(
    evaluator: str, num_classes: int, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    train = random_set(30, num_classes, seed=0, photos_per_part=2, name="train")
    val = random_set(32, num_classes, seed=1, photos_per_part=2, name="val")
    blind = TokenBackbone(seed=5) if evaluator == "linear" else Backbone(seed=5)
    results = evaluate(evaluator, train, val, random_backbone=blind, output_dir=tmp_path)
    assert "better than chance" in log.messages[-1]
    assert "\nimage statistics" in log.messages[-1]
    assert list(results.yardsticks) == ["chance", "majority class", "image statistics", "random backbone"]
    labels, learnt = val.get_targets(), train.get_targets()
    dummy = DummyClassifier(strategy="prior").fit(np.zeros((len(learnt), 1)), learnt)
    majority = results.yardsticks["majority class"].image
    assert majority.metrics["accuracy"].value == dummy.score(np.zeros((len(labels), 1)), labels)
    assert majority.count == 32
    assert results.yardsticks["chance"].part.count == 16
    assert results.yardsticks["chance"].image.metrics["balanced_accuracy"].value == 1 / num_classes
    metric = "auroc" if num_classes == 2 else "balanced_accuracy"
    assert [(one.yardstick, one.level, one.metric) for one in results.comparisons] == [
        (yardstick, level, "accuracy" if yardstick == "majority class" else metric)
        for yardstick in results.yardsticks
        for level in ("image", "part")
    ]
    if evaluator == "knn":
        statistics = [extract_statistics(one, num_workers=0) for one in (train, val)]
        rows = knn_by_statistics(*statistics, num_classes)
        expected = score_predictions(rows, labels, val.get_group_ids(), num_resamples=0).image.metrics["accuracy"].value
        assert results.yardsticks["image statistics"].image.metrics["accuracy"].value == expected
        alone = eval_knn(blind, train, val, nb_knn=(1, 5), num_resamples=0, num_workers=0).scores
        found = results.yardsticks["random backbone"].image.metrics["accuracy"].value
        assert found in [scores.image.metrics["accuracy"].value for scores in alone.values()]
    written = json.loads((tmp_path / "results.json").read_text())
    assert EvaluationResults.from_dict(written).as_dict() == results.as_dict()
    assert {"yardsticks", "comparisons"} <= written.keys()


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_a_set_of_one_class_is_said_to_tell_nothing(evaluator: str, log: pytest.LogCaptureFixture) -> None:
    train, val = two_sets()
    good = MemoryDataset(val.colours, [0] * len(val), val.groups, val.classes, name="val")
    results = evaluate(evaluator, train, good)
    warned = [record.getMessage() for record in log.records if record.levelname == "WARNING"]
    assert any("all images of the val set show only class 0, and no image shows class 1" in text for text in warned)
    assert not results.comparisons
    assert "val shows only class 0: nothing here says whether the classes are told apart" in log.messages[-1]


def test_noise_is_not_told_from_chance_and_few_parts_tell_nothing(log: pytest.LogCaptureFixture) -> None:
    generator = np.random.default_rng(3)

    def noise(num_images: int, name: str, labels: list[int] | None = None) -> MemoryDataset:
        colours = [tuple(map(int, row)) for row in generator.integers(0, 256, (num_images, 3))]
        return MemoryDataset(colours, labels or [i % 2 for i in range(num_images)], None, ("good", "bad"), name=name)

    results = eval_knn(Backbone(), noise(40, "train"), noise(60, "val"), nb_knn=(5,), num_workers=0)
    assert {one.verdict for one in results.comparisons if one.yardstick == "chance"} == {"not distinguishable"}
    assert "not distinguishable from chance" in log.messages[-1]
    few = eval_knn(Backbone(), noise(40, "train"), noise(12, "val", [0] * 9 + [1] * 3), nb_knn=(5,), num_workers=0)
    assert {one.verdict for one in few.comparisons} == {"too few parts to tell (3 beside the most frequent class)"}


def test_intervals_of_differences_are_those_of_drawing_the_same_parts_for_both() -> None:
    generator = np.random.default_rng(0)
    labels = np.array([0, 1] * 20)
    groups = [f"{i // 2 % 12}" for i in range(40)]
    ours, theirs = (np.stack([1 - p, p], axis=1) for p in generator.random((2, 40)) * 0.5 + labels * 0.3)
    many = ScoringSettings(num_resamples=3000, seed=1)
    one, two = (many.resample(rows, labels, groups)["image"] for rows in (ours, theirs))
    found = one.less(two)["auroc"]
    names, rows = np.unique(groups, return_inverse=True)
    slow = []
    for _ in range(150):
        drawn = np.concatenate([np.flatnonzero(rows == part) for part in generator.integers(0, len(names), len(names))])
        slow.append(roc_auc_score(labels[drawn], ours[drawn, 1]) - roc_auc_score(labels[drawn], theirs[drawn, 1]))
    assert found.value == pytest.approx(roc_auc_score(labels, ours[:, 1]) - roc_auc_score(labels, theirs[:, 1]))
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(slow, (2.5, 97.5))), abs=0.06)
    for level in ScoringSettings(num_resamples=50).resample(ours, labels, groups).values():
        assert set(level.less(level).values()) == {MetricValue(value=0.0, low=0.0, high=0.0)}


def test_large_sets_are_compared_by_fewer_resamples_and_statistics_learn_from_some_parts(
    monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(classification, "MAX_DRAWS", 60)
    monkeypatch.setattr(yardsticks, "MAX_LEARNT_FROM", 10)
    train, val = (random_set(20, 2, seed=seed, photos_per_part=2, name=str(seed)) for seed in (0, 1))
    (level, _) = ScoringSettings().resample(np.full((20, 2), 0.5), val.get_targets(), val.get_group_ids()).values()
    assert len(level.resamples["auroc"]) == 60 // 10
    (rows,) = yardsticks.classify_by_statistics({"train": train, "val": val}, 2, "logistic", num_workers=0).values()
    assert rows.shape == (20, 2)
    assert "image statistics are learnt from 10 of 20 training images" in log.messages


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(0.1, 0.2, "better"), (-0.2, -0.1, "worse"), (-0.1, 0.1, "not distinguishable")]
)
def test_the_interval_decides_the_verdict(low: float, high: float, verdict: str) -> None:
    value = MetricValue(value=0.8, low=0.5 + low, high=0.5 + high)
    comparison = compare("k=1", "chance", "image", "auroc", value, MetricValue(value=0.5))
    assert comparison.verdict == verdict
    assert (comparison.low, comparison.high) == pytest.approx((low, high))
    without = compare("k=1", "chance", "image", "auroc", MetricValue(value=0.8), MetricValue(value=0.5))
    assert without.verdict == "no interval to tell by"


def test_two_classes_choose_by_auroc_unless_told_otherwise() -> None:
    train, val = two_sets(num_train=40)
    noisy = replace(PROTOCOL, learning_rates=(0.01, 0.1), n_last_blocks=(1, 4))
    assert eval_linear(TokenBackbone(), train, val, noisy, num_workers=0).settings["val_metric"] == "auroc"
    three = [random_set(30, 3, seed=seed, name=name) for seed, name in enumerate(("train", "val"))]
    assert eval_linear(TokenBackbone(), *three, noisy, num_workers=0).settings["val_metric"] == "accuracy"
    assert deciding_metric(np.array([0, 0]), 2, "accuracy") == "accuracy", "one class has no AUROC"

    generator = np.random.default_rng(7)
    labels = generator.permuted([0] * 50 + [1] * 10)
    bank = extract_statistics(MemoryDataset([(9, 9, 9)] * 60, labels.tolist(), name="bank"), num_workers=0)
    rows = torch.from_numpy(generator.normal(size=(60, 8)) + 0.7 * labels[:, None]).float()
    bank = replace(bank, embeddings=torch.nn.functional.normalize(rows, dim=1))
    chosen = {}
    for metric in ("", "balanced_accuracy"):
        settings = KnnSettings(nb_knn=(1, 3, 9, 27), metric=metric, num_resamples=0, leave_one_part_out=True)
        scores = {
            k: score_predictions(p, labels, bank.group_ids, num_resamples=0).image.metrics
            for k, p in neighbour_probabilities(bank, bank, 2, settings).items()
        }
        chosen[metric] = choose_k(bank, 2, settings)
        best = max(scores.values(), key=lambda found: found[metric or "auroc"].value)
        assert scores[chosen[metric]][metric or "auroc"] == best[metric or "auroc"]
    assert chosen[""] != chosen["balanced_accuracy"]


def test_the_random_backbone_sees_the_image_and_is_seeded() -> None:
    from dinov2.config import load_config

    config = load_config(None, [*TINY, "student.layerscale=1e-5"])
    first, again, other = (build_random_backbone(config, "cpu", seed=seed) for seed in (0, 0, 1))
    images = torch.randn(4, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    features = first(images)
    assert torch.equal(features, again(images))
    assert not torch.equal(features, other(images))
    assert features.std(dim=0).mean() > 0.01 * features.std()


@pytest.mark.parametrize("features", FEATURES)
def test_a_random_backbone_is_scored_with_the_same_features(features: str) -> None:
    model, train, val = (
        tiny_transformer(),
        random_set(12, 2, seed=0, name="train"),
        random_set(12, 2, seed=1, name="val"),
    )
    for dataset in (train, val):
        dataset.transform = lambda image: TF.to_tensor(image.resize((28, 28)))
        dataset.groups = [str(row // 2) for row in range(12)]
    common = {"num_workers": 0, "random_backbone": model}
    regression = LogRegressionSettings(cs=(1.0,), num_resamples=0)
    rankings = RetrievalSettings(features=features, num_resamples=0, num_workers=0)
    for results in (
        eval_knn(model, train, val, nb_knn=(1, 3), num_resamples=0, features=features, **common),
        eval_log_regression(model, train, val, regression, features=features, **common),
        eval_retrieval(model, None, val, settings=rankings, random_backbone=model),
    ):
        assert results.settings["features"] == features
        ours = results.scores[results.chosen or "parts"].image.metrics
        assert results.yardsticks["random backbone"].image.metrics == ours


@pytest.mark.parametrize("evaluator", [knn, linear, log_regression])
def test_commands_compare_with_a_random_backbone(
    evaluator: object, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    root = make_parts(tmp_path / "set", images=24, splits=("train", "val"))
    model = DinoVisionTransformer(img_size=28, patch_size=14, embed_dim=192, depth=12, num_heads=3, init_values=1.0)
    torch.save(
        {"teacher": {f"backbone.{name}": value for name, value in model.state_dict().items()}}, tmp_path / "w.pth"
    )
    words = [*TINY, *dataset_flags(root), "--num-workers=0", "--num-resamples=20", f"--output-dir={tmp_path / 'out'}"]
    words += ["--epochs=1", "--epoch-length=2", "--learning-rates=0.1"] if evaluator is linear else []
    words += ["--cs", "0.1", "1"] if evaluator is log_regression else []
    assert evaluator.main([*words, f"--pretrained-weights={tmp_path / 'w.pth'}", "--compare-random"]) == 0
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(written["yardsticks"]) == ["chance", "majority class", "image statistics", "random backbone"]
    assert {one["yardstick"] for one in written["comparisons"]} == set(written["yardsticks"])
    if evaluator is knn:
        assert evaluator.main([*words, "--compare-random", "--no-image-statistics"]) == 0
        assert (
            "--compare-random has no effect without --pretrained-weights"
            in (tmp_path / "out" / "log" / "log.txt").read_text()
        )
        written = json.loads((tmp_path / "out" / "results.json").read_text())
        assert list(written["yardsticks"]) == ["chance", "majority class"]


@pytest.mark.parametrize("size", [(40, 30), (1, 9), (9, 1), (1, 1), (3, 700)])
def test_statistics_are_those_of_the_grey_image(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    grey = np.asarray(image.convert("L")) / 255
    down, right = (np.gradient(grey, axis=axis) if grey.shape[axis] > 1 else 0 * grey for axis in (0, 1))
    percentiles = np.percentile(grey, [1, 5, 25, 50, 75, 95, 99])
    expected = [grey.mean(), grey.std(), *percentiles, np.sqrt(down**2 + right**2).mean()]
    assert len(STATISTICS) == len(expected)
    np.testing.assert_allclose(image_statistics(image), expected, rtol=1e-6, atol=1e-9)


def test_classifiers_of_statistics_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    train, val = (
        Features(torch.from_numpy(rows).float(), torch.arange(len(rows)) % 3, [*map(str, rows)], [*map(str, rows)])
        for rows in (rng.normal(3, 2, (60, 10)), rng.normal(3, 2, (40, 10)))
    )
    scaler = StandardScaler().fit(train.embeddings.double())
    known, rows = (scaler.transform(part.embeddings.double()) for part in (train, val))
    knn = KNeighborsClassifier(20, weights="distance", metric="cosine").fit(known, train.labels)
    assert np.abs(knn_by_statistics(train, val, 3) - knn.predict_proba(rows)).max() < 1e-3
    logistic = LogisticRegression(max_iter=5_000).fit(known, train.labels)
    assert np.abs(logistic_by_statistics(train, val, 3) - logistic.predict_proba(rows)).max() < 1e-3


def test_a_part_left_out_does_not_vote_for_itself() -> None:
    rows = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    twins = Features(
        torch.cat([rows, rows]), torch.arange(12) // 6, [str(i % 6) for i in range(12)], list("abcdefghijkl")
    )
    with_twin = knn_by_statistics(twins, twins, 2, num_neighbours=1)
    assert (with_twin[:6, 0] == 1).all()  # every image finds itself
    assert np.isfinite(knn_by_statistics(twins, twins, 2, leave_one_part_out=True)).all()


def test_train_of_one_class_and_equal_images_give_no_nan() -> None:
    rows = Features(torch.ones(4, 10), torch.ones(4, dtype=torch.int64), list("abcd"), list("abcd"))
    assert (standardize(rows.embeddings, rows.embeddings) == 0).all()
    for probabilities in (knn_by_statistics(rows, rows, 2), logistic_by_statistics(rows, rows, 2)):
        assert probabilities.tolist() == [[0.0, 1.0]] * 4


def test_steel_strip_is_told_apart_by_brightness_alone(neu: Path) -> None:
    sets = [make_dataset(dataset_str=f"GroupedJSON:split={split}:root={neu}") for split in ("TRAIN", "VAL")]
    train, val = (extract_statistics(dataset, num_workers=0) for dataset in sets)
    labels = val.labels.numpy()
    accuracies = [
        (probabilities.argmax(axis=1) == labels).mean()
        for probabilities in (knn_by_statistics(train, val, 6), logistic_by_statistics(train, val, 6))
    ]
    assert [round(float(accuracy), 3) for accuracy in accuracies] == [0.942, 0.916]
