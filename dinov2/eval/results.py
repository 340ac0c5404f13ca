"""Results of evaluators, for programs (JSON and CSV) and for people (a table)."""

import csv
import hashlib
import io
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Protocol, Self

from dinov2.data.datasets.base import MISSING_TARGET, ImageDataset
from dinov2.distributed import all_gather_objects, is_main_process
from dinov2.eval.metrics.classification import FloatArray, IntArray, LevelScores, MetricValue, Scores
from dinov2.models.released import fetch_weights
from dinov2.utils.files import file_digest, write_text_atomically

SHORT = {
    "balanced_accuracy": "balanced",
    "average_precision": "ap",
    "escape_rate_at_0.1": "escape@0.1%",
    "escape_rate_at_1": "escape@1%",
    "escape_rate_at_5": "escape@5%",
}
LEVELS = ("image", "part")
MOST_CLASSES_SHOWN = 10
MOST_VARIANTS_WITH_INTERVALS = 4


def results_table(
    evaluator: str,
    classes: Sequence[str],
    scores: Mapping[str, Scores],
    chosen: str,
    settings: Mapping[str, Any],
    datasets: Mapping[str, Mapping[str, Any]],
) -> str:
    """The figures of all variants, and of the chosen one (of all where none is) the intervals; see `EvaluationResults`.

    Parts are shown only where a part has several photos.
    """
    blocks = [_heading(evaluator, classes, settings, datasets)]
    parts_differ = any(variant.part.count != variant.image.count for variant in scores.values())
    levels = ("image", "part") if parts_differ else ("image",)
    for level in levels:
        shown = {name: variant.image if level == "image" else variant.part for name, variant in scores.items()}
        blocks.append(_figures_block(level, shown, chosen))
    detailed = [chosen] if chosen else list(scores)[:MOST_VARIANTS_WITH_INTERVALS]
    for name in detailed:
        why = f", chosen by {settings['chosen_by']}" if name == chosen and "chosen_by" in settings else ""
        for level in levels:
            scored = scores[name].image if level == "image" else scores[name].part
            blocks.append(_detail_block(f"{name}{why}, per {level}", scored, classes))
    return "\n".join(block for block in blocks if block)


def spread_table(few_shot: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]) -> str:
    """Mean, deviation and range of the figures of several tries as text; empty where there are none.

    Args:
        few_shot: by variant, what `summarise_tries` says.
    """
    blocks = []
    for level in ("image", "part") if few_shot else ():
        spreads = {variant: levels[level] for variant, levels in few_shot.items()}
        names = dict.fromkeys(name for figures in spreads.values() for name in figures)
        rows = [[f"per {level}, mean ± std [min, max] over tries", *spreads]]
        for name in names:
            rows.append(
                [f"  {SHORT.get(name, name)}", *(_spread_cell(figures.get(name)) for figures in spreads.values())]
            )
        blocks.append("\n".join(align(rows)))
    return "\n".join(blocks)


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


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines whose columns stand below each other; the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


def _heading(
    evaluator: str, classes: Sequence[str], settings: Mapping[str, Any], datasets: Mapping[str, Mapping[str, Any]]
) -> str:
    described = f" on {settings['features']}" if "features" in settings else ""
    sets = [
        f"{name}: {values['num_images']} images of {values['num_parts']} parts" for name, values in datasets.items()
    ]
    kinds = [f"{len(classes)} classes"] if classes else []
    return f"{evaluator}{described}: " + ", ".join([*kinds, *sets])


def _figures_block(level: str, scores: Mapping[str, LevelScores], chosen: str) -> str:
    names = list(dict.fromkeys(name for scored in scores.values() for name in scored.metrics))
    if not names:
        return ""
    count = next(iter(scores.values())).count
    rows = [[f"per {level} ({count})", *(SHORT.get(name, name) for name in names)]]
    for variant, scored in scores.items():
        figures = [f"{scored.metrics[name].value:.4f}" if name in scored.metrics else "-" for name in names]
        rows.append([f"{variant}*" if variant == chosen else variant, *figures])
    return "\n".join(align(rows))


