"""Results of evaluators for the reader: tables of all, and everything that is known of each."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinov2.data.value_range import ValueRange
from dinov2.eval.learning import RANDOM, STATISTICS
from dinov2.eval.metrics.classification import MetricValue
from dinov2.eval.results import BETTER, EQUAL, RESULTS_FILE, WORSE, EvaluationResults, read_results
from dinov2.eval.yardsticks import CHANCE, IMAGE_STATISTICS, RANDOM_BACKBONE

_ESCAPES = "share of defects that are missed when {} good ones may be rejected; small is good"
MEANINGS = {
    "accuracy": ("accuracy", "share of all that is classified rightly; says little where defects are rare"),
    "balanced_accuracy": ("balanced accuracy", "mean over the classes of the share that is classified rightly"),
    "precision": ("precision", "share of alarms that are justified (several classes: mean over them)"),
    "recall": ("recall", "share of defects that are found (several classes: mean over them)"),
    "f1": ("F1", "harmonic mean of precision and recall"),
    "auroc": ("AUROC", "chance that a defective one scores higher than a good one; guessing gives 0.5"),
    "average_precision": ("average precision", "mean precision over thresholds; guessing gives the share of defects"),
    "escape_rate_at_0.1": ("escapes at 0.1 % false alarms", _ESCAPES.format("1 in 1000")),
    "escape_rate_at_1": ("escapes at 1 % false alarms", _ESCAPES.format("1 in 100")),
    "escape_rate_at_5": ("escapes at 5 % false alarms", _ESCAPES.format("1 in 20")),
    "top5": ("top 5", "share whose class is among the five most probable"),
    "map": ("mAP", "how far in front the images that belong together stand when all are ranked"),
    "pixel_accuracy": (
        "pixel accuracy",
        "share of pixels that is classified rightly; says little where defects are small",
    ),
    "mean_iou": ("mean IoU", "mean over the classes of overlap: what is both, over what is either"),
    "mean_dice": ("mean Dice", "mean over the classes of twice what is both, over the sum of the two"),
    "mean_class_accuracy": ("mean class accuracy", "mean over the classes of the share of pixels that is found"),
    "defect_iou": ("defect IoU", "overlap of what is found with the defects, all classes but the first as one"),
    "defect_dice": ("defect Dice", "the same as twice what is both, over the sum of the two"),
    "abs_rel": ("relative error", "mean of the error over the true value; small is good"),
    "sq_rel": ("squared relative error", "mean of the squared error over the true value; small is good"),
    "rmse": ("RMSE", "root of the mean squared error, in the unit of the values; small is good"),
    "rmse_log": ("RMSE of logarithms", "root of the mean squared error of natural logarithms; small is good"),
    "delta1": ("within 25 %", "share of pixels whose value is less than 1.25 times too large or too small"),
}
# What stands side by side in the tables of all results: metrics of classifications, and those of rankings.
_GROUPS = (
    ("balanced_accuracy", "auroc", "average_precision", "escape_rate_at_1", "top5"),
    ("map", "mp@1", "mp@5", "mp@10", "recall@10"),
)
KEY_METRICS = tuple(name for group in _GROUPS for name in group)
_EVALUATORS = {"knn": "k-NN", "linear": "linear classifier", "log_regression": "logistic regression"}
_TEACHER_FILE = "teacher_checkpoint.pth"
_FEW_SHOT = "few_shot"  # of a result's extra values, see `summarise_tries`
_SHOWN_ELSEWHERE = (_FEW_SHOT, "figures", "confusion", "warnings")
_MAX_METRICS = 7  # of results that have none of the key metrics
_MAX_CLASSES = 12  # of a confusion table
_MAX_ROWS_PER_RESULT = 8
_MAX_FACT_LENGTH = 400  # characters


def describe_metric(name: str) -> tuple[str, str]:
    """What people call a metric, and one line on what it says, which is empty for an unknown one."""
    if name in MEANINGS:
        return MEANINGS[name]
    if match := re.fullmatch(r"(mp|recall|hit)@(\d+)", name):
        nearest = "of the nearest" + ("" if match[2] == "1" else f" {match[2]}")
        if match[1] == "mp":
            return f"precision {nearest}", "share of the nearest images that belong to the query"
        if match[1] == "hit":
            return f"hit {nearest}", "share of the queries with an image that belongs to them among the nearest"
        return f"recall {nearest}", "share of the images which belong to the query that are among the nearest"
    return name.replace("_", " "), ""


def weights_name(weights: Mapping[str, Any]) -> str:
    """Short name of the evaluated weights."""
    path = Path(str(weights.get("path", "")))
    if not path.name:
        return "random weights" if weights.get("random") else "weights not named"
    if path.name == _TEACHER_FILE:  # all teachers of a run have this name
        return f"teacher of {path.parent.name}"
    return "/".join(path.parts[-2:]).removesuffix(".pth")


@dataclass(frozen=True)
class Confusion:
    """How many of each class were called what: rows of (class, counts), rightly classified ones on the diagonal."""

    level: str
    rows: list[tuple[str, Sequence[int]]]


@dataclass(frozen=True)
class FoundResults:
    """A results file for the reader.

    Attributes:
        folder: of the file.
        name: of the folder in the report.
        content: of the file.
    """

    folder: Path
    name: str
    content: EvaluationResults

    @property
    def evaluator(self) -> str:
        """What people call the evaluator."""
        return _EVALUATORS.get(self.content.evaluator, self.content.evaluator)

    @property
    def weights(self) -> str:
        """What people call the weights."""
        return weights_name(self.content.weights)

    @property
    def training_iteration(self) -> int | None:
        """Iteration of the teacher that a run evaluated by itself; None for any other result."""
        match = re.fullmatch(r"training_(\d+)", self.folder.name)
        return int(match[1]) if match else None

    def is_of(self, run_dir: Path) -> bool:
        """Whether it was evaluated what that run made: its weights lie in the folder, or did before that was moved."""
        path = Path(str(self.content.weights.get("path", "")))
        inside = run_dir.resolve()
        return bool(path.name) and (path.resolve().is_relative_to(inside) or f"/{inside.name}/eval/" in f"/{path}")

    @property
    def comparison(self) -> dict[str, Any]:
        """The chosen variant beside what it has to beat, as `did_it_learn` takes it; empty where that is not known."""
        rows = [one for one in self.content.comparisons if one.variant == self.content.chosen]
        level = "part" if any(one.level == "part" for one in rows) else "image"
        beside = {one.yardstick: one for one in rows if one.level == level}
        names = {IMAGE_STATISTICS: STATISTICS, RANDOM_BACKBONE: RANDOM}
        told = [beside[yardstick] for yardstick in names if yardstick in beside]
        if not told:
            return {}
        metric, chance = told[0].metric, beside.get(CHANCE)
        own = getattr(self.content.scores[self.content.chosen], level).metrics.get(metric)
        silent = [one.verdict for one in told if one.verdict not in (BETTER, WORSE, EQUAL)]
        return {
            "evaluator": self.evaluator,
            "metric": f"{level}_{metric}",
            "variant": f"{self.content.chosen}, {self.weights}",
            "score": told[0].value,
            "low": None if own is None else own.low,
            "high": None if own is None else own.high,
            "chance": chance.reference if chance is not None and chance.metric == metric else None,
            "untold": silent[0] if silent else "",
        } | {
            names[one.yardstick]: {
                "score": one.reference,
                "gain": one.value - one.reference,
                "low": one.low,
                "high": one.high,
            }
            for one in told
        }

    @property
    def value_range(self) -> ValueRange | None:
        """The range of values that the images were read with, one for all sets; None where their files say it."""
        try:
            found = (values.get("value_range") for values in self.content.datasets.values())
            return next((ValueRange.of(ends) for ends in found if ends), None)
        except (AttributeError, KeyError, IndexError, TypeError, ValueError):  # no evaluator has written that
            return None

    @property
    def counts(self) -> str:
        """Sizes of the datasets."""
        return ", ".join(
            f"{name}: {values.get('num_images', '?')} images of {values.get('num_parts', '?')} parts"
            for name, values in self.content.datasets.items()
        )

    @property
    def shown_variants(self) -> list[str]:
        """The chosen variant and what it scored on further sets; some of all where none was chosen."""
        chosen, scores = self.content.chosen, self.content.scores
        if not chosen:
            return list(scores)[:_MAX_ROWS_PER_RESULT]
        return [chosen, *(name for name in scores if name.startswith(f"{chosen} on "))]

    def metrics_of(self, variant: str) -> list[tuple[str, MetricValue | None, MetricValue | None]]:
        """Name of every metric, and its value per image and per part."""
        image, part = self.content.scores[variant].image.metrics, self.content.scores[variant].part.metrics
        return [(name, image.get(name), part.get(name)) for name in dict.fromkeys([*image, *part])]

    def confusions(self, variant: str) -> list[Confusion]:
        """Tables of few classes, per image and, where that differs, per part."""
        scores, classes = self.content.scores[variant], self.content.classes
        levels = {"images": scores.image, "parts": scores.part}
        if scores.image.count == scores.part.count and scores.image.confusion == scores.part.confusion:
            del levels["parts"]
        return [
            Confusion(level, list(zip(classes, scored.confusion, strict=True)))
            for level, scored in levels.items()
            if 0 < len(scored.confusion) == len(classes) <= _MAX_CLASSES
        ]

    def variant_table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows with the key metrics of all variants, per image and, where they differ, per part."""
        scores = self.content.scores
        levels = {"image": {variant: scored.image.metrics for variant, scored in scores.items()}}
        if any(scored.part.count != scored.image.count for scored in scores.values()):
            levels["part"] = {variant: scored.part.metrics for variant, scored in scores.items()}
        columns = [
            (level, name)
            for level, scored in levels.items()
            for name in KEY_METRICS
            if any(name in metrics for metrics in scored.values())
        ]
        rows = []
        for variant in scores:
            found = [levels[level][variant].get(name) for level, name in columns]
            title = f"{variant} (chosen)" if variant == self.content.chosen else variant
            rows.append([title, *("-" if metric is None else f"{metric.value:.3f}" for metric in found)])
        return ["variant", *(f"{describe_metric(name)[0]} per {level}" for level, name in columns)], rows

    def few_shot_tables(self) -> list[tuple[str, list[str], list[tuple[str, list[Mapping[str, Any] | None]]]]]:
        """Level, metrics, and rows of (variant, spreads over the tries) of the key metrics of few-shot tries."""
        tries: Mapping[str, Any] = self.content.extra.get(_FEW_SHOT, {})
        levels = ["image", "part"] if any(found["image"] != found["part"] for found in tries.values()) else ["image"]
        tables = []
        for level in levels if tries else ():
            names = [name for name in KEY_METRICS if any(name in found[level] for found in tries.values())]
            rows = [(variant, [found[level].get(name) for name in names]) for variant, found in tries.items()]
            tables.append((level, names, rows))
        return tables

    @property
    def facts(self) -> list[tuple[str, str]]:
        """Everything else that the file says, as text."""
        content = self.content
        facts: list[tuple[str, Any]] = [("classes", ", ".join(content.classes))]
        facts.append(("revision of the code", content.revision or "not known"))
        facts += [(f"weights: {name}", value) for name, value in content.weights.items()]
        facts += [(f"setting: {name}", value) for name, value in content.settings.items()]
        for name, values in content.datasets.items():
            facts += [(f"{name} set: {key}", value) for key, value in values.items() if key != "classes"]
        facts += [
            (name.replace("_", " "), value) for name, value in content.extra.items() if name not in _SHOWN_ELSEWHERE
        ]
        return [(name, _plain(value)) for name, value in facts]


