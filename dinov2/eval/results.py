"""Results of evaluators, for programs (JSON) and for people (a table)."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from dinov2.eval.metrics import ClassificationMetrics


@dataclass(frozen=True, kw_only=True)
class KnnScores:
    """Figures for one number of neighbours: over images, and over parts (all photos of one group)."""

    k: int
    image: ClassificationMetrics
    part: ClassificationMetrics


@dataclass(frozen=True, kw_only=True)
class KnnResults:
    """What k-NN says about a backbone.

    Attributes:
        scores: one entry per number of neighbours, from small to large.
        temperature: of the softmax that weighs the neighbours.
        classes: names; with two, the second is the positive one.
        num_train_images: size of the bank.
        num_train_parts: groups in the bank.
        num_val_parts_in_train: groups of the validation set that are in the bank too (a leak).
        num_val_parts_mixed: groups of the validation set whose images have different labels.
        features: what described an image: ``cls``, ``patch_mean`` or ``cls_patch_mean``.
        weights: name of the weights.
    """

    scores: tuple[KnnScores, ...]
    temperature: float
    classes: tuple[str, ...]
    num_train_images: int
    num_train_parts: int
    num_val_parts_in_train: int = 0
    num_val_parts_mixed: int = 0
    features: str = "cls"
    weights: str = ""

    @property
    def best(self) -> KnnScores:
        """The scores with the best balanced accuracy over images; of equal ones, that of fewest neighbours."""
        return max(self.scores, key=lambda scores: scores.image.balanced_accuracy)

    def as_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold; figures that do not apply are absent."""
        return {"evaluator": "knn", **_without_none(asdict(self)), "best_k": self.best.k}

    def to_json(self) -> str:
        """`as_dict` as indented text, ending in a newline."""
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The results that `as_dict` turned into ``values``."""
        settings = {name: value for name, value in values.items() if name not in ("evaluator", "best_k", "scores")}
        settings["classes"] = tuple(settings["classes"])
        scores = tuple(
            KnnScores(
                k=entry["k"],
                image=ClassificationMetrics(**entry["image"]),
                part=ClassificationMetrics(**entry["part"]),
            )
            for entry in values["scores"]
        )
        return cls(scores=scores, **settings)

    def table(self) -> str:
        """Text for people: a line on the sets, then one row per number of neighbours; ``*`` marks the best."""
        first = self.scores[0]
        names = [
            name
            for name in ("accuracy", "balanced_accuracy", "auroc", "top5")
            if getattr(first.image, name) is not None or getattr(first.part, name) is not None
        ]
        rows = [["k", *(f"{level} {name}" for level in ("image", "part") for name in names)]]
        for scores in self.scores:
            mark = "*" if scores is self.best else ""
            figures = [_show(getattr(level, name)) for level in (scores.image, scores.part) for name in names]
            rows.append([f"{scores.k}{mark}", *figures])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([self._heading(), *lines])

    def _heading(self) -> str:
        first = self.scores[0]
        return (
            f"k-NN on {self.features}, {len(self.classes)} classes, temperature {self.temperature:g}: "
            f"bank of {self.num_train_images} images ({self.num_train_parts} parts), "
            f"{first.image.count} images ({first.part.count} parts) classified; "
            f"{self.num_val_parts_in_train} parts in both sets"
        )


def _show(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_none(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, tuple | list):
        return [_without_none(inner) for inner in value]
    return value