def _detail_block(title: str, scores: LevelScores, classes: Sequence[str]) -> str:
    """Figures with their intervals, and the confusion of few classes."""
    lines = []
    if any(figure.low is not None for figure in scores.metrics.values()):
        rows = [[f"  {SHORT.get(name, name)}", *_figure_cells(figure)] for name, figure in scores.metrics.items()]
        lines += [f"{title}, 95 % intervals over parts", *align(rows)]
    if scores.confusion and len(scores.confusion) <= MOST_CLASSES_SHOWN and len(classes) == len(scores.confusion):
        rows = [["  label, predicted as", *classes]]
        rows += [[f"  {name}", *map(str, row)] for name, row in zip(classes, scores.confusion, strict=True)]
        lines += [] if lines else [title]
        lines += align(rows)
    return "\n".join(lines)


def _figure_cells(figure: MetricValue) -> list[str]:
    if figure.low is None or figure.high is None:
        return [f"{figure.value:.4f}", ""]
    return [f"{figure.value:.4f}", f"[{figure.low:.4f}, {figure.high:.4f}]"]


def _spread_cell(spread: Mapping[str, Any] | None) -> str:
    if spread is None:
        return "-"
    return f"{spread['mean']:.3f} ± {spread['std']:.3f} [{min(spread['values']):.3f}, {max(spread['values']):.3f}]"


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
        for name, figure in scores.metrics.items()
    }
    confusion = {"confusion": [list(row) for row in scores.confusion]} if scores.confusion else {}
    return {"count": scores.count, "figures": figures, **confusion}


def _level_from_dict(values: Mapping[str, Any]) -> LevelScores:
    return LevelScores(
        count=values["count"],
        metrics={name: MetricValue(**figure) for name, figure in values["figures"].items()},
        confusion=tuple(tuple(row) for row in values.get("confusion", ())),
    )


CODE = ("dinov2", "configs")  # folders of the checkout that decide results
NOT_A_FILE = -1


def find_origins(datasets: Mapping[str, ImageDataset], weights: str) -> dict[str, Any]:
    """What figures come from, found out by the main process for all; every process must call it.

    Args:
        datasets: by role, such as ``train`` and ``val``; one set in two roles is read once.
        weights: their file; empty for random ones.

    Returns:
        ``datasets`` (fingerprints by role), ``weights`` and ``revision``, as `EvaluationResults` has them.
    """
    found = None
    if is_main_process():
        distinct = {id(dataset): dataset for dataset in datasets.values()}
        fingerprints = {key: dataset_fingerprint(dataset) for key, dataset in distinct.items()}
        found = {
            "datasets": {role: fingerprints[id(dataset)] for role, dataset in datasets.items()},
            "weights": weights_fingerprint(weights),
            "revision": git_revision(),
        }
    origins = all_gather_objects(found)[0]
    assert origins is not None
    return origins


def git_revision(root: str | Path | None = None) -> str:
    """Commit of the checkout that this package was imported from, ``+dirty`` after it when its code was changed.

    Args:
        root: folder of the checkout; by default the one that holds the package.

    Returns:
        The 40 hexadecimal digits; empty where the package is no part of a checkout of its own, or there is no git.
    """
    folder = Path(__file__).parents[2] if root is None else Path(root)
    # A package that is installed somewhere inside another project's checkout must not name that project's commit.
    if not (folder / ".git").exists():
        return ""
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    if not commit:
        return ""
    return f"{commit}+dirty" if _git(folder, "status", "--porcelain", "--", *CODE) else commit


def dataset_fingerprint(dataset: ImageDataset) -> dict[str, Any]:
    """Describes a dataset so that two results can be seen to be about the same images.

    Returns:
        ``num_images``, ``num_parts``, ``num_labelled``, ``classes``, and the ``sha256`` over the sorted rows of path,
        label, part and, where images are plain files, size. Paths count from the folder that all images share, so the
        place of the set and the order of its images do not matter; the images' content is not read.
    """
    paths = [str(dataset.get_image_path(index)) for index in range(len(dataset))]
    groups = list(dataset.get_group_ids())
    labels = dataset.get_targets()
    start = _length_of_common_folder(paths)
    digest = hashlib.sha256()
    rows = (
        f"{path[start:]}\0{label}\0{path[start:] if group == path else group}\0{_size(path)}\n"
        for path, label, group in zip(paths, labels.tolist(), groups, strict=True)
    )
    for row in sorted(rows):
        digest.update(row.encode("utf-8", "surrogateescape"))
    return {
        "num_images": len(paths),
        "num_parts": len(set(groups)),
        "num_labelled": int((labels != MISSING_TARGET).sum()),
        "classes": list(dataset.classes),
        "sha256": digest.hexdigest(),
    }


