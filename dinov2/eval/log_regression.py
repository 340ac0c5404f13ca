"""Logistic regression on frozen features, per image and per part, with all labels or with a few per class."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dinov2.config.command_line import option, parse, run_as
from dinov2.data.datasets.base import ImageDataset
from dinov2.distributed import is_main_process
from dinov2.eval.command import EvaluatorOptions, evaluator_session, find_origins, name_tests
from dinov2.eval.features import (
    ALL,
    TRAIN,
    VAL,
    Features,
    ModelWithFeatures,
    check_finite_features,
    common_classes,
    device_of,
    extract_features,
    few_shot_subset,
    report_progress,
    warn_of_idle_aggregation,
    warn_of_shared_parts,
    warn_of_unseen_classes,
)
from dinov2.eval.log_regression_model import (
    C_GRID,
    CLASS_WEIGHTINGS,
    METRICS,
    TRAIN_DTYPES,
    FittedLogRegression,
    LogRegressionSettings,
    check_two_classes,
    fit_log_regression,
)
from dinov2.eval.metrics.classification import Scores
from dinov2.eval.results import (
    EvaluationResults,
    Predictions,
    check_test_names,
    mean_scores,
    summarise_tries,
    variant_on,
)
from dinov2.eval.yardsticks import add_yardsticks, classify_by_statistics, warn_of_unseen
from dinov2.utils.files import output_folder

logger = logging.getLogger("dinov2")

MODEL_FILE = "log_regression.npz"


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
    image_statistics: bool = True,
    random_backbone: nn.Module | None = None,
    output_dir: str | Path | None = None,
    weights: str = "",
    settings: Mapping[str, Any] | None = None,
) -> EvaluationResults:
    """Scores a frozen backbone by logistic regression on its features.

    C is chosen by parts of the training set that are held out, see `choose_c`, and the model is then fitted to the
    whole of it; the other sets are only evaluated on. All processes of the run extract features together. Then each of
    them does the same fits on its CPU, so that none waits for another, and the main process reports.

    Args:
        model: maps images ``[B, 3, H, W]`` to features ``[B, D]``.
        train_dataset: labelled images to fit to.
        val_dataset: labelled images to evaluate on; with two classes, class 1 is the positive one (a defect).
        regression: settings of the fits.
        test_datasets: further sets to evaluate on, by the names that they have in the results.
        batch_size: images per process and forward pass.
        num_workers: processes that decode images, per process of the run.
        device: where features are computed; by default where the model lies.
        autocast_dtype: precision of the forward pass; by default that of the model.
        features: what describes an image, see `ModelWithFeatures`.
        image_statistics: shows beside the scores those of ten statistics of brightness; images are decoded once more.
        random_backbone: shows beside the scores those of this network.
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
    check_test_names(tests)
    classes = common_classes(train_dataset, val_dataset)
    check_two_classes(train_dataset.get_targets(), classes)
    for name, dataset in tests.items():
        try:
            test_classes = common_classes(train_dataset, dataset)
        except ValueError as error:
            raise ValueError(f"{name!r} cannot be evaluated like a validation set: {error}") from error
        if len(test_classes) > len(classes):  # sets that do not name their classes
            raise ValueError(f"{name!r} has labels outside the {len(classes)} classes of the other sets")
    regression.metric_for(len(classes))
    warn_of_idle_aggregation(regression.part_aggregation, classes)
    datasets = {TRAIN: train_dataset, VAL: val_dataset, **tests}
    warn_of_unseen({VAL: val_dataset, **tests}, classes)

    def evaluate(model: nn.Module) -> tuple[EvaluationResults, FittedLogRegression | None]:
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
        known, val = extracted.pop(TRAIN), extracted.pop(VAL)
        return score_features(known, val, classes, regression, tests=extracted)

    results, fitted = evaluate(model)
    by_statistics = None
    if image_statistics:
        by_statistics = classify_by_statistics(
            datasets,
            len(classes),
            "logistic",
            num_workers=num_workers,
            device=device_of(model) if device is None else device,
        )
    random = None if random_backbone is None else evaluate(random_backbone)[0]
    results = add_yardsticks(results, datasets, regression, by_statistics=by_statistics, random=random)
    results = replace(
        results,
        settings={"features": features, **results.settings, **(settings or {})},
        **find_origins(datasets, weights),
    )
    if output_dir is not None and is_main_process():  # before the results: where those are, the rest is theirs
        folder = output_folder(output_dir)
        if fitted is None:
            (folder / MODEL_FILE).unlink(missing_ok=True)
        else:
            fitted.model.save(folder / MODEL_FILE)
    results.publish(output_dir)
    return results


