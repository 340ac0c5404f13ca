"""Logistic regression on frozen features, per image and per part, with all labels or with a few per class."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dinov2.config.command_line import option, parse
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.loaders import make_dataset
from dinov2.distributed import is_main_process
from dinov2.eval.command import TRAIN, VAL, EvaluatorOptions, EvaluatorSetup, evaluator_session
from dinov2.eval.features import (
    ALL,
    Features,
    ModelWithFeatures,
    check_finite_features,
    common_classes,
    extract_features,
    few_shot_subset,
    name_some,
    report_progress,
    shared_parts,
    warn_of_idle_aggregation,
    warn_of_shared_parts,
    warn_of_unseen_classes,
)
from dinov2.eval.log_regression.model import (
    CLASS_WEIGHTINGS,
    METRICS,
    TRAIN_DTYPES,
    FittedLogRegression,
    LogRegressionModel,
    LogRegressionSettings,
    check_two_classes,
    fit_log_regression,
)
from dinov2.eval.metrics.classification import MetricValue, Scores
from dinov2.eval.results import (
    EvaluationResults,
    Predictions,
    align,
    find_origins,
    mean_scores,
    spread_table,
    summarise_tries,
)
from dinov2.utils.files import write_text_atomically

logger = logging.getLogger("dinov2")


@dataclass(frozen=True, eq=False)
class Tries:
    """Fits to several subsets of one size.

    Attributes:
        n_per_class: images per class.
        fits: one per subset.
        scores: per judged set, of every fit.
    """

    n_per_class: int
    fits: tuple[FittedLogRegression, ...]
    scores: Mapping[str, tuple[Scores, ...]]

    @property
    def variant(self) -> str:
        """Name in the results."""
        return f"n={self.n_per_class}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values on the fits."""
        return {
            "c": [fitted.model.c for fitted in self.fits],
            "chosen_by": [fitted.choice.chosen_by for fitted in self.fits],
            "num_fits": sum(fitted.num_fits for fitted in self.fits),
            "num_not_converged": sum(fitted.num_not_converged for fitted in self.fits),
        }


def few_shot_tries(
    train: Features,
    judged: Mapping[str, Features],
    classes: tuple[str, ...],
    n_per_class: int,
    settings: LogRegressionSettings,
) -> Tries:
    """Fits to seeded subsets of the training set, each with its own choice of C, and scores them on the judged sets.

    Parts are held out of the subset alone; where it has too few, as with one image per class, C is the fallback, which
    the log says.

    Args:
        train: labelled features of at least two classes.
        judged: sets by name.
        classes: names.
        n_per_class: images per class, all of a class that has no more.
        settings: of the fits, and how many tries.
    """
    fits = []
    scores: dict[str, list[Scores]] = {name: [] for name in judged}
    name = f"few-shot n={n_per_class}"
    for seed in report_progress(range(settings.n_tries), name, 1, settings.n_tries):
        subset = train.select(few_shot_subset(train.labels, n_per_class, seed))
        fitted = fit_log_regression(subset, classes, settings)
        fits.append(fitted)
        for key, features in judged.items():
            probabilities = fitted.model.probabilities(features.embeddings.numpy())
            scores[key].append(settings.score(probabilities, features, intervals=False))
    tries = Tries(n_per_class, tuple(fits), {key: tuple(scored) for key, scored in scores.items()})
    if is_main_process():
        logger.info("%s", _describe(tries))
    return tries


def _describe(tries: Tries) -> str:
    described = tries.as_dict()
    cs = ", ".join(f"{c:.3g}" for c in described["c"])
    ways = " or ".join(dict.fromkeys(described["chosen_by"]))
    return (
        f"few-shot {tries.variant}: C = {cs} (by {ways}); "
        f"{described['num_not_converged']} of {described['num_fits']} fits did not converge"
    )


MODEL_FILE = "log_regression.npz"


