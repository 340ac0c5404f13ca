"""What a task model says about one photo, at the photo's own size."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class ClassPrediction:
    """Which class a photo shows, or which of several.

    Attributes:
        probabilities: float32 ``[C]`` in [0, 1]; they add up to 1 unless ``multi_label``.
        multi_label: whether each class is judged by itself.
    """

    probabilities: NDArray[np.float32]
    multi_label: bool = False

    def __post_init__(self) -> None:
        assert self.probabilities.dtype == np.float32
        assert self.probabilities.ndim == 1


@dataclass(frozen=True, eq=False)
class SegmentationPrediction:
    """Which class each pixel shows.

    Attributes:
        labels: uint8 ``[H, W]``, index of the most probable class.
        scores: float32 ``[H, W]``, probability of that class.
        defect: float32 ``[H, W]``, 1 less the probability of class 0, the background.
    """

    labels: NDArray[np.uint8]
    scores: NDArray[np.float32]
    defect: NDArray[np.float32]

    def __post_init__(self) -> None:
        assert self.labels.dtype == np.uint8
        assert self.scores.dtype == self.defect.dtype == np.float32
        assert self.labels.ndim == 2
        assert self.labels.shape == self.scores.shape == self.defect.shape


@dataclass(frozen=True, eq=False)
class DepthPrediction:
    """How far away, or how deep, each pixel is.

    Attributes:
        depth: float32 ``[H, W]`` in ``unit``; NaN where nothing is known.
        unit: such as ``m``, ``um`` or ``px``; empty for relative depth.
    """

    depth: NDArray[np.float32]
    unit: str = ""

    def __post_init__(self) -> None:
        assert self.depth.dtype == np.float32
        assert self.depth.ndim == 2


Prediction = ClassPrediction | SegmentationPrediction | DepthPrediction
