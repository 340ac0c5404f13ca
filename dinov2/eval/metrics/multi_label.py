"""Average precision and F1 of images that may show several classes."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from sklearn.metrics import average_precision_score, f1_score

from dinov2.eval.metrics.streaming import Pixels, StreamedMetric, as_array, check_same_size

MISSING = -1
THRESHOLD = 0.5


class MultiLabelMetrics(StreamedMetric):
    """Average precision and F1 of every class, judged by itself.

    An image counts for a class only where it is known whether it shows it.

    Args:
        classes: names of the classes.
        threshold: probability from which on a class is predicted.

    Raises:
        ValueError: there are no classes or two of one name, or the threshold is not in [0, 1].
    """

    def __init__(self, classes: Sequence[str], *, threshold: float = THRESHOLD) -> None:
        if not classes or len(set(classes)) != len(classes):
            raise ValueError(f"there must be different classes, found {list(classes)}")
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must lie in [0, 1], found {threshold}")
        self.classes = tuple(classes)
        self.threshold = threshold
        empty = np.zeros((0, len(classes)))
        super().__init__(sums={}, rows={"probabilities": empty, "labels": empty.astype(np.int64)})

    def update(self, probabilities: Pixels, labels: Pixels) -> None:
        """Adds images.

        Args:
            probabilities: ``[B, C]`` in [0, 1].
            labels: ``[B, C]`` of any dtype: 1 where the image shows the class, 0 where not, -1 where unknown.

        Raises:
            ValueError: the shapes differ or do not fit the classes, or a value is not allowed.
        """
        predicted, truth = as_array(probabilities), as_array(labels)
        check_same_size(predicted, truth, "probabilities", "labels")
        if predicted.ndim != 2 or predicted.shape[1] != len(self.classes):
            raise ValueError(f"probabilities must be [B, {len(self.classes)}], found shape {list(predicted.shape)}")
        if not ((predicted >= 0) & (predicted <= 1)).all():  # also for NaN
            raise ValueError("probabilities must lie in [0, 1]")
        wrong = truth[~np.isin(truth, (0, 1, MISSING))]
        if wrong.size:
            raise ValueError(f"labels must be 0, 1 or {MISSING}, found {wrong[:5].tolist()}")
        self.append("probabilities", predicted.astype(np.float64))
        self.append("labels", truth.astype(np.int64))

    def compute(self) -> dict[str, float]:
        """Figures in [0, 1].

        Returns:
            ``mean_average_precision`` and ``macro_f1``: means over the classes that an image is known to show;
            ``micro_f1``, over all known pairs of image and class, where any is positive in truth or prediction;
            ``average_precision/NAME`` and ``f1/NAME`` of the classes that the means run over.
        """
        probabilities, labels = self.rows("probabilities"), self.rows("labels")
        predicted = (probabilities >= self.threshold).astype(np.int64)
        known = labels != MISSING
        precisions, f1 = {}, {}
        for number in np.flatnonzero((labels == 1).any(axis=0)):
            rows = known[:, number]
            name = self.classes[number]
            precisions[name] = float(average_precision_score(labels[rows, number], probabilities[rows, number]))
            f1[name] = _f1(labels[rows, number], predicted[rows, number])
        figures = {}
        if precisions:
            figures["mean_average_precision"] = float(np.mean(list(precisions.values())))
            figures["macro_f1"] = float(np.mean(list(f1.values())))
        if (labels[known] + predicted[known]).any():
            figures["micro_f1"] = _f1(labels[known], predicted[known])
        figures |= {f"average_precision/{name}": value for name, value in precisions.items()}
        return figures | {f"f1/{name}": value for name, value in f1.items()}


def _f1(labels: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64]) -> float:
    return float(f1_score(labels, predicted, zero_division=0.0))
