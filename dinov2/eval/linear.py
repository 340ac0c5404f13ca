"""Linear classification of frozen features: a grid of classifiers, of which the best on the validation set is kept."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dinov2.config.command_line import option, parse, run_as
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.transforms import make_classification_train_transform
from dinov2.distributed import get_world_size, is_main_process
from dinov2.eval.command import EvaluatorOptions, evaluator_session, find_origins, name_tests, test_names
from dinov2.eval.features import (
    TRAIN,
    VAL,
    check_labels,
    common_classes,
    device_of,
    warn_of_idle_aggregation,
    warn_of_shared_parts,
)
from dinov2.eval.linear_classifiers import (
    LEARNING_RATES,
    METRICS,
    N_LAST_BLOCKS,
    ClassifierStack,
    EvaluatedSet,
    LastBlocks,
    all_probabilities,
    check_metric,
    choose,
    init_classifiers,
    probabilities_of,
    read_classifiers,
    stack_classifiers,
    write_head,
)
from dinov2.eval.linear_training import (
    CLASS_WEIGHTINGS,
    Batches,
    Extraction,
    LinearCheckpoint,
    LinearProtocol,
    TrainingRun,
    augmented_batches,
    cached_batches,
    train_classifiers,
)
from dinov2.eval.metrics.classification import IntArray, Scores, deciding_metric
from dinov2.eval.results import (
    EvaluationResults,
    Predictions,
    check_test_names,
    variant_on,
)
from dinov2.eval.yardsticks import add_yardsticks, classify_by_statistics, warn_of_unseen
from dinov2.utils.files import output_folder

logger = logging.getLogger("dinov2")

DECISIVE_SETTINGS = ("image_size", "whole_image", "autocast")  # of those in the results, what features depend on
PUBLISHED_BATCH_SIZE = 128
NO_MAPPING = "none"
METRIC_OF_UPSTREAM = {"mean_accuracy": "accuracy", "mean_per_class_accuracy": "balanced_accuracy"}


def eval_linear(
    model: nn.Module,
    train_dataset: ImageDataset | None,
    val_dataset: ImageDataset,
    protocol: LinearProtocol | None = None,
    *,
    test_datasets: Mapping[str, ImageDataset] | None = None,
    class_mapping_fpaths: Mapping[str, str | Path] | None = None,
    train_transform: Callable[[Any], Tensor] | None = None,
    classifier_fpath: str | Path | None = None,
    resume: bool = True,
    extraction_batch_size: int | None = None,
    num_workers: int = 4,
    device: torch.device | str | None = None,
    autocast_dtype: torch.dtype | None = None,
    image_statistics: bool = True,
    random_backbone: nn.Module | None = None,
    output_dir: str | Path | None = None,
    weights: str = "",
    settings: Mapping[str, Any] | None = None,
) -> EvaluationResults:
    """Scores a frozen backbone by the best of a grid of linear classifiers, on all processes of the run together.

    The classifier that does best on the validation set is chosen, so its metrics there are a little too good; a test
    set gives the honest ones.

    By default, features are computed once and kept in the memory of every process: 4 bytes x images x width of the
    backbone x (blocks + 1). That suits an inspection with few labels: a random crop may leave out the very defect that
    the label speaks of, a flip may turn a good part into a wrong one, and training takes seconds. The published
    protocol augments: give a ``train_transform``, and features are computed anew for every step.

    Args:
        model: a vision transformer with ``get_intermediate_layers``.
        train_dataset: labelled images to learn from; None only with ``classifier_fpath``.
        val_dataset: labelled images to choose by; with two classes, class 1 is the positive one (a defect).
        protocol: the grid, its training, and how the best is chosen.
        test_datasets: further sets to evaluate the chosen classifier on, by the names that they have in the results.
        class_mapping_fpaths: by ``val`` or the name of a test set, a ``.npy`` file that says which of the training
            set's classes stands for each class of that set; the others are then not predicted there.
        train_transform: augmentation, from an RGB image to a tensor ``[3, H, W]``; by default none.
        classifier_fpath: trained classifiers (``linear_checkpoint.pth`` or ``linear_head.pth``) to evaluate instead of
            training new ones.
        resume: goes on from the checkpoint in ``output_dir``, if there is one.
        extraction_batch_size: images per process and forward pass; by default the protocol's batch size.
        num_workers: processes that decode images, per process of the run.
        device: where to compute; by default where the model lies.
        autocast_dtype: precision of the backbone; by default that of the model. The classifiers are float32.
        image_statistics: shows beside the scores those of a logistic regression on ten statistics of brightness; images
            are decoded once more. Without a training set it does nothing.
        random_backbone: shows beside the scores those of this network, whose classifiers are trained like the others
            but keep no checkpoint. Without a training set it does nothing.
        output_dir: folder that gets ``results.json``, ``predictions.csv`` (one more per test set), ``linear_head.pth``
            (the chosen classifier), ``linear_checkpoint.pth`` and ``linear_metrics.jsonl``; by default nothing is
            written.
        weights: file of the weights, for the results.
        settings: further plain values for the results, such as the image size.

    Raises:
        FileNotFoundError: for a missing class mapping or file of classifiers.
        ValueError: for missing labels, a training set of one class, sets whose classes differ, images that cannot be
            read, features that are not finite, a checkpoint of something else, or settings out of range. Labels and
            settings are checked before anything is computed, a checkpoint once there are features to compare.

    Reference: Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", section B.3.
    """
    protocol = protocol or LinearProtocol()
    device = device_of(model) if device is None else torch.device(device)
    settings = settings or {}
    tests, mappings = test_datasets or {}, class_mapping_fpaths or {}
    given, known = (None, None) if classifier_fpath is None else read_classifiers(classifier_fpath)
    classes, sets = _check_sets(train_dataset, val_dataset, tests, mappings, known)
    val_labels = val_dataset.get_targets()
    val_metric = protocol.val_metric or deciding_metric(val_labels, len(sets[VAL][0]), "accuracy")
    protocol = replace(protocol, val_metric=val_metric)
    check_metric(val_metric, sets[VAL][0], val_labels)
    warn_of_idle_aggregation(protocol.part_aggregation, classes)
    learnt = {} if train_dataset is None else {TRAIN: train_dataset}
    datasets = {**learnt, VAL: val_dataset, **tests}
    origins = find_origins(datasets, weights)
    extra: dict[str, Any] = {}
    if train_dataset is not None:
        train_groups, val_groups = train_dataset.get_group_ids(), val_dataset.get_group_ids()
        extra["num_parts_in_both"] = len(warn_of_shared_parts(train_groups, val_groups))
        for name, dataset in tests.items():
            pair = f"the training or the validation set and {name}"
            warn_of_shared_parts([*train_groups, *val_groups], dataset.get_group_ids(), pair)
    warn_of_unseen(datasets, classes)
    num_blocks = max(classifier.kind.blocks for classifier in given or protocol.grid)

    def evaluate(model: nn.Module, folder: str | Path | None) -> tuple[EvaluationResults, ClassifierStack, int]:
        """Trains (in a folder, from its checkpoint) or takes over classifiers, scores them, and gives the best."""
        backbone = LastBlocks(model, num_blocks)
        batch_size = extraction_batch_size or protocol.batch_size
        extraction = Extraction(backbone, device, batch_size, num_workers, autocast_dtype)
        evaluated = {
            name: EvaluatedSet(extraction.of_dataset(datasets[name]), set_classes, mapping)
            for name, (set_classes, mapping) in sets.items()
        }
        rows = evaluated[VAL].features.embeddings
        embed_dim = rows.shape[1] // (num_blocks + 1)
        described: dict[str, Any]
        if given is not None:
            stacks = stack_classifiers(given, device=device)
            if any(stack.embed_dim != embed_dim for stack in stacks):
                raise ValueError(
                    f"{classifier_fpath} is for backbones of width {stacks[0].embed_dim}, this one has {embed_dim}"
                )
            described = {"classifier_fpath": str(classifier_fpath)}
        else:
            assert train_dataset is not None, "without trained classifiers there is a training set"
            stacks = init_classifiers(protocol.grid, embed_dim, len(classes), seed=protocol.seed, device=device)
            run = TrainingRun(
                protocol=protocol,
                labels=train_dataset.get_targets(),
                num_classes=len(classes),
                global_batch_size=protocol.batch_size * get_world_size(),
            )
            described = {**run.as_dict(), "augment": train_transform is not None}
            checkpoint = None
            if folder is not None:
                Path(folder).mkdir(parents=True, exist_ok=True)
                decisive = {
                    **described,
                    "classes": list(classes),
                    "embed_dim": embed_dim,
                    **{name: value for name, value in settings.items() if name in DECISIVE_SETTINGS},
                    "train_dataset_sha256": origins["datasets"][TRAIN]["sha256"],
                    "weights_sha256": origins["weights"].get("sha256", ""),
                }
                checkpoint = LinearCheckpoint(folder, decisive, probe=rows[0])

            def batches(start: int, stop: int) -> Batches:
                order = {"batch_size": protocol.batch_size, "seed": protocol.seed}
                if train_transform is not None:
                    return augmented_batches(extraction, train_dataset, train_transform, start, stop, **order)
                return cached_batches(extraction.of_dataset(train_dataset), start, stop, device=device, **order)

            train_classifiers(stacks, batches, run, evaluated[VAL], checkpoint=checkpoint, resume=resume)
        results, (stack, place) = _score_classifiers(stacks, evaluated, protocol)
        return replace(results, settings={**described, **results.settings}), stack, place

    results, stack, place = evaluate(model, output_dir)
    by_statistics = None
    if image_statistics and learnt:
        by_statistics = classify_by_statistics(
            datasets, len(classes), "logistic", num_workers=num_workers, device=device
        )
    random = None if random_backbone is None or given is not None else evaluate(random_backbone, None)[0]
    results = add_yardsticks(
        results,
        datasets,
        protocol,
        by_statistics=by_statistics,
        random=random,
        class_mappings={name: mapping for name, (_, mapping) in sets.items() if mapping is not None},
    )
    results = replace(
        results,
        settings={**results.settings, **settings},
        extra={**results.extra, **extra},
        **origins,
    )
    if output_dir is not None and is_main_process():
        write_head(output_folder(output_dir), stack, place, classes)
    results.publish(output_dir)
    return results


def _score_classifiers(
    stacks: Sequence[ClassifierStack], evaluated: Mapping[str, EvaluatedSet], protocol: LinearProtocol
) -> tuple[EvaluationResults, tuple[ClassifierStack, int]]:
    """Scores all classifiers on val, and the best (its stack and place) on every set; the table has one per kind."""
    val = evaluated[VAL]
    scores: dict[str, Scores] = {}
    places: dict[str, tuple[ClassifierStack, int]] = {}
    all_values: dict[str, dict[str, float]] = {}
    best_of_kinds, diverged = [], []
    for stack in stacks:
        values = {}
        for place, (settings, probabilities) in enumerate(all_probabilities([stack], val)):
            if probabilities is None:
                diverged.append(settings.name)
                continue
            places[settings.name] = stack, place
            found = protocol.score(probabilities, val.labels, val.features.group_ids, intervals=False)
            scores[settings.name] = found
            values[settings.name] = {metric: entry.value for metric, entry in found.image.metrics.items()}
        best_of_kinds += [choose(values, protocol.val_metric)] if values else []
        all_values |= values
    chosen = choose(all_values, protocol.val_metric)
    metric = protocol.val_metric.replace("_", " ")
    chosen_by = f"{metric} on the validation set itself, which flatters it there: only a test set gives honest figures"
    if len(scores) == 1:
        chosen_by = "being the only one"
    stack, place = places[chosen]
    predictions = {}
    for name, entry in evaluated.items():
        predictions[name] = Predictions(
            paths=entry.features.paths,
            group_ids=entry.features.group_ids,
            labels=entry.labels,
            probabilities=probabilities_of(stack, place, entry),
            classes=entry.classes,
        )
        scores[variant_on(chosen, name)] = protocol.score(
            predictions[name].probabilities, entry.labels, entry.features.group_ids
        )
    tests = {name: predictions[name] for name in evaluated if name != VAL}
    names = ("val_metric", "part_aggregation", "part_top_k", "num_resamples", "seed")
    results = EvaluationResults(
        evaluator="linear",
        settings={**{name: getattr(protocol, name) for name in names}, "chosen_by": chosen_by},
        classes=val.classes,
        scores=scores,
        chosen=chosen,
        extra={"diverged": diverged},
        predictions=predictions[VAL],
        test_predictions=tests,
        shown=(*best_of_kinds, *(variant_on(chosen, name) for name in tests)),
    )
    return results, (stack, place)


def _check_sets(
    train: ImageDataset | None,
    val: ImageDataset,
    tests: Mapping[str, ImageDataset],
    class_mapping_fpaths: Mapping[str, str | Path],
    classes: tuple[str, ...] | None = None,
) -> tuple[tuple[str, ...], dict[str, tuple[tuple[str, ...], IntArray | None]]]:
    """The classifiers' classes, and the classes and mapping of every evaluated set, checked; no image is read."""
    sets = {VAL: val, **tests}
    check_test_names(tests)
    unknown = [name for name in class_mapping_fpaths if name not in sets]
    if unknown:
        raise ValueError(f"there is a class mapping for {unknown[0]!r}, but the sets are {', '.join(sets)}")
    if classes is None:
        if train is None:
            raise ValueError("without a training set, trained classifiers (classifier_fpath) are needed")
        labels = train.get_targets()
        if VAL in class_mapping_fpaths:
            known = train.classes or tuple(str(label) for label in range(int(labels.max(initial=0)) + 1))
            classes = _classes_of(train, TRAIN, known, None)
        else:
            classes = common_classes(train, val)
        seen = np.unique(labels)
        if len(seen) < 2:
            raise ValueError(
                f"a classifier needs training images of at least two classes, found only {classes[seen[0]]!r}"
            )
    evaluated = {}
    for name, dataset in sets.items():
        path = class_mapping_fpaths.get(name)
        mapping = None if path is None else _read_class_mapping(path, len(classes))
        evaluated[name] = (_classes_of(dataset, name, classes, mapping), mapping)
    return classes, evaluated