def _plain(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    if len(text) > _MAX_FACT_LENGTH:
        return f"{text[:_MAX_FACT_LENGTH]} … (the rest is in {RESULTS_FILE})"
    return text or "(empty)"


def find_results(run_dir: Path, others: Sequence[Path]) -> tuple[list[FoundResults], list[tuple[str, str]]]:
    """Reads every results file in the run's folder and in other folders, and below them, each once.

    Returns:
        The results, first those that a run wrote about itself while training, in the order of their iterations; and
        the name of every file that cannot be read with the reason.
    """
    found: list[FoundResults] = []
    unreadable: list[tuple[str, str]] = []
    seen: set[Path] = set()
    for root in (run_dir, *others):
        for path in sorted(root.rglob(RESULTS_FILE)):
            if path.resolve() in seen or not path.is_file():
                continue
            seen.add(path.resolve())
            inside = path.parent.relative_to(root).as_posix()
            name = inside if root == run_dir and inside != "." else (root / inside).as_posix()
            try:
                content = read_results(path)
                _check_numbers(content)
                found.append(FoundResults(path.parent, name, content))
            except (OSError, ValueError) as error:
                unreadable.append((name, f"{type(error).__name__}: {error}"))
    found.sort(key=lambda one: (one.training_iteration is None, one.training_iteration or 0, one.name))
    return found, unreadable


def _check_numbers(content: EvaluationResults) -> None:
    """Raises ValueError where the page would show as a number what is none."""
    numbers: list[tuple[str, Any]] = []
    for scores in content.scores.values():
        for metrics in (scores.image.metrics, scores.part.metrics):
            numbers += [
                (name, one) for name, metric in metrics.items() for one in (metric.value, metric.low, metric.high)
            ]
    for one in content.comparisons:
        numbers += [(one.metric, value) for value in (one.value, one.reference, one.low, one.high)]
    for name, value in numbers:
        if value is not None and not isinstance(value, int | float):
            raise ValueError(f"{name} is {value!r}, and no number")


def compared_results(found: Sequence[FoundResults], run_dir: Path) -> list[dict[str, Any]]:
    """What results say of the best and the newest of a run's teachers that have any; see `FoundResults.comparison`."""
    ages: dict[float, list[dict[str, Any]]] = {}
    for one in found:
        if one.is_of(run_dir) and (comparison := one.comparison):
            match = re.search(r"training_(\d+)$", str(Path(one.content.weights["path"]).parent))
            ages.setdefault(float(match[1]) if match else -1.0, []).append(comparison)
    return [one for age in {-1.0, max(ages, default=-1.0)} for one in ages.get(age, ())]


def main_results(found: Sequence[FoundResults]) -> list[FoundResults]:
    """Those that the reader wants in detail: of the teachers that a run evaluated by itself only the last."""
    last = max((one.training_iteration for one in found if one.training_iteration is not None), default=None)
    return [one for one in found if one.training_iteration in (None, last)]


@dataclass(frozen=True)
class Comparison:
    """A table of results of one kind; its metrics are per part where a part has several images, else per image.

    Attributes:
        names: of the metrics.
        rows: results, variant, what was counted, and its metrics.
    """

    names: list[str]
    rows: list[tuple[FoundResults, str, str, Mapping[str, MetricValue]]]


def compare_results(found: Sequence[FoundResults]) -> list[Comparison]:
    """The tables of all results: one for those of each kind, as a table with a column for everything does not fit."""
    comparisons = {group: Comparison([], []) for group in (*_GROUPS, ())}
    for one in found:
        for variant in one.shown_variants:
            image, part = one.content.scores[variant].image, one.content.scores[variant].part
            by_part = part.count != image.count and bool(part.metrics)
            level, counted = (part, f"{part.count} parts") if by_part else (image, f"{image.count} images")
            group = next((group for group in _GROUPS if not level.metrics.keys().isdisjoint(group)), ())
            comparisons[group].rows.append((one, variant, counted, level.metrics))
    for group, comparison in comparisons.items():
        there = dict.fromkeys(name for *_, metrics in comparison.rows for name in metrics)
        comparison.names.extend([name for name in group if name in there] if group else list(there)[:_MAX_METRICS])
    return [comparison for comparison in comparisons.values() if comparison.rows]