@dataclass(frozen=True, kw_only=True, eq=False)
class Verdict:
    """What became of an evaluation.

    Attributes:
        results: of the fit to all labels, and the means of the few-shot fits.
        fitted: the fit to all labels; None where it was not asked for.
        test_predictions: of that fit, by test set.
    """

    results: EvaluationResults
    fitted: FittedLogRegression | None
    test_predictions: Mapping[str, Predictions]

    def table(self) -> str:
        """Text for people."""
        blocks = [
            self.results.table(),
            _table_of_tests(self.results, tuple(self.test_predictions)),
            spread_table(self.results.extra.get("few_shot", {})),
        ]
        return "\n".join(block for block in blocks if block)

    def write(self, output_dir: str | Path) -> None:
        """Writes the model, the predictions and, last, the results: where those are, the rest is theirs."""
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if self.fitted is None:
            (folder / MODEL_FILE).unlink(missing_ok=True)
        else:
            self.fitted.model.save(folder / MODEL_FILE)
        for name, predictions in self.test_predictions.items():
            file = f"predictions_{name.replace(' ', '_')}.csv"
            write_text_atomically(folder / file, predictions.to_csv(self.results.classes))
        self.results.write(folder)


def eval_log_regression(
    model: nn.Module,
    train_dataset: ImageDataset,
    val_dataset: ImageDataset,
    regression: LogRegressionSettings | None = None,
    *,
    test_datasets: Mapping[str, ImageDataset] | None = None,
    batch_size: int = 256,
    num_workers: int = 4,
    device: torch.device | str | None = None,
    autocast_dtype: torch.dtype | None = None,
    features: str = "cls",
    output_dir: str | Path | None = None,
    weights: str = "",
    settings: Mapping[str, Any] | None = None,
) -> EvaluationResults:
    """Scores a frozen backbone by logistic regression on its features.

    C is chosen by parts of the training set that are held out, see `choose_c`, and the model is then fitted to the
    whole of it; the validation and test sets are judged only. All processes of the run extract features together. Then
    each of them does the same fits on its CPU, so that none waits for another, and the main process reports.

    Args:
        model: maps images ``[B, 3, H, W]`` to features ``[B, D]``.
        train_dataset: labelled images to fit to.
        val_dataset: labelled images to judge; with two classes, class 1 is the positive one (a defect).
        regression: settings of the fits.
        test_datasets: further sets to judge, by the names that they have in the results.
        batch_size: images per process and forward pass.
        num_workers: processes that decode images, per process of the run.
        device: where features are computed; by default where the model lies.
        autocast_dtype: precision of the forward pass; by default that of the model.
        features: what describes an image: ``cls``, ``patch_mean`` or ``cls_patch_mean``.
        output_dir: folder that gets ``results.json`` and, from the fit to all labels, ``predictions.csv`` (and one per
            test set) and ``log_regression.npz``, which `load_log_regression` reads; by default nothing is written.
        weights: file of the weights, for the results.
        settings: further plain values for the results, such as the image size.

    Raises:
        ValueError: for missing labels, a training set of one class, sets whose classes differ, images that cannot be
            read, features that are not finite, or settings out of range. Labels and settings are checked before
            anything is computed.
    """
    regression = regression or LogRegressionSettings()
    tests = test_datasets or {}
    datasets = {TRAIN: train_dataset, VAL: val_dataset, **tests}
    classes = _check_sets(train_dataset, val_dataset, tests)
    regression.metric_for(len(classes))
    warn_of_idle_aggregation(regression.part_aggregation, classes)
    described = ModelWithFeatures(model, features)
    extracted = {
        name: extract_features(
            described,
            dataset,
            batch_size=batch_size,
            num_workers=num_workers,
            device=device,
            autocast_dtype=autocast_dtype,
        )
        for name, dataset in datasets.items()
    }
    verdict = score_features(
        extracted[TRAIN], extracted[VAL], classes, regression, tests={name: extracted[name] for name in tests}
    )
    results = replace(
        verdict.results,
        settings={"features": features, **verdict.results.settings, **(settings or {})},
        **find_origins(datasets, weights),
    )
    verdict = replace(verdict, results=results)
    if is_main_process():
        logger.info("%s", verdict.table())
        if output_dir is not None:
            verdict.write(output_dir)
    return results