def score_features(
    train: Features,
    val: Features,
    classes: tuple[str, ...],
    settings: LogRegressionSettings | None = None,
    *,
    tests: Mapping[str, Features] | None = None,
) -> tuple[EvaluationResults, FittedLogRegression | None]:
    """Scores features that are already there; see `eval_log_regression`.

    Returns:
        The results, and the fit to all labels; None where it was not asked for.

    Raises:
        ValueError: for features that are not finite, a training set of one class, or a metric that these classes do
            not have.
    """
    settings = settings or LogRegressionSettings()
    tests = tests or {}
    evaluated = {VAL: val, **tests}
    for name, features in {"training": train, "validation": val, **tests}.items():
        check_finite_features(features.embeddings, features.paths, name)
    check_two_classes(train.labels.numpy(), classes)
    extra: dict[str, Any] = {"num_parts_in_both": len(warn_of_shared_parts(train.group_ids, val.group_ids))}
    warn_of_unseen_classes(train.labels.tolist(), classes)
    for name, features in tests.items():
        warn_of_shared_parts(train.group_ids, features.group_ids, f"the training set and {name}")
    scores: dict[str, Scores] = {}
    chosen, chosen_by, fitted, predictions = "", {}, None, {}
    if ALL in settings.n_per_class_list:
        fitted = fit_log_regression(train, classes, settings, progress="hold-out fits")
        if fitted.num_not_converged and is_main_process():
            final = f", nor did the final one with C={fitted.model.c:.6g}: try a larger max_iter"
            logger.warning(
                "%d of %d fits did not converge within %d iterations%s",
                *(fitted.num_not_converged, fitted.num_fits, settings.max_iter, "" if fitted.converged else final),
            )
        chosen, chosen_by = f"C={fitted.model.c:.6g}", {"chosen_by": fitted.choice.chosen_by}
        extra |= fitted.as_dict()
        for name, features in evaluated.items():
            predictions[name] = Predictions(
                paths=features.paths,
                group_ids=features.group_ids,
                labels=features.labels.numpy(),
                probabilities=fitted.model.probabilities(features.embeddings.numpy()),
            )
            scores[variant_on(chosen, name)] = settings.score(
                predictions[name].probabilities, predictions[name].labels, features.group_ids
            )
    for n_per_class in sorted(set(settings.n_per_class_list) - {ALL}):
        variant = f"n={n_per_class}"
        tries, extra.setdefault("few_shot_fits", {})[variant] = _few_shot(
            train, evaluated, classes, n_per_class, settings
        )
        for name, scored in tries.items():
            scores[variant_on(variant, name)] = mean_scores(scored)
            extra.setdefault("few_shot", {})[variant_on(variant, name)] = summarise_tries(scored)
    results = EvaluationResults(
        evaluator="log_regression",
        settings=settings.as_dict() | chosen_by,
        classes=classes,
        scores=scores,
        chosen=chosen,
        extra=extra,
        predictions=predictions.pop(VAL, None),
        test_predictions=predictions,
    )
    return results, fitted


def _few_shot(
    train: Features,
    evaluated: Mapping[str, Features],
    classes: tuple[str, ...],
    n_per_class: int,
    settings: LogRegressionSettings,
) -> tuple[dict[str, list[Scores]], dict[str, Any]]:
    """Scores of fits to seeded subsets, by evaluated set, and plain values on the fits, each with its own C."""
    fits = []
    scores: dict[str, list[Scores]] = {name: [] for name in evaluated}
    for seed in report_progress(range(settings.n_tries), f"few-shot n={n_per_class}", 1, settings.n_tries):
        fitted = fit_log_regression(train.select(few_shot_subset(train.labels, n_per_class, seed)), classes, settings)
        fits.append(fitted)
        for name, features in evaluated.items():
            probabilities = fitted.model.probabilities(features.embeddings.numpy())
            scores[name].append(
                settings.score(probabilities, features.labels.numpy(), features.group_ids, intervals=False)
            )
    described: dict[str, Any] = {
        "c": [fitted.model.c for fitted in fits],
        "chosen_by": [fitted.choice.chosen_by for fitted in fits],
        "num_fits": sum(fitted.num_fits for fitted in fits),
        "num_not_converged": sum(fitted.num_not_converged for fitted in fits),
    }
    if is_main_process():
        logger.info(
            "few-shot n=%d: C = %s (by %s); %d of %d fits did not converge",
            n_per_class,
            ", ".join(f"{fitted.model.c:.3g}" for fitted in fits),
            " or ".join(dict.fromkeys(described["chosen_by"])),
            described["num_not_converged"],
            described["num_fits"],
        )
    return scores, described


@dataclass(frozen=True)
class LogRegressionOptions(EvaluatorOptions):
    """Options of the command."""

    test_datasets: tuple[str, ...] = option((), help="further labelled sets to evaluate on, as dataset strings")
    cs: tuple[float, ...] = option((), help="values of C to choose from (usually 45 from 1e-6 to 1e5)")
    metric: str = option(
        "",
        help="by which the held-out parts choose C (usually auroc for two classes, log_loss for more)",
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
    regression = LogRegressionSettings(  # before anything is opened
        cs=options.cs or C_GRID,
        metric=options.metric,
        hold_out_fraction=options.hold_out_fraction,
        hold_out_repeats=options.hold_out_repeats,
        fallback_c=options.fallback_c,
        class_weighting=options.class_weighting,
        max_iter=options.max_iter,
        train_dtype=options.train_dtype,
        n_per_class_list=options.n_per_class_list,
        n_tries=options.n_tries,
        **options.scoring,
    )
    with evaluator_session(options) as setup:
        tests = setup.open_tests(options.test_datasets)
        eval_log_regression(
            setup.backbone,
            setup.train_dataset,
            setup.val_dataset,
            regression,
            test_datasets=tests,
            features=setup.config.evaluation.features,
            **setup.yardsticks,
            **setup.extraction,
            **setup.reporting
            | {"settings": {**setup.settings, "test_datasets": name_tests(options.test_datasets, tests)}},
        )
    return 0


if __name__ == "__main__":
    run_as("log_regression")
