from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from dinov2.data.loaders import make_dataset
from dinov2.eval.features import Features
from dinov2.eval.image_statistics import (
    STATISTICS,
    extract_statistics,
    image_statistics,
    knn_by_statistics,
    logistic_by_statistics,
    standardize,
)


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
