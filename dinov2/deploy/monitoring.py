"""What a running service tells about itself: counters for Prometheus, drift of scores, images it was least sure of."""

import hashlib
import json
import math
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from scipy.spatial.distance import jensenshannon

from dinov2.tasks.predictions import NamedPredictions, Prediction
from dinov2.utils.files import write_atomically

_SCORE_BINS = 20
_RECENT = 1000  # scores that drift is about
_FEWEST = 100  # fewer say nothing about a distribution
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ENDINGS = {b"\x89PNG": ".png", b"\xff\xd8": ".jpg", b"II": ".tif", b"MM": ".tif", b"BM": ".bmp", b"RIFF": ".webp"}
_SCORE_KEYS = ("defect_score", "score")  # of a line of predictions.jsonl


def heads_of(prediction: Prediction) -> dict[str, Prediction]:
    """Predictions by the names of the heads; of a single head that name is empty."""
    return dict(prediction) if isinstance(prediction, NamedPredictions) else {"": prediction}


def read_scores(path: str | Path) -> dict[str, list[float]]:
    """Scores of images by head, from the ``predictions.jsonl`` of a run of inference over them.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such file, or holds no score.
    """
    scores: dict[str, list[float]] = {}
    try:
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            said = json.loads(line)
            parts = {"": said, **{name: part for name, part in said.items() if isinstance(part, dict)}}
            for head, part in parts.items():
                for value in (part[key] for key in _SCORE_KEYS if key in part):
                    scores.setdefault(head, []).append(float(value))
                    break
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no predictions.jsonl of dinov2 infer_image: {error}") from error
    if not scores:
        raise ValueError(f"{path} holds no line with one of {', '.join(_SCORE_KEYS)}")
    return scores


def score_histogram(scores: object) -> NDArray[np.float64]:
    """Share of scores in each of 20 equal parts of [0, 1]; float64 ``[20]``."""
    counts, _ = np.histogram(np.clip(np.asarray(scores, dtype=np.float64), 0, 1), bins=_SCORE_BINS, range=(0, 1))
    return counts.astype(np.float64) / max(int(counts.sum()), 1)


class ServiceMetrics:
    """Counters of a service in Prometheus' text format. Thread-safe.

    Drift is the Jensen-Shannon distance (base 2) between the histograms of the latest 1000 scores and of validation's:
    0 where they are equal, 1 where they share nothing; of equal distributions some 0.07 remains by chance. It is not a
    number before 100 scores, or where no scores of validation are known.

    Args:
        validation: scores of images of validation, by head.
    """

    def __init__(self, validation: Mapping[str, list[float]] | None = None) -> None:
        self._registry = CollectorRegistry()
        self._validation = {head: score_histogram(scores) for head, scores in (validation or {}).items()}
        self._recent: dict[str, deque[float]] = {}
        self._lock = threading.Lock()
        edges = [number / _SCORE_BINS for number in range(1, _SCORE_BINS + 1)]
        self.requests = self._counter("requests", "Answers to /predict by HTTP status", "status")
        self.dropped = self._counter("dropped_requests", "Requests that were accepted and got no prediction")
        self.seconds = self._histogram("request_seconds", "From acceptance to answer", _SECONDS)
        self.batches = self._histogram("batch_images", "Images per forward pass", (1, 2, 4, 8, 16, 32, 64))
        self.waiting = self._gauge("requests_in_flight", "Requests that were accepted and are not answered yet")
        self._scores = self._histogram("score", "Scores of images", edges, "head")
        self._drift = self._gauge("score_drift", "Distance of recent scores from those of validation, 0 to 1", "head")
        self._shares = self._gauge("validation_score_share", "Scores of validation up to le", "head", "le")
        for head, shares in self._validation.items():
            for edge, share in zip(edges, np.cumsum(shares).tolist(), strict=True):
                self._shares.labels(head, f"{edge:g}").set(share)

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(f"dinov2_{name}", meaning, labels, registry=self._registry)

    def _gauge(self, name: str, meaning: str, *labels: str) -> Gauge:
        return Gauge(f"dinov2_{name}", meaning, labels, registry=self._registry)

    def _histogram(self, name: str, meaning: str, buckets: Any, *labels: str) -> Histogram:
        return Histogram(f"dinov2_{name}", meaning, labels, buckets=buckets, registry=self._registry)

    def add_scores(self, prediction: Prediction) -> None:
        """Takes in the scores of an image."""
        for head, one in heads_of(prediction).items():
            score = one.image_score()
            if score is not None:
                self._scores.labels(head).observe(score)
                with self._lock:
                    self._recent.setdefault(head, deque(maxlen=_RECENT)).append(score)

    def drift(self, head: str = "") -> float:
        """See above."""
        with self._lock:
            recent = list(self._recent.get(head, ()))
        if head not in self._validation or len(recent) < _FEWEST:
            return math.nan
        return float(jensenshannon(score_histogram(recent), self._validation[head], base=2))

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        for head in {*self._recent, *self._validation}:
            self._drift.labels(head).set(self.drift(head))
        return generate_latest(self._registry)


class LeastSure:
    """Keeps the images that a model was least sure of, at most so many, as files for people who label. Thread-safe.

    Beside each image, as it came, lies what was predicted, ``.json``. A name begins with the certainty, so that a
    sorted folder shows the least sure first, and ends with the digest of the content, so that an image that comes twice
    is kept once. What lies there from an earlier run counts.

    Args:
        folder: made where needed.
        most: images to keep.
    """

    def __init__(self, folder: Path, most: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.most = most
        self._lock = threading.Lock()
        self._kept: dict[str, float] = {}
        for path in folder.glob("[01].[0-9][0-9][0-9][0-9]_*.json"):
            self._kept[path.stem] = float(path.stem.partition("_")[0])
        self._drop_surest()

    def add(self, data: bytes, certainty: float | None, said: Mapping[str, Any]) -> None:
        """Keeps an image, unless there are enough of which the model was less sure.

        Args:
            data: the file of the image.
            certainty: of its prediction, see `Prediction.certainty`; None is not kept.
            said: what was predicted, for the file beside it.

        Raises:
            OSError: the folder cannot be written.
        """
        if certainty is None:
            return
        stem = f"{certainty:.4f}_{hashlib.sha256(data).hexdigest()[:16]}"
        with self._lock:
            full = len(self._kept) >= self.most
            if stem in self._kept or (full and certainty >= max(self._kept.values(), default=-1.0)):
                return
            ending = next((ending for start, ending in _ENDINGS.items() if data.startswith(start)), ".img")
            write_atomically(self.folder / f"{stem}{ending}", lambda file: file.write(data))
            text = json.dumps(said, ensure_ascii=False, indent=1)
            write_atomically(self.folder / f"{stem}.json", lambda file: file.write(text.encode("utf-8")))
            self._kept[stem] = certainty
            self._drop_surest()

    def _drop_surest(self) -> None:
        while len(self._kept) > self.most:
            surest = max(self._kept, key=lambda name: self._kept[name])
            del self._kept[surest]
            for path in list(self.folder.glob(f"{surest}.*")):
                path.unlink(missing_ok=True)