def _read_class_mapping(path: str | Path, num_classes: int) -> IntArray:
    """The classifiers' class ``[K]`` for each class of a set, from a ``.npy`` file."""
    try:
        mapping = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"no class mapping at {path}") from None
    except (ValueError, EOFError, OSError) as error:  # numpy's words advise to load it unsafely
        raise ValueError(f"{path} is not a .npy file of integers, as numpy.save writes them") from error
    if not isinstance(mapping, np.ndarray) or mapping.ndim != 1 or not np.issubdtype(mapping.dtype, np.integer):
        raise ValueError(f"{path} must hold integers [classes], found {getattr(mapping, 'dtype', 'an archive')}")
    if len(mapping) == 0 or mapping.min() < 0 or mapping.max() >= num_classes:
        raise ValueError(f"{path} must hold classes in [0, {num_classes}), found {mapping.tolist()[:20]}")
    if len(np.unique(mapping)) < len(mapping):
        raise ValueError(f"{path} names a class twice: {mapping.tolist()[:20]}")
    return mapping.astype(np.int64)


def _classes_of(
    dataset: ImageDataset, name: str, classes: tuple[str, ...], mapping: IntArray | None
) -> tuple[str, ...]:
    """Class names of a set that is evaluated by classifiers of ``classes``, after its labels were checked."""
    labels = dataset.get_targets()
    check_labels(labels, name)
    if mapping is None:
        expected = classes
        if dataset.classes and dataset.classes != classes:
            raise ValueError(
                f"the classes of the {name} set, {list(dataset.classes)}, are not those of the classifiers, "
                f"{list(classes)}; a class mapping can say which stand for which"
            )
    else:
        expected = dataset.classes or tuple(classes[index] for index in mapping)
        if len(expected) != len(mapping):
            raise ValueError(f"the class mapping has {len(mapping)} classes, the {name} set has {len(expected)}")
    if labels.max() >= len(expected):
        raise ValueError(f"label {labels.max()} of the {name} set is outside the {len(expected)} classes")
    return expected


