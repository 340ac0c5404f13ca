"""Results of evaluators, for programs (JSON and CSV) and for people (a table)."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

from dinov2.eval.metrics import Figure, FloatArray, IntArray
from dinov2.eval.result_tables import results_table
from dinov2.eval.scoring import LevelScores, Scores
from dinov2.utils.files import write_text_atomically

RESULTS_FILE = "results.json"
PREDICTIONS_FILE = "predictions.csv"
MOST_CLASS_COLUMNS = 20


class PredictionTable(Protocol):
    """What was said of every judged image, for ``predictions.csv``."""

    def to_csv(self, classes: Sequence[str]) -> str:
        """Lines with the columns ``image``, ``part``, ``label``, ``score`` and others, under a header."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """What was predicted for every image of the validation set.

    Attributes:
        paths: the files.
        group_ids: the parts.
        labels: ``[N]``, -1 where missing.
        probabilities: ``[N, C]``.
    """

    paths: Sequence[str]
    group_ids: Sequence[str]
    labels: IntArray
    probabilities: FloatArray

    def to_csv(self, classes: Sequence[str]) -> str:
        """One line per image: ``image``, ``part``, ``label``, ``prediction``, ``score``, and up to 20 classes' columns.

        Classes go by name. The score is the probability of class 1 where there are two classes, and of the predicted
        class where there are more.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        columns = [f"probability of {name}" for name in classes] if len(classes) <= MOST_CLASS_COLUMNS else []
        writer.writerow(["image", "part", "label", "prediction", "score", *columns])
        predicted = self.probabilities.argmax(axis=1)
        scores = self.probabilities[:, 1] if len(classes) == 2 else self.probabilities.max(axis=1)
        for row, (path, part) in enumerate(zip(self.paths, self.group_ids, strict=True)):
            label = int(self.labels[row])
            shown = [f"{value:.6g}" for value in self.probabilities[row]] if columns else []
            name = classes[label] if label >= 0 else ""
            writer.writerow([path, part, name, classes[int(predicted[row])], f"{scores[row]:.6g}", *shown])
        return text.getvalue()


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationResults:
    """What an evaluator says about a backbone.

    Attributes:
        evaluator: ``knn``, ``linear``, ``log_regression`` or ``retrieval``.
        settings: everything that decided the figures, as plain values (lists, no tuples).
        classes: names; with two, the second is the positive one.
        scores: by variant, such as ``k=10`` or ``C=0.1``, in the order in which they are shown.
        chosen: the variant that the evaluator chose, empty when it chose none; how is in ``settings["chosen_by"]``.
        datasets: fingerprint of each set (``train``, ``val``, ``test``).
        weights: fingerprint of the weights.
        revision: of the code.
        extra: further plain values that only this evaluator has.
        predictions: of the chosen variant; they go into a file of their own.
    """

    evaluator: str
    settings: Mapping[str, Any]
    classes: tuple[str, ...]
    scores: Mapping[str, Scores]
    chosen: str = ""
    datasets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    weights: Mapping[str, Any] = field(default_factory=dict)
    revision: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    predictions: PredictionTable | None = None

    def __post_init__(self) -> None:
        if self.chosen and self.chosen not in self.scores:
            raise ValueError(f"the chosen variant {self.chosen!r} is not among {list(self.scores)}")

    def table(self) -> str:
        """Text for people: what was evaluated, one row per variant, and the intervals of the chosen one."""
        return results_table(self.evaluator, self.classes, self.scores, self.chosen, self.settings, self.datasets)

    def as_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold, without the predictions; what does not apply is absent."""
        return {
            "evaluator": self.evaluator,
            "chosen": self.chosen,
            "classes": list(self.classes),
            "scores": {
                name: {"image": _level_as_dict(scores.image), "part": _level_as_dict(scores.part)}
                for name, scores in self.scores.items()
            },
            "settings": dict(self.settings),
            "datasets": {name: dict(values) for name, values in self.datasets.items()},
            "weights": dict(self.weights),
            "revision": self.revision,
            "extra": dict(self.extra),
        }

    def to_json(self) -> str:
        """`as_dict` as indented text, ending in a newline.

        Raises:
            ValueError: for numbers that are not finite, which JSON does not know.
        """
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The results that `as_dict` turned into ``values``; without predictions."""
        scores = {
            name: Scores(image=_level_from_dict(levels["image"]), part=_level_from_dict(levels["part"]))
            for name, levels in values["scores"].items()
        }
        rest = {name: values[name] for name in ("evaluator", "chosen", "settings", "datasets", "weights", "revision")}
        return cls(scores=scores, classes=tuple(values["classes"]), extra=values["extra"], **rest)

    def write(self, output_dir: str | Path) -> None:
        """Writes ``results.json`` and, where there are predictions, ``predictions.csv`` into a folder, made if needed.

        The results are written last: where they are, the predictions beside them are those of the same evaluation.
        """
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        text = self.to_json()
        if self.predictions is not None:
            write_text_atomically(folder / PREDICTIONS_FILE, self.predictions.to_csv(self.classes))
        else:
            (folder / PREDICTIONS_FILE).unlink(missing_ok=True)
        write_text_atomically(folder / RESULTS_FILE, text)


def _level_as_dict(scores: LevelScores) -> dict[str, Any]:
    figures = {
        name: {"value": figure.value}
        | ({"low": figure.low, "high": figure.high} if figure.low is not None and figure.high is not None else {})
        for name, figure in scores.figures.items()
    }
    confusion = {"confusion": [list(row) for row in scores.confusion]} if scores.confusion else {}
    return {"count": scores.count, "figures": figures, **confusion}


def _level_from_dict(values: Mapping[str, Any]) -> LevelScores:
    return LevelScores(
        count=values["count"],
        figures={name: Figure(**figure) for name, figure in values["figures"].items()},
        confusion=tuple(tuple(row) for row in values.get("confusion", ())),
    )