def score_features(
    train: Features,
    val: Features,
    classes: tuple[str, ...],
    settings: LogRegressionSettings | None = None,
    *,
    tests: Mapping[str, Features] | None = None,
) -> Verdict:
    """Scores features that are already there; see `eval_log_regression`.

    Raises:
        ValueError: for features that are not finite, a training set of one class, or a metric that these classes do
            not have.
    """
    settings = settings or LogRegressionSettings()
    tests = tests or {}
    judged = {VAL: val, **tests}
    for name, features in {"training": train, "validation": val, **tests}.items():
        check_finite_features(features.embeddings, features.paths, name)
    check_two_classes(train.labels.numpy(), classes)
    extra: dict[str, Any] = {"num_parts_in_both": len(warn_of_shared_parts(train.group_ids, val.group_ids))}
    _warn_of_sets(train, tests, classes)
    scores: dict[str, Scores] = {}
    chosen, fitted, predictions = "", None, {}
    if ALL in settings.n_per_class_list:
        fitted = fit_log_regression(train, classes, settings, progress="hold-out fits")
        _warn_of_convergence(fitted, settings)
        chosen = f"C={fitted.model.c:.6g}"
        extra |= fitted.as_dict()
        for name, features in judged.items():
            predictions[name] = _predict(fitted.model, features)
            scores[_variant(chosen, name)] = settings.score(predictions[name].probabilities, features)
    for n_per_class in sorted(set(settings.n_per_class_list) - {ALL}):
        tries = few_shot_tries(train, judged, classes, n_per_class, settings)
        extra.setdefault("few_shot_fits", {})[tries.variant] = tries.as_dict()
        for name, scored in tries.scores.items():
            scores[_variant(tries.variant, name)] = mean_scores(scored)
            extra.setdefault("few_shot", {})[_variant(tries.variant, name)] = summarise_tries(scored)
    results = EvaluationResults(
        evaluator="log_regression",
        settings=settings.as_dict() | ({"chosen_by": fitted.choice.chosen_by} if fitted else {}),
        classes=classes,
        scores=scores,
        chosen=chosen,
        extra=extra,
        predictions=predictions.pop(VAL, None),
    )
    return Verdict(results=results, fitted=fitted, test_predictions=predictions)


def _variant(name: str, judged: str) -> str:
    """Name of the scores on one set."""
    return name if judged == VAL else f"{name} on {judged}"


def _predict(model: LogRegressionModel, features: Features) -> Predictions:
    return Predictions(
        paths=features.paths,
        group_ids=features.group_ids,
        labels=features.labels.numpy(),
        probabilities=model.probabilities(features.embeddings.numpy()),
    )


def _check_sets(
    train_dataset: ImageDataset, val_dataset: ImageDataset, tests: Mapping[str, ImageDataset]
) -> tuple[str, ...]:
    """Checks labels and names of the sets before anything is computed; returns the classes."""
    classes = common_classes(train_dataset, val_dataset)
    check_two_classes(train_dataset.get_targets(), classes)
    for name, dataset in tests.items():
        if name in (TRAIN, VAL) or not name or Path(name).name != name:
            raise ValueError(f"a test set cannot be named {name!r}")
        try:
            test_classes = common_classes(train_dataset, dataset)
        except ValueError as error:
            raise ValueError(f"{name!r} cannot be judged like a validation set: {error}") from error
        if len(test_classes) > len(classes):  # sets that do not name their classes
            raise ValueError(f"{name!r} has labels outside the {len(classes)} classes of the other sets")
    return classes


def _table_of_tests(results: EvaluationResults, tests: Sequence[str]) -> str:
    """The chosen model on the test sets with intervals, side by side, as text; empty without test sets."""
    blocks = []
    for level in ("image", "part") if tests else ():
        scored = {name: getattr(results.scores[_variant(results.chosen, name)], level) for name in tests}
        names = dict.fromkeys(name for levels in scored.values() for name in levels.metrics)
        rows = [[f"per {level}", *(f"{name} ({levels.count})" for name, levels in scored.items())]]
        rows += [[f"  {name}", *(_cell(levels.metrics.get(name)) for levels in scored.values())] for name in names]
        blocks.append("\n".join(align(rows)))
    return "\n".join(blocks)


def _cell(figure: MetricValue | None) -> str:
    if figure is None:
        return "-"
    interval = "" if figure.low is None or figure.high is None else f" [{figure.low:.4f}, {figure.high:.4f}]"
    return f"{figure.value:.4f}{interval}"


def _warn_of_sets(train: Features, tests: Mapping[str, Features], classes: tuple[str, ...]) -> None:
    """Says on the main process what about the sets makes figures worse or better than they should be."""
    warn_of_unseen_classes(train.labels.tolist(), classes)
    if not is_main_process():
        return
    for name, features in tests.items():
        shared = shared_parts(train.group_ids, features.group_ids)
        if shared:
            logger.warning(
                "%d parts are in both the training set and %s, so the scores are too good: %s",
                len(shared),
                name,
                name_some(shared),
            )