def weights_fingerprint(path: str) -> dict[str, Any]:
    """Describes a file of weights.

    Args:
        path: of the file, its address, or the name of a released backbone; empty for random weights.

    Returns:
        ``path``, ``sha256`` and ``bytes``; for random weights ``{"path": "", "random": True}``, and the path alone
        where it names no file.
    """
    if not path:
        return {"path": "", "random": True}
    file = fetch_weights(path)
    if not file.is_file():
        return {"path": path}
    return {"path": path, "sha256": file_digest(file), "bytes": file.stat().st_size}


def _git(folder: Path, *words: str) -> str:
    """What git says; empty when it fails or is not there."""
    # A hook that runs us names its own repository in the environment; these options come before that.
    place = (f"--git-dir={folder / '.git'}", f"--work-tree={folder}", "--no-optional-locks")
    try:
        answer = subprocess.run(
            ["git", *place, *words], capture_output=True, text=True, timeout=60, check=False, cwd=folder
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def _length_of_common_folder(paths: list[str]) -> int:
    """How many characters the folder that all paths share has, with its separator; 0 where there is none."""
    try:
        shared = os.path.commonpath({os.path.dirname(path) for path in paths})
    except ValueError:  # no paths, or absolute and relative ones
        return 0
    return len(os.path.join(shared, "")) if shared else 0


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return NOT_A_FILE


MOST_VARIANTS = 12  # of one backbone; of more, as of the 52 classifiers of a grid, the chosen one is shown
METRICS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "auroc": "auroc",
    "average_precision": "average precision",
    "map": "map",
}


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
        try:
            results[name] = EvaluationResults.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a result of an evaluator: {error!r}") from error
    return results


def compare_results(results: Mapping[str, EvaluationResults], *, intervals: bool = False) -> str:
    """One row per backbone and variant, ``*`` marks the chosen one; parts are shown where a part has several photos.

    Of more than `MOST_VARIANTS` variants only the chosen one is shown, on every set that it was judged on.

    Args:
        results: by name of the backbone; at least one.
        intervals: shows 95 % intervals behind the figures that have one.
    """
    every = [(name, variant, found.scores[variant]) for name, found in results.items() for variant in _shown(found)]
    levels = ("image", "part") if any(scores.part.count != scores.image.count for *_, scores in every) else ("image",)
    present = {metric for *_, scores in every for metric in (*scores.image.metrics, *scores.part.metrics)}
    metrics = [metric for metric in METRICS if metric in present]
    rows = [["backbone", "variant", *(f"{level} {METRICS[metric]}" for level in levels for metric in metrics)]]
    for name, variant, scores in every:
        mark = "*" if variant == results[name].chosen else ""
        by_level = {"image": scores.image.metrics, "part": scores.part.metrics}
        figures = [_show(by_level[level].get(metric), intervals) for level in levels for metric in metrics]
        rows.append([name, f"{variant}{mark}", *figures])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    left_out = sum(len(found.scores) for found in results.values()) - len(every)
    return "\n".join([*lines, f"({left_out} variants that were not chosen are left out)"] if left_out else lines)


def _shown(found: EvaluationResults) -> list[str]:
    """Names of the variants that a reader wants to see."""
    if not found.chosen or len(found.scores) <= MOST_VARIANTS:
        return list(found.scores)
    return [name for name in found.scores if name == found.chosen or name.startswith(f"{found.chosen} on ")]


def _show(figure: MetricValue | None, intervals: bool) -> str:
    if figure is None:
        return "-"
    if not intervals or figure.low is None:
        return f"{figure.value:.3f}"
    return f"{figure.value:.3f} [{figure.low:.3f}, {figure.high:.3f}]"
