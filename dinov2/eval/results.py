"""Results of evaluators: scores with their origins as JSON and CSV files, and as tables."""

import csv
import io
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Protocol, Self

from dinov2.distributed import is_main_process
from dinov2.eval.features import TRAIN, VAL
from dinov2.eval.metrics.classification import LEVELS, FloatArray, IntArray, LevelScores, MetricValue, Scores
from dinov2.utils.files import HeldFolder, output_folder, write_text_atomically
from dinov2.utils.untrusted_text import table_cell

logger = logging.getLogger("dinov2")

RESULTS_FILE = "results.json"
PREDICTIONS_FILE = "predictions.csv"

SHORT = {
    "balanced_accuracy": "balanced",
    "average_precision": "ap",
    "escape_rate_at_0.1": "escape@0.1%",
    "escape_rate_at_1": "escape@1%",
    "escape_rate_at_5": "escape@5%",
    "false_alarms_at_zero_escapes": "alarms@0escapes",
    "pixel_average_precision": "pixel_ap",
}
MAX_CLASSES_SHOWN = 10
MAX_CLASS_COLUMNS = 20
MAX_VARIANTS = 12  # of one backbone; of more, as of the 52 classifiers of a grid, the chosen one is shown
METRIC_NAMES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "auroc": "auroc",
    "average_precision": "average precision",
    "map": "map",
    "recall@1": "recall@1",
    "false_alarms_at_zero_escapes": "false alarms at zero escapes",
    "pixel_auroc": "pixel auroc",
    "pixel_average_precision": "pixel average precision",
    "pixel_aupro_0.3": "aupro at 0.3",
    "pixel_aupro_0.05": "aupro at 0.05",
    "pixel_f1_max": "pixel f1 max",
    "pixel_segf1": "segf1",
}
MAX_VARIANTS_WITH_INTERVALS = 4
FEW_PARTS = 10
BETTER, WORSE, EQUAL = "better", "worse", "not distinguishable"  # than, than, from a yardstick


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A variant beside a yardstick.

    Attributes:
        variant: whose scores are compared.
        yardstick: with which of the yardsticks of the same set.
        level: ``image`` or ``part``.
        metric: that is compared.
        value: of the variant.
        reference: of the yardstick.
        low: lower end of the 95 % interval of the difference; None where there is none.
        high: upper end.
        verdict: ``better``, ``worse``, ``not distinguishable``, or why nothing can be said.
    """

    variant: str
    yardstick: str
    level: str
    metric: str
    value: float
    reference: float
    low: float | None
    high: float | None
    verdict: str

    @property
    def sentence(self) -> str:
        """The verdict as it is said, such as "not distinguishable from chance"."""
        link = {BETTER: "than", WORSE: "than", EQUAL: "from"}.get(self.verdict)
        return f"{self.verdict} {link} {self.yardstick}" if link else self.verdict


def _results_table(
    evaluator: str,
    classes: Sequence[str],
    scores: Mapping[str, Scores],
    yardsticks: Mapping[str, Scores],
    chosen: str,
    settings: Mapping[str, Any],
    datasets: Mapping[str, Mapping[str, Any]],
) -> str:
    """The metrics of all variants, and of the chosen one (of all where none is) the intervals; see `EvaluationResults`.

    Parts are shown only where a part has several images. Yardsticks stand below the variants.
    """
    described = f" on {settings['features']}" if "features" in settings else ""
    sets = [f"{name}: {found['num_images']} images of {found['num_parts']} parts" for name, found in datasets.items()]
    kinds = [f"{len(classes)} classes"] if classes else []
    blocks = [f"{evaluator}{described}: " + ", ".join([*kinds, *sets])]
    parts_differ = any(variant.part.count != variant.image.count for variant in scores.values())
    levels = LEVELS if parts_differ else LEVELS[:1]
    for level in levels:
        rows = {**scores, **yardsticks}
        shown: dict[str, LevelScores] = {name: getattr(variant, level) for name, variant in rows.items()}
        # Of rankings, what is scored per image are queries; images that have nothing to find ask nothing.
        what = ("query", "queries") if evaluator == "retrieval" and level == "image" else (level, f"{level}s")
        blocks.append(_level_table(shown, *what, chosen))
    for name in [chosen] if chosen else list(scores)[:MAX_VARIANTS_WITH_INTERVALS]:
        why = f", chosen by {settings['chosen_by']}" if name == chosen and "chosen_by" in settings else ""
        parts = scores[name].part.count
        blocks += [
            _details(f"{name}{why}, per {level}", getattr(scores[name], level), parts, classes) for level in levels
        ]
    return "\n".join(block for block in blocks if block)


def _level_table(shown: Mapping[str, LevelScores], what: str, several: str, chosen: str) -> str:
    """A row per variant that has metrics; each says how much was scored where that differs. Empty without any."""
    shown = {variant: scored for variant, scored in shown.items() if scored.metrics}
    names = list(dict.fromkeys(name for scored in shown.values() for name in scored.metrics))
    counts = {scored.count for scored in shown.values()}
    same = len(counts) == 1
    header = [f"per {what} ({min(counts)})"] if same else [f"per {what}", several]
    rows = [[*header, *(SHORT.get(name, name) for name in names)]] if names else []
    for variant, scored in shown.items():
        cells = [f"{scored.metrics[name].value:.4f}" if name in scored.metrics else "-" for name in names]
        marked = f"{variant}*" if variant == chosen else variant
        rows.append([marked, *([] if same else [str(scored.count)]), *cells])
    return _align(rows) if rows else ""


def _comparison_table(comparisons: Sequence[Comparison]) -> str:
    """Every variant beside its yardsticks, in words."""
    blocks = []
    for variant, level in dict.fromkeys((one.variant, one.level) for one in comparisons):
        rows = [
            [
                f"  {one.yardstick}",
                SHORT.get(one.metric, one.metric),
                f"{one.value:.4f}",
                f"{one.reference:.4f}",
                "" if one.low is None or one.high is None else f"[{one.low:+.4f}, {one.high:+.4f}]",
                one.sentence,
            ]
            for one in comparisons
            if (one.variant, one.level) == (variant, level)
        ]
        title = f"{variant} beside what has learnt nothing, per {level}; 95 % intervals of the difference, over parts"
        blocks += [title, _align([["  beside", "metric", "score", "yardstick", "difference", "verdict"], *rows])]
    return "\n".join(blocks)


def spread_table(few_shot: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]) -> str:
    """Mean, deviation and range of the metrics of several tries as text; empty where there are none.

    Args:
        few_shot: by variant, what `summarise_tries` gives.
    """
    blocks = []
    for level in LEVELS if few_shot else ():
        spreads = {variant: levels[level] for variant, levels in few_shot.items()}
        rows = [[f"per {level}, mean ± std [min, max] over tries", *spreads]]
        for name in dict.fromkeys(name for found in spreads.values() for name in found):
            cells = []
            for found in spreads.values():
                cells.append("-")
                if name in found:
                    mean, std, values = (found[name][key] for key in ("mean", "std", "values"))
                    cells[-1] = f"{mean:.3f} ± {std:.3f} [{min(values):.3f}, {max(values):.3f}]"
            rows.append([f"  {SHORT.get(name, name)}", *cells])
        blocks.append(_align(rows))
    return "\n".join(blocks)


def _side_by_side(title: str, columns: Mapping[str, Scores]) -> str:
    """The metrics of one variant on several sets with their intervals, per image and per part, as text."""
    blocks = []
    for level in LEVELS:
        scored: dict[str, LevelScores] = {name: getattr(scores, level) for name, scores in columns.items()}
        rows = [[f"{title}, per {level}", *(f"{name} ({found.count})" for name, found in scored.items())]]
        for name in dict.fromkeys(name for found in scored.values() for name in found.metrics):
            rows.append([f"  {name}", *(_show_metric(found.metrics.get(name)) for found in scored.values())])
        blocks.append(_align(rows))
    return "\n".join(blocks)


def _show_metric(metric: MetricValue | None, *, digits: int = 4, intervals: bool = True) -> str:
    """The value and its interval as text; a dash where there is none."""
    if metric is None:
        return "-"
    if not intervals or metric.low is None or metric.high is None:
        return f"{metric.value:.{digits}f}"
    return f"{metric.value:.{digits}f} [{metric.low:.{digits}f}, {metric.high:.{digits}f}]"


def mean_scores(tries: Sequence[Scores]) -> Scores:
    """The mean metrics of several tries, each over the tries that have it; without intervals and confusion."""
    levels = {
        level: LevelScores(
            count=getattr(tries[0], level).count,
            metrics={name: MetricValue(value=spread["mean"]) for name, spread in spreads.items()},
        )
        for level, spreads in summarise_tries(tries).items()
    }
    return Scores(**levels)


def summarise_tries(tries: Sequence[Scores]) -> dict[str, dict[str, dict[str, Any]]]:
    """Mean and spread of the metrics of several tries.

    Returns:
        Per level (``image``, ``part``) and metric: ``mean``, ``std`` (of a sample; 0 for one try) and the ``values``
        of the tries that have it.
    """
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for level in LEVELS:
        found = [getattr(scores, level).metrics for scores in tries]
        summary[level] = {}
        for name in dict.fromkeys(name for metrics in found for name in metrics):
            values = [metrics[name].value for metrics in found if name in metrics]
            std = stdev(values) if len(values) > 1 else 0.0
            summary[level][name] = {"mean": fmean(values), "std": std, "values": values}
    return summary


def _align(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines whose columns stand below each other; the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def _details(title: str, scores: LevelScores, num_parts: int, classes: Sequence[str]) -> str:
    """Metrics with their intervals from so many parts, and the confusion of few classes."""
    blocks = []
    if any(metric.low is not None for metric in scores.metrics.values()):
        rows = []
        for name, metric in scores.metrics.items():
            value, _, bounds = _show_metric(metric).partition(" ")
            rows.append([f"  {SHORT.get(name, name)}", value, bounds])
        few = f" (only {num_parts}: resamples of so few look more certain than they are)"
        blocks = [f"{title}, 95 % intervals over parts{few if num_parts < FEW_PARTS else ''}", _align(rows)]
    if scores.confusion and len(scores.confusion) <= MAX_CLASSES_SHOWN and len(classes) == len(scores.confusion):
        rows = [["  label, predicted as", *classes]]
        rows += [[f"  {name}", *map(str, row)] for name, row in zip(classes, scores.confusion, strict=True)]
        blocks += [_align(rows)] if blocks else [title, _align(rows)]
    return "\n".join(blocks)


class PredictionTable(Protocol):
    """What was predicted for every evaluated image, for ``predictions.csv``."""

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
        classes: names by label, where they are others than those of the results.
    """

    paths: Sequence[str]
    group_ids: Sequence[str]
    labels: IntArray
    probabilities: FloatArray
    classes: tuple[str, ...] = ()

    def to_csv(self, classes: Sequence[str]) -> str:
        """One line per image: ``image``, ``part``, ``label``, ``prediction``, ``score``, and up to 20 classes' columns.

        Classes go by name. The score is the probability of class 1 where there are two classes, and of the predicted
        class where there are more.
        """
        classes = self.classes or classes
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        columns = [f"probability of {name}" for name in classes] if len(classes) <= MAX_CLASS_COLUMNS else []
        writer.writerow(map(table_cell, ["image", "part", "label", "prediction", "score", *columns]))
        predicted = self.probabilities.argmax(axis=1)
        scores = self.probabilities[:, 1] if len(classes) == 2 else self.probabilities.max(axis=1)
        for row, (path, part) in enumerate(zip(self.paths, self.group_ids, strict=True)):
            label = int(self.labels[row])
            shown = [f"{value:.6g}" for value in self.probabilities[row]] if columns else []
            name = classes[label] if label >= 0 else ""
            cells = (path, part, name, classes[int(predicted[row])], f"{scores[row]:.6g}", *shown)
            writer.writerow(map(table_cell, cells))
        return text.getvalue()


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationResults:
    """Scores of a backbone, and what they come from.

    Attributes:
        evaluator: ``knn``, ``linear``, ``log_regression``, ``retrieval`` or ``anomaly``.
        settings: everything that decided the metrics, as plain values (lists, no tuples).
        classes: names; with two, the second is the positive one.
        scores: by variant, such as ``k=10`` or ``C=0.1``, in the order in which they are shown.
        chosen: the variant that the evaluator chose, empty when it chose none; how is in ``settings["chosen_by"]``.
        datasets: fingerprint of each set (``train``, ``val``, ``test``).
        weights: fingerprint of the weights.
        revision: of the code.
        extra: further plain values that only this evaluator has.
        predictions: of the chosen variant; they go into a file of their own.
        test_predictions: of the same, by the name of a test set, whose scores are the variant ``CHOSEN on NAME``.
        shown: variants in the table; empty for all.
        yardsticks: scores that need no backbone, or only a random one; those of a test set are ``NAME on SET``.
        comparisons: of the chosen variant with them.
        notes: lines that the table shows below its title, such as a class that no image shows.
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
    test_predictions: Mapping[str, Predictions] = field(default_factory=dict)
    shown: Sequence[str] = ()
    yardsticks: Mapping[str, Scores] = field(default_factory=dict)
    comparisons: Sequence[Comparison] = ()
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.chosen and self.chosen not in self.scores:
            raise ValueError(f"the chosen variant {self.chosen!r} is not among {list(self.scores)}")

    def table(self) -> str:
        """Text for people: what was evaluated, a row per variant, the intervals of the chosen one, test sets, tries."""
        shown = {name: self.scores[name] for name in self.shown or self.scores}
        tests = {name: variant_on(self.chosen, name) for name in self.test_predictions}
        columns = {name: self.scores[variant] for name, variant in {VAL: self.chosen, **tests}.items() if tests}
        blocks = (
            _results_table(
                self.evaluator, self.classes, shown, self.yardsticks, self.chosen, self.settings, self.datasets
            ),
            _comparison_table(self.comparisons),
            "\n".join(self.notes),
            _side_by_side(self.chosen, columns) if tests else "",
            spread_table(self.extra.get("few_shot", {})),
        )
        return "\n".join(block for block in blocks if block)

    def as_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold, without the predictions; what does not apply is absent."""
        return {
            "evaluator": self.evaluator,
            "chosen": self.chosen,
            "classes": list(self.classes),
            "scores": _scores_as_dict(self.scores),
            "settings": dict(self.settings),
            "datasets": {name: dict(values) for name, values in self.datasets.items()},
            "weights": dict(self.weights),
            "revision": self.revision,
            "extra": dict(self.extra),
            "yardsticks": _scores_as_dict(self.yardsticks),
            "comparisons": [asdict(comparison) for comparison in self.comparisons],
            "notes": list(self.notes),
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
        rest = {name: values[name] for name in ("evaluator", "chosen", "settings", "datasets", "weights", "revision")}
        return cls(
            scores=_scores_from_dict(values["scores"]),
            classes=tuple(values["classes"]),
            extra=values["extra"],
            yardsticks=_scores_from_dict(values.get("yardsticks", {})),  # files of earlier versions have none
            comparisons=[Comparison(**comparison) for comparison in values.get("comparisons", ())],
            notes=tuple(values.get("notes", ())),
            **rest,
        )

    def write(self, output_dir: str | Path | HeldFolder) -> None:
        """Writes ``results.json`` and, where there are predictions, ``predictions.csv`` into a folder, made if needed.

        Those of a test set go into ``predictions_NAME.csv``. The results are written last: where they are, the
        predictions beside them are those of the same evaluation.
        """
        folder = output_folder(output_dir)
        text = self.to_json()
        for name, predictions in self.test_predictions.items():
            file = PREDICTIONS_FILE.replace(".", f"_{name.replace(' ', '_')}.")
            write_text_atomically(folder / file, predictions.to_csv(self.classes))
        if self.predictions is not None:
            write_text_atomically(folder / PREDICTIONS_FILE, self.predictions.to_csv(self.classes))
        else:
            (folder / PREDICTIONS_FILE).unlink(missing_ok=True)
        write_text_atomically(folder / RESULTS_FILE, text)

    def publish(self, output_dir: str | Path | HeldFolder | None) -> None:
        """The main process logs the table and, where there is a folder, writes the results into it.

        Raises:
            OSError: the results cannot be written, or the folder is not the one that was held.
        """
        if is_main_process():
            logger.info("%s", self.table())
            if output_dir is not None:
                self._warn_of_others(Path(output_dir) / RESULTS_FILE)
                self.write(output_dir)

    def _warn_of_others(self, path: Path) -> None:
        """Warns of results of something else that are about to be replaced."""
        try:
            former = json.loads(path.read_text(encoding="utf-8"))
            origins = {name: former.get(name) for name in ("evaluator", "weights", "datasets")}
        except FileNotFoundError:
            return
        except (OSError, ValueError, AttributeError, RecursionError):
            logger.warning("%s cannot be read and is replaced", path)
            return
        if differing := [name for name, value in origins.items() if value != getattr(self, name)]:
            of = former.get("evaluator")
            logger.warning(
                "%s held results of another evaluation (%s, of %s), which are replaced: give every evaluation a folder "
                "of its own (--output-dir)",
                *(path, of, f"other {' and '.join(differing)}" if differing != ["evaluator"] else "the same weights"),
            )


def variant_on(variant: str, name: str) -> str:
    """Name of a variant's scores on one of the evaluated sets."""
    return variant if name == VAL else f"{variant} on {name}"


def check_test_names(names: Iterable[str]) -> None:
    """Raises ValueError for a name of a test set that is taken, or cannot be part of a file name."""
    for name in names:
        if name in (TRAIN, VAL) or not name or Path(name).name != name:
            raise ValueError(f"a test set cannot be named {name!r}")


def _scores_as_dict(scores: Mapping[str, Scores]) -> dict[str, Any]:
    return {
        name: {"image": _level_as_dict(scored.image), "part": _level_as_dict(scored.part)}
        for name, scored in scores.items()
    }


def _scores_from_dict(values: Mapping[str, Any]) -> dict[str, Scores]:
    return {
        name: Scores(image=_level_from_dict(levels["image"]), part=_level_from_dict(levels["part"]))
        for name, levels in values.items()
    }


def _level_as_dict(scores: LevelScores) -> dict[str, Any]:
    metrics = {
        name: {key: value for key, value in asdict(metric).items() if value is not None}
        for name, metric in scores.metrics.items()
    }
    confusion = {"confusion": [list(row) for row in scores.confusion]} if scores.confusion else {}
    return {"count": scores.count, "figures": metrics, **confusion}  # the file's word for metrics


def _level_from_dict(values: Mapping[str, Any]) -> LevelScores:
    return LevelScores(
        count=values["count"],
        metrics={name: MetricValue(**metric) for name, metric in values["figures"].items()},
        confusion=tuple(tuple(row) for row in values.get("confusion", ())),
    )


def read_results(path: Path) -> EvaluationResults:
    """Reads ``results.json``, without predictions.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or something else.
    """
    try:
        return EvaluationResults.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a result of an evaluator: {error!r:.300}") from error


def has_results(folder: Path) -> bool:
    """Whether an evaluation has left its results in a folder, readable, with the predictions that belong to them."""
    try:
        read_results(folder / RESULTS_FILE)
        return (folder / PREDICTIONS_FILE).stat().st_size > 0
    except (OSError, ValueError):
        return False


def read_named_results(pairs: Sequence[str]) -> dict[str, EvaluationResults]:
    """Reads ``name=folder`` pairs, each folder holding the results of an evaluator.

    Raises:
        ValueError: a word is no such pair, or a file is not an evaluator's result.
        FileNotFoundError: a folder holds no results.
    """
    results = {}
    for pair in pairs:
        name, equals, folder = pair.partition("=")
        if not equals or not name or not folder:
            raise ValueError(f"expected name=folder, found {pair!r}")
        path = Path(folder) / RESULTS_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no {RESULTS_FILE}: run an evaluator with --output-dir {folder}")
        results[name] = read_results(path)
    return results


def compare_results(
    results: Mapping[str, EvaluationResults], *, intervals: bool = False, yardsticks: bool = False
) -> str:
    """One row per backbone and variant, ``*`` marks the chosen one; parts are shown where a part has several images.

    Of more than `MAX_VARIANTS` variants only the chosen one is shown, on every set that it was evaluated on.

    Args:
        results: by name of the backbone; at least one.
        intervals: shows 95 % intervals behind the metrics that have one.
        yardsticks: shows what each is compared with below it, and how it compares.
    """
    every = []
    verdicts: dict[str, list[str]] = {}
    for name, found in results.items():
        chosen, few = found.chosen, len(found.scores) <= MAX_VARIANTS
        for variant, scores in found.scores.items():
            if few or not chosen or variant == chosen or variant.startswith(f"{chosen} on "):
                every.append((name, variant, scores))
        if yardsticks:
            every += [("", yardstick, scores) for yardstick, scores in found.yardsticks.items()]
            for one in found.comparisons:
                title = f"{name}, {one.variant}, {one.level} {METRIC_NAMES.get(one.metric, one.metric)}"
                verdicts.setdefault(title, []).append(one.sentence)
    levels = ("image", "part") if any(scores.part.count != scores.image.count for *_, scores in every) else ("image",)
    present = {metric for *_, scores in every for metric in (*scores.image.metrics, *scores.part.metrics)}
    columns = [
        (level, metric)
        for level in levels
        for metric in METRIC_NAMES
        if metric in present and not (level == "part" and metric.startswith("pixel_"))
    ]
    rows = [["backbone", "variant", *(f"{level} {METRIC_NAMES[metric]}" for level, metric in columns)]]
    for name, variant, scores in every:
        mark = "*" if name and variant == results[name].chosen else ""
        by_level = {"image": scores.image.metrics, "part": scores.part.metrics}
        values = [_show_metric(by_level[level].get(metric), digits=3, intervals=intervals) for level, metric in columns]
        rows.append([name, f"{variant}{mark}", *values])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    left_out = sum(len(found.scores) for found in results.values()) - sum(name != "" for name, *_ in every)
    notes = [f"({left_out} variants that were not chosen are left out)"] if left_out else []
    return "\n".join([*lines, *notes, *(f"{title}: {', '.join(said)}" for title, said in verdicts.items())])
