"""Average precision and F1 of images that may show several classes."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import average_precision_score, f1_score
from torch import Tensor

from dinov2.eval.metrics.streaming import Pixels, StreamedMetric, as_array, check_same_size

UNKNOWN = -1
THRESHOLD = 0.5


class MultiLabelMetrics(StreamedMetric):
    """Average precision and F1 of every class by itself.

    An image counts for a class only where it is known whether it shows it. The values agree with torchmetrics'
    multi-label metrics but for rounding: scikit-learn computes in double precision.

    Args:
        classes: names of the classes.
        threshold: probability from which on a class is predicted.

    Raises:
        ValueError: there are no classes or two of one name, or the threshold is not in [0, 1].
    """

    probabilities: list[Tensor]
    labels: list[Tensor]

    def __init__(self, classes: Sequence[str], *, threshold: float = THRESHOLD) -> None:
        super().__init__()
        if not classes or len(set(classes)) != len(classes):
            raise ValueError(f"there must be different classes, found {list(classes)}")
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must lie in [0, 1], found {threshold}")
        self.classes = tuple(classes)
        self.threshold = threshold
        self.add_rows("probabilities")
        self.add_rows("labels")

    def update(self, probabilities: Pixels, labels: Pixels) -> None:
        """Adds images.

        Args:
            probabilities: ``[B, C]`` in [0, 1].
            labels: ``[B, C]`` of any dtype: 1 where the image shows the class, 0 where not, -1 where unknown.

        Raises:
            ValueError: the shapes differ or do not fit the classes, or a value is not allowed.
        """
        predicted, actual = as_array(probabilities), as_array(labels)
        check_same_size(predicted, actual, "probabilities", "labels")
        if predicted.ndim != 2 or predicted.shape[1] != len(self.classes):
            raise ValueError(f"probabilities must be [B, {len(self.classes)}], found shape {list(predicted.shape)}")
        if not ((predicted >= 0) & (predicted <= 1)).all():  # also for NaN
            raise ValueError("probabilities must lie in [0, 1]")
        wrong = actual[~np.isin(actual, (0, 1, UNKNOWN))]
        if wrong.size:
            raise ValueError(f"labels must be 0, 1 or {UNKNOWN}, found {wrong[:5].tolist()}")
        self.probabilities.append(torch.from_numpy(predicted.astype(np.float64)))
        self.labels.append(torch.from_numpy(actual.astype(np.int64)))

    def compute(self) -> dict[str, float]:
        """Values in [0, 1].

        Returns:
            ``mean_average_precision`` and ``macro_f1``: means over the classes that an image is known to show;
            ``micro_f1``, over all known pairs of image and class, where any is positive in label or prediction;
            ``average_precision/NAME`` and ``f1/NAME`` of the classes that the means run over.
        """
        if not self.labels:
            return {}
        probabilities, labels = torch.cat(self.probabilities).numpy(), torch.cat(self.labels).numpy()
        predicted = (probabilities >= self.threshold).astype(np.int64)
        known = labels != UNKNOWN
        precisions, f1 = {}, {}
        for number in np.flatnonzero((labels == 1).any(axis=0)):
            rows, name = known[:, number], self.classes[number]
            precisions[name] = float(average_precision_score(labels[rows, number], probabilities[rows, number]))
            f1[name] = _f1(labels[rows, number], predicted[rows, number])
        values = {}
        if precisions:
            values["mean_average_precision"] = float(np.mean(list(precisions.values())))
            values["macro_f1"] = float(np.mean(list(f1.values())))
        if (labels[known] + predicted[known]).any():
            values["micro_f1"] = _f1(labels[known], predicted[known])
        values |= {f"average_precision/{name}": value for name, value in precisions.items()}
        return values | {f"f1/{name}": value for name, value in f1.items()}


def _f1(labels: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64]) -> float:
    return float(f1_score(labels, predicted, zero_division=0.0))