@dataclass(frozen=True)
class LinearOptions(EvaluatorOptions):
    """Options of the command."""

    batch_size: int | None = option(None, help="images per process of a forward pass (usually 64) and of a step (128)")
    test_datasets: tuple[str, ...] = option((), help="further labelled sets to evaluate on, as dataset strings")
    learning_rates: tuple[float, ...] = option(LEARNING_RATES, help="of the grid, for 256 images per step")
    n_last_blocks: tuple[int, ...] = option(N_LAST_BLOCKS, help="of the grid: blocks that give their class token")
    epochs: int = option(10, help="how many")
    epoch_length: int | None = option(
        None, help="iterations of an epoch (published: 1250; usually one pass over the training set, at least 400)"
    )
    eval_period_iterations: int | None = option(
        None, help="iterations between evaluations on the validation set, each with a checkpoint (usually an epoch)"
    )
    augment: bool = option(False, help="random crops and flips, as published; without them, features are computed once")
    class_weighting: str = option("none", help="balanced: all classes count the same", choices=CLASS_WEIGHTINGS)
    val_metric_type: str = option(
        "",
        help="by which the best classifier is chosen on the validation set (usually auroc for two classes, accuracy "
        "for more; upstream: accuracy for all)",
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
        None, help="linear_checkpoint.pth or linear_head.pth: trained classifiers to evaluate, without any training"
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
    # Settings and mappings before anything is opened.
    protocol = LinearProtocol(
        learning_rates=options.learning_rates,
        n_last_blocks=options.n_last_blocks,
        epochs=options.epochs,
        epoch_length=options.epoch_length,
        eval_period_iterations=options.eval_period_iterations,
        batch_size=PUBLISHED_BATCH_SIZE if options.batch_size is None else options.batch_size,
        class_weighting=options.class_weighting,
        val_metric=METRIC_OF_UPSTREAM.get(options.val_metric_type, options.val_metric_type),
        **options.scoring,
    )
    given, count = options.test_class_mapping_fpaths, len(options.test_datasets)
    if given and len(given) != count:
        raise ValueError(
            f"{len(given)} class mappings were given for {count} test sets; '{NO_MAPPING}' stands for none"
        )
    mappings = {} if options.val_class_mapping_fpath is None else {VAL: options.val_class_mapping_fpath}
    named = zip(test_names(count), given, strict=True) if given else ()
    mappings |= {name: path for name, path in named if path != NO_MAPPING}
    needed = (TRAIN, VAL) if options.classifier_fpath is None else (VAL,)
    with evaluator_session(options, needed=needed) as setup:
        if options.features is not None:
            logger.warning("--features has no effect: linear classifiers see class tokens and mean patches of blocks")
        if options.classifier_fpath is not None and options.train_dataset is not None:
            logger.warning("--train-dataset has no effect with --classifier-fpath: nothing is trained")
        if options.classifier_fpath is not None and options.compare_random:
            logger.warning("--compare-random has no effect with --classifier-fpath: nothing is trained")
        chooses = options.classifier_fpath is None and len(protocol.grid) > 1
        if chooses and re.search(r":split=test\b", setup.settings["val_dataset"], re.IGNORECASE):
            logger.warning(
                "--val-dataset names the split TEST, and the best classifier is chosen on it: scores there are no test"
            )
        height, width = setup.settings["image_size"]
        if options.augment and height != width:
            raise ValueError(f"--augment cuts square images, found {height}x{width} (height x width)")
        tests = setup.open_tests(options.test_datasets)
        eval_linear(
            setup.backbone,
            setup.train_dataset if options.classifier_fpath is None else None,
            setup.val_dataset,
            protocol,
            test_datasets=tests,
            class_mapping_fpaths=mappings,
            train_transform=make_classification_train_transform(height) if options.augment else None,
            classifier_fpath=options.classifier_fpath,
            resume=options.resume,
            extraction_batch_size=setup.batch_size,
            num_workers=setup.num_workers,
            device=setup.device,
            autocast_dtype=setup.autocast_dtype,
            **setup.yardsticks,
            **setup.reporting
            | {"settings": {**setup.settings, "test_datasets": name_tests(options.test_datasets, tests)}},
        )
    return 0


if __name__ == "__main__":
    run_as("linear")
