"""Figures of all resamples at once are those of each resample, built and scored."""

import numpy as np
import pytest

from dinov2.eval.metrics import classification as resampling
from dinov2.eval.metrics.classification import classification_metrics, resampled_metrics


@pytest.mark.parametrize("num_classes", [1, 2, 3, 7])
@pytest.mark.parametrize("seed", range(8))
def test_every_resample_is_scored_like_its_rows(num_classes: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "NUMBERS_AT_A_TIME", 70)  # several pieces
    generator = np.random.default_rng(seed)
    num_rows = int(generator.integers(1, 30))
    labels = generator.integers(0, num_classes, num_rows)
    probabilities = generator.integers(1, 6, (num_rows, num_classes)).astype(float)  # ties
    units = generator.integers(0, 5, num_rows)
    draws = generator.integers(0, 3, (15, 5))
    draws = draws[draws[:, units].sum(axis=1) > 0]
    resampled = resampled_metrics(probabilities, labels, draws, units)
    for index, draw in enumerate(draws):
        rows = np.repeat(np.arange(num_rows), draw[units])
        expected = classification_metrics(probabilities[rows], labels[rows])
        found = {name: values[index] for name, values in resampled.items() if not np.isnan(values[index])}
        assert found == pytest.approx(expected, abs=1e-12)


def test_without_resamples_there_are_no_figures() -> None:
    assert resampled_metrics(np.ones((2, 1)), np.zeros(2, int), np.zeros((0, 2), int), np.arange(2)) == {}
