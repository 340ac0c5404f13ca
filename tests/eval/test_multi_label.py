"""Figures of several classes per image against scikit-learn and torchmetrics."""

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from torchmetrics.functional.classification import multilabel_average_precision, multilabel_f1_score

from dinov2.eval.metrics.multi_label import MultiLabelMetrics

CLASSES = ("scratch", "dent", "stain", "rust")


def problem(seed: int = 0, num_rows: int = 60) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = (generator.random((num_rows, 4)) < [0.1, 0.3, 0.5, 0.7]).astype(np.int64)
    return (generator.random((num_rows, 4)) * 0.7 + 0.3 * labels).round(2), labels


def metric_of(probabilities: np.ndarray, labels: np.ndarray, **options: float) -> dict[str, float]:
    metric = MultiLabelMetrics(CLASSES, **options)
    metric.update(probabilities[:20], labels[:20])
    metric.update(probabilities[20:], labels[20:])
    return metric.compute()


@pytest.mark.parametrize("threshold", [0.3, 0.5])
def test_agrees_with_torchmetrics_and_scikit_learn(threshold: float) -> None:
    probabilities, labels = problem()
    figures = metric_of(probabilities, labels, threshold=threshold)
    tensors = torch.from_numpy(probabilities), torch.from_numpy(labels)
    precisions = multilabel_average_precision(*tensors, 4, average="none").tolist()
    predicted = probabilities >= threshold
    f1 = f1_score(labels, predicted, average=None)
    expected = {
        "mean_average_precision": np.mean(precisions),
        "macro_f1": f1_score(labels, predicted, average="macro"),
        "micro_f1": f1_score(labels, predicted, average="micro"),
    }
    for number, name in enumerate(CLASSES):
        expected |= {f"average_precision/{name}": precisions[number], f"f1/{name}": f1[number]}
    assert figures == pytest.approx(expected, rel=1e-6)
    macro = multilabel_f1_score(*tensors, 4, average="macro", threshold=threshold - 1e-6)
    assert figures["macro_f1"] == pytest.approx(macro.item(), rel=1e-6)


def test_unknown_entries_do_not_count() -> None:
    probabilities, labels = problem()
    hidden = np.random.default_rng(1).random(labels.shape) < 0.3
    figures = metric_of(probabilities, np.where(hidden, -1, labels))
    assert metric_of(np.where(hidden, 0.77, probabilities), np.where(hidden, -1, labels)) == figures
    shown = ~hidden
    predicted = probabilities >= 0.5
    assert figures["micro_f1"] == pytest.approx(f1_score(labels[shown], predicted[shown]))
    for number, name in enumerate(CLASSES):
        rows = shown[:, number]
        alone = MultiLabelMetrics((name,))
        alone.update(probabilities[rows, number : number + 1], labels[rows, number : number + 1])
        assert alone.compute()[f"average_precision/{name}"] == figures[f"average_precision/{name}"]
        assert (
            alone.compute()[f"f1/{name}"]
            == figures[f"f1/{name}"]
            == f1_score(labels[rows, number], predicted[rows, number])
        )


def test_a_class_that_no_image_shows_counts_in_micro_f1_only() -> None:
    probabilities, labels = problem()
    labels[:, 3] = 0
    figures = metric_of(probabilities, labels)
    assert "f1/rust" not in figures
    assert "average_precision/rust" not in figures
    assert figures["macro_f1"] == pytest.approx(f1_score(labels[:, :3], probabilities[:, :3] >= 0.5, average="macro"))
    assert figures["micro_f1"] == pytest.approx(f1_score(labels, probabilities >= 0.5, average="micro"))


def test_metrics_that_do_not_exist_are_absent() -> None:
    zeros = np.zeros((25, 4))
    assert metric_of(zeros, zeros) == {}
    assert metric_of(zeros + 0.9, zeros) == {"micro_f1": 0}
    assert metric_of(zeros + 0.9, zeros - 1) == {}


def test_bad_input() -> None:
    metric = MultiLabelMetrics(CLASSES)
    half = np.full((2, 4), 0.5)
    for probabilities, labels, message in (
        (half, half[:1], "probabilities and labels must have one shape"),
        (half[:, :3], half[:, :3], r"must be \[B, 4\], found shape \[2, 3\]"),
        (half + 1, half * 0, r"probabilities must lie in \[0, 1\]"),
        (half * np.nan, half * 0, r"probabilities must lie in \[0, 1\]"),
        (half, half, r"labels must be 0, 1 or -1, found \[0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            metric.update(probabilities, labels)
    for classes in ((), ("a", "a")):
        with pytest.raises(ValueError, match="different classes"):
            MultiLabelMetrics(classes)
    with pytest.raises(ValueError, match="threshold must lie in"):
        MultiLabelMetrics(CLASSES, threshold=1.5)