def _warn_of_convergence(fitted: FittedLogRegression, settings: LogRegressionSettings) -> None:
    """Says on the main process how many fits were stopped before they converged."""
    if not fitted.num_not_converged or not is_main_process():
        return
    final = "" if fitted.converged else f", nor did the final one with C={fitted.model.c:.6g}: try a larger max_iter"
    logger.warning(
        "%d of %d fits did not converge within %d iterations%s",
        fitted.num_not_converged,
        fitted.num_fits,
        settings.max_iter,
        final,
    )


@dataclass(frozen=True)
class LogRegressionOptions(EvaluatorOptions):
    """Options of the command."""

    test_datasets: tuple[str, ...] = option((), help="further labelled sets to judge, as dataset strings")
    cs: tuple[float, ...] = option((), help="values of C to choose from (usually 45 from 1e-6 to 1e5)")
    metric: str = option(
        "",
        help="what the held-out parts judge (usually auroc for two classes, log_loss for more)",
        choices=METRICS,
        aliases=("--metric-type",),
    )
    hold_out_fraction: float = option(0.2, help="share of the parts of each class that is held out to choose C")
    hold_out_repeats: int = option(5, help="how often parts are held out")
    fallback_c: float = option(1e-3, help="C where fewer than two classes have a part to hold out")
    class_weighting: str = option("none", help="balanced: all classes count the same", choices=CLASS_WEIGHTINGS)
    max_iter: int = option(1000, help="most iterations of one fit", aliases=("--max-train-iters",))
    train_dtype: str = option("float64", help="precision of the fits", choices=TRAIN_DTYPES)
    n_per_class_list: tuple[int, ...] = option((ALL,), help="images per class of few-shot training; -1: all images")
    n_tries: int = option(5, help="few-shot training sets per number of images")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the words after its name; returns the exit code."""
    options = parse(
        LogRegressionOptions,
        argv,
        description="Scores a frozen backbone by logistic regression on its features, per image and per part.",
        example=(
            "python eval/log_regression.py --config-file configs/eval/vitl14_pretrain.yaml --pretrained-weights W.pth "
            "--train-dataset GroupedJSON:split=TRAIN:root=/data/parts "
            "--val-dataset GroupedJSON:split=VAL:root=/data/parts --output-dir outputs/log_regression"
        ),
    )
    regression = regression_settings(options)  # before anything is opened
    with evaluator_session(options) as setup:
        run_log_regression(options, regression, setup)
    return 0


def regression_settings(options: LogRegressionOptions) -> LogRegressionSettings:
    """The settings that the options name.

    Raises:
        ValueError: for settings out of range.
    """
    given = {"cs": options.cs} if options.cs else {}
    return LogRegressionSettings(
        **given,
        metric=options.metric,
        hold_out_fraction=options.hold_out_fraction,
        hold_out_repeats=options.hold_out_repeats,
        fallback_c=options.fallback_c,
        class_weighting=options.class_weighting,
        max_iter=options.max_iter,
        train_dtype=options.train_dtype,
        n_per_class_list=options.n_per_class_list,
        n_tries=options.n_tries,
        part_aggregation=options.part_aggregation,
        part_top_k=options.part_top_k,
        num_resamples=options.num_resamples,
        seed=options.seed,
    )


def run_log_regression(
    options: LogRegressionOptions, regression: LogRegressionSettings, setup: EvaluatorSetup
) -> EvaluationResults:
    """Evaluates what the options and the set-up describe, inside a session of processes."""
    tests = _test_datasets(options.test_datasets, setup)
    return eval_log_regression(
        setup.backbone,
        setup.train_dataset,
        setup.val_dataset,
        regression,
        test_datasets=tests,
        batch_size=setup.batch_size,
        num_workers=setup.num_workers,
        device=setup.device,
        autocast_dtype=setup.autocast_dtype,
        features=setup.config.evaluation.features,
        output_dir=setup.output_dir,
        weights=setup.weights,
        settings={**setup.settings, "test_datasets": dict(zip(tests, options.test_datasets, strict=True))},
    )


def _test_datasets(names: Sequence[str], setup: EvaluatorSetup) -> dict[str, ImageDataset]:
    """The sets as ``test``, or ``test 1``, ``test 2``, … where there are several."""
    sets = [make_dataset(dataset_str=name, transform=setup.transform) for name in names]
    if len(sets) == 1:
        return {"test": sets[0]}
    return {f"test {number}": dataset for number, dataset in enumerate(sets, start=1)}
