"""The command ``linear``: from a config, weights and labelled datasets to results and a trained classifier."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dinov2.config.command_line import option, parse
from dinov2.data.loaders import make_dataset
from dinov2.data.transforms import make_classification_train_transform
from dinov2.eval.command import TRAIN, VAL, EvaluatorOptions, EvaluatorSetup, evaluator_session
from dinov2.eval.linear import eval_linear
from dinov2.eval.linear.classifiers import LEARNING_RATES, N_LAST_BLOCKS
from dinov2.eval.linear.protocol import LinearProtocol
from dinov2.eval.linear.scoring import METRICS
from dinov2.eval.linear.training import CLASS_WEIGHTINGS
from dinov2.eval.results import EvaluationResults

logger = logging.getLogger("dinov2")

PUBLISHED_BATCH_SIZE = 128
NO_MAPPING = "none"
METRIC_OF_UPSTREAM = {"mean_accuracy": "accuracy", "mean_per_class_accuracy": "balanced_accuracy"}


@dataclass(frozen=True)
class LinearOptions(EvaluatorOptions):
    """Options of the command."""

    batch_size: int | None = option(None, help="images per process of a forward pass (usually 64) and of a step (128)")
    test_datasets: tuple[str, ...] = option((), help="further labelled sets to judge, as dataset strings")
    learning_rates: tuple[float, ...] = option(LEARNING_RATES, help="of the grid, for 256 images per step")
    n_last_blocks: tuple[int, ...] = option(N_LAST_BLOCKS, help="of the grid: blocks that give their class token")
    epochs: int = option(10, help="how many")
    epoch_length: int | None = option(
        None, help="iterations of an epoch (published: 1250; usually one pass over the training set, at least 400)"
    )
    eval_period_iterations: int | None = option(
        None, help="iterations between looks at the validation set, each with a checkpoint (usually an epoch)"
    )
    augment: bool = option(False, help="random crops and flips, as published; without them, features are computed once")
    class_weighting: str = option("none", help="balanced: all classes count the same", choices=CLASS_WEIGHTINGS)
    val_metric_type: str = option(
        "accuracy",
        help="by which the best classifier is chosen on the validation set",
        choices=(*METRICS, *METRIC_OF_UPSTREAM),
        aliases=("--metric",),
    )
    val_class_mapping_fpath: str | None = option(
        None, help=".npy file: the training class that stands for each class of the validation set"
    )
    test_class_mapping_fpaths: tuple[str, ...] = option(
        (), help=f"the same for each test set, or '{NO_MAPPING}' where its classes are those of the training set"
    )
    classifier_fpath: str | None = option(
        None, help="linear_checkpoint.pth or linear_head.pth: trained classifiers to judge, without any training"
    )
    resume: bool = option(True, help="go on from the checkpoint in the output folder")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the words after its name; returns the exit code."""
    options = parse(
        LinearOptions,
        argv,
        description="Scores a frozen backbone by the best of a grid of linear classifiers, per image and per part.",
        example=(
            "python eval/linear.py --config-file configs/eval/vitl14_pretrain.yaml --pretrained-weights W.pth "
            "--train-dataset GroupedJSON:split=TRAIN:root=/data/parts "
            "--val-dataset GroupedJSON:split=VAL:root=/data/parts "
            "--test-datasets GroupedJSON:split=TEST:root=/data/parts --output-dir outputs/linear"
        ),
    )
    protocol = linear_protocol(options)  # before anything is opened
    mappings = _class_mappings(options)
    needed = (TRAIN, VAL) if options.classifier_fpath is None else (VAL,)
    with evaluator_session(options, needed=needed) as setup:
        run_linear(options, protocol, mappings, setup)
    return 0


def linear_protocol(options: LinearOptions) -> LinearProtocol:
    """The protocol that the options name.

    Raises:
        ValueError: for settings out of range.
    """
    return LinearProtocol(
        learning_rates=options.learning_rates,
        n_last_blocks=options.n_last_blocks,
        epochs=options.epochs,
        epoch_length=options.epoch_length,
        eval_period_iterations=options.eval_period_iterations,
        batch_size=PUBLISHED_BATCH_SIZE if options.batch_size is None else options.batch_size,
        class_weighting=options.class_weighting,
        val_metric=METRIC_OF_UPSTREAM.get(options.val_metric_type, options.val_metric_type),
        part_aggregation=options.part_aggregation,
        part_top_k=options.part_top_k,
        num_resamples=options.num_resamples,
        seed=options.seed,
    )


def run_linear(
    options: LinearOptions, protocol: LinearProtocol, class_mapping_fpaths: dict[str, str], setup: EvaluatorSetup
) -> EvaluationResults:
    """Evaluates what the options and the set-up describe, inside a session of processes."""
    if options.features is not None:
        logger.warning("--features has no effect: linear classifiers see class tokens and mean patches of blocks")
    if options.classifier_fpath is not None and options.train_dataset is not None:
        logger.warning("--train-dataset has no effect with --classifier-fpath: nothing is trained")
    tests = {
        name: make_dataset(dataset_str=text, transform=setup.transform)
        for name, text in zip(_test_names(len(options.test_datasets)), options.test_datasets, strict=True)
    }
    return eval_linear(
        setup.backbone,
        setup.train_dataset if options.classifier_fpath is None else None,
        setup.val_dataset,
        protocol,
        test_datasets=tests,
        class_mapping_fpaths=class_mapping_fpaths,
        train_transform=_train_transform(options, setup),
        classifier_fpath=options.classifier_fpath,
        resume=options.resume,
        extraction_batch_size=setup.batch_size,
        num_workers=setup.num_workers,
        device=setup.device,
        autocast_dtype=setup.autocast_dtype,
        output_dir=setup.output_dir,
        weights=setup.weights,
        settings={**setup.settings, "test_datasets": dict(zip(tests, options.test_datasets, strict=True))},
    )


def _train_transform(options: LinearOptions, setup: EvaluatorSetup) -> Callable[[Any], Tensor] | None:
    """The published augmentation, if it was asked for."""
    if not options.augment:
        return None
    height, width = setup.settings["image_size"]
    if height != width:
        raise ValueError(f"--augment cuts square images, found {height}x{width} (height x width)")
    transform: Callable[[Any], Tensor] = make_classification_train_transform(height)
    return transform


def _test_names(count: int) -> list[str]:
    """``test``, or ``test 1``, ``test 2``, … where there are several."""
    return ["test"] if count == 1 else [f"test {number}" for number in range(1, count + 1)]


def _class_mappings(options: LinearOptions) -> dict[str, str]:
    """Files of class mappings by the name of their set.

    Raises:
        ValueError: unless there are none for the test sets, or one for each.
    """
    mappings = {} if options.val_class_mapping_fpath is None else {VAL: options.val_class_mapping_fpath}
    given, count = options.test_class_mapping_fpaths, len(options.test_datasets)
    if given and len(given) != count:
        raise ValueError(
            f"{len(given)} class mappings were given for {count} test sets; '{NO_MAPPING}' stands for none"
        )
    named = zip(_test_names(count), given, strict=True) if given else ()
    return mappings | {name: path for name, path in named if path != NO_MAPPING}
