"""The command ``log_regression``: from a config, weights and labelled datasets to results and a fitted model."""

from collections.abc import Sequence
from dataclasses import dataclass

from dinov2.config.command_line import option, parse
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.loaders import make_dataset
from dinov2.eval.command import EvaluatorOptions, EvaluatorSetup, evaluator_session
from dinov2.eval.log_regression import eval_log_regression
from dinov2.eval.log_regression.settings import (
    ALL,
    CLASS_WEIGHTINGS,
    METRICS,
    TRAIN_DTYPES,
    LogRegressionSettings,
)
from dinov2.eval.results import EvaluationResults


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
