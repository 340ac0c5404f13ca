"""Linear classification of frozen features: a grid of classifiers, of which the best on the validation set is kept."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dinov2.config.command_line import option, parse
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.loaders import make_dataset
from dinov2.data.transforms import make_classification_train_transform
from dinov2.distributed import is_main_process
from dinov2.eval.command import TRAIN, VAL, EvaluatorOptions, EvaluatorSetup, evaluator_session
from dinov2.eval.features import (
    common_classes,
    device_of,
    name_some,
    shared_parts,
    warn_of_idle_aggregation,
    warn_of_shared_parts,
    warn_of_unseen_classes,
)
from dinov2.eval.linear.training import (
    CLASS_WEIGHTINGS,
    LEARNING_RATES,
    METRICS,
    N_LAST_BLOCKS,
    BatchSource,
    CachedBatches,
    ClassifierStack,
    Extraction,
    ImageBatches,
    JudgedSet,
    LastBlocks,
    LinearCheckpoint,
    LinearProtocol,
    TrainingRun,
    check_metric,
    choose,
    init_classifiers,
    probabilities_of,
    read_classifiers,
    score_all,
    stack_classifiers,
    train_classifiers,
    write_head,
)
from dinov2.eval.metrics.classification import IntArray, MetricValue, Scores, score_predictions
from dinov2.eval.results import PREDICTIONS_FILE, EvaluationResults, Predictions, align, find_origins
from dinov2.utils.files import write_text_atomically


@dataclass(frozen=True, eq=False)
class SetToJudge:
    """A labelled set, and what its labels mean to the classifiers.

    Attributes:
        dataset: with all labels.
        classes: of its labels.
        class_mapping: ``[len(classes)]``, the classifiers' class that stands for each; None where they are the same.
    """

    dataset: ImageDataset
    classes: tuple[str, ...]
    class_mapping: IntArray | None = None


@dataclass(frozen=True, eq=False)
class LinearSets:
    """The sets of an evaluation, checked.

    Attributes:
        classes: that the classifiers know.
        train: to learn from; None where the classifiers are trained already.
        judged: ``val``, by which the best classifier is chosen, and the test sets, by name.
    """

    classes: tuple[str, ...]
    train: ImageDataset | None
    judged: Mapping[str, SetToJudge]

    @property
    def datasets(self) -> dict[str, ImageDataset]:
        """All sets by name."""
        learnt = {} if self.train is None else {TRAIN: self.train}
        return learnt | {name: judged.dataset for name, judged in self.judged.items()}


def check_sets(
    train: ImageDataset | None,
    val: ImageDataset,
    tests: Mapping[str, ImageDataset],
    class_mapping_fpaths: Mapping[str, str | Path],
    classes: tuple[str, ...] | None = None,
) -> LinearSets:
    """Checks labels, classes and class mappings of all sets; no image is read.

    Args:
        train: to learn from; None where the classifiers are trained already.
        val: to choose the best classifier by.
        tests: further sets, by name.
        class_mapping_fpaths: file of the class mapping of a judged set, by name.
        classes: of classifiers that are trained already; None to take those of the training set.

    Raises:
        FileNotFoundError: for a class mapping that is not there.
        ValueError: for what is wrong with a set, naming it.
    """
    sets = {VAL: val, **tests}
    for name in tests:
        if name in (TRAIN, VAL) or not name or Path(name).name != name:
            raise ValueError(f"a test set cannot be named {name!r}")
    unknown = [name for name in class_mapping_fpaths if name not in sets]
    if unknown:
        raise ValueError(f"there is a class mapping for {unknown[0]!r}, but the sets are {', '.join(sets)}")
    if classes is None:
        if train is None:
            raise ValueError("without a training set, trained classifiers (classifier_fpath) are needed")
        classes = _training_classes(train, val, VAL in class_mapping_fpaths)
    judged = {}
    for name, dataset in sets.items():
        path = class_mapping_fpaths.get(name)
        mapping = None if path is None else read_class_mapping(path, len(classes))
        judged[name] = SetToJudge(dataset, classes_of(dataset, name, classes, mapping), mapping)
    return LinearSets(classes, train, judged)


def read_class_mapping(path: str | Path, num_classes: int) -> IntArray:
    """Reads which of the classifiers' classes stands for each class of another set.

    Args:
        path: ``.npy`` file of one integer per class of the set.
        num_classes: how many classes the classifiers know.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it holds something else, a class that the classifiers do not know, or a class twice.
    """
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


def classes_of(dataset: ImageDataset, name: str, classes: tuple[str, ...], mapping: IntArray | None) -> tuple[str, ...]:
    """Class names of a set that is judged by classifiers of ``classes``.

    Raises:
        ValueError: for an empty set, missing labels, labels outside the classes, or classes that differ from the
            classifiers' (from the mapping's number, where there is one).
    """
    labels = dataset.get_targets()
    if len(labels) == 0:
        raise ValueError(f"the {name} set has no images")
    missing = int((labels < 0).sum())
    if missing:
        raise ValueError(f"{missing} of {len(labels)} images of the {name} set have no label; all need one")
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


def _training_classes(train: ImageDataset, val: ImageDataset, val_is_mapped: bool) -> tuple[str, ...]:
    labels = train.get_targets()
    if val_is_mapped:
        known = train.classes or tuple(str(label) for label in range(int(labels.max(initial=0)) + 1))
        classes = classes_of(train, TRAIN, known, None)
    else:
        classes = common_classes(train, val)
    seen = np.unique(labels)
    if len(seen) < 2:
        raise ValueError(f"a classifier needs training images of at least two classes, found only {classes[seen[0]]!r}")
    return classes


@dataclass(frozen=True, eq=False)
class Verdict:
    """What became of a linear evaluation.

    Attributes:
        results: of all classifiers on the validation set, and of the chosen one on the test sets.
        chosen: the chosen classifier: its stack and its place there.
        classes: that it knows.
        best_of_kinds: names of the best classifier of each kind of features.
        test_predictions: of the chosen classifier, by test set, with the classes of that set.
    """

    results: EvaluationResults
    chosen: tuple[ClassifierStack, int]
    classes: tuple[str, ...]
    best_of_kinds: tuple[str, ...]
    test_predictions: Mapping[str, tuple[Predictions, tuple[str, ...]]]

    def table(self) -> str:
        """Text for people: the best classifier of each kind of features, and the chosen one on the test sets.

        The results hold the others too; a table of all would be longer than a screen.
        """
        chosen = self.results.chosen
        tests = {name: f"{chosen} on {name}" for name in self.test_predictions}
        shown = {name: self.results.scores[name] for name in (*self.best_of_kinds, *tests.values())}
        blocks = [replace(self.results, scores=shown).table()]
        if tests:
            columns = {name: self.results.scores[variant] for name, variant in {VAL: chosen, **tests}.items()}
            blocks.append(side_by_side(chosen, columns))
        return "\n".join(blocks)

    def write(self, output_dir: str | Path) -> None:
        """Writes the chosen classifier, its predictions and, last, the results into a folder, made if needed."""
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_head(folder, *self.chosen, self.classes)
        for name, (predictions, classes) in self.test_predictions.items():
            write_text_atomically(folder / test_predictions_file(name), predictions.to_csv(classes))
        self.results.write(folder)


def test_predictions_file(name: str) -> str:
    """Name of the file with the predictions of a test set."""
    path = Path(PREDICTIONS_FILE)
    return f"{path.stem}_{name.replace(' ', '_')}{path.suffix}"


def judge_classifiers(
    stacks: Sequence[ClassifierStack],
    judged: Mapping[str, JudgedSet],
    classes: tuple[str, ...],
    protocol: LinearProtocol,
) -> Verdict:
    """Scores all classifiers on the validation set, chooses the best, and scores that one on every set with intervals.

    Args:
        stacks: the classifiers.
        judged: ``val`` and the test sets, by name.
        classes: that the classifiers know.
        protocol: says by which metric to choose, and how parts are scored.

    Raises:
        ValueError: when all classifiers have diverged.
    """
    val = judged[VAL]
    scores, diverged = score_all(stacks, val, aggregation=protocol.part_aggregation, top_k=protocol.part_top_k)
    figures = {name: levels.image.metrics[protocol.val_metric].value for name, levels in scores.items()}
    chosen = choose(figures)
    stack, place = _find(stacks, chosen)
    predictions = {}
    for name, entry in judged.items():
        predictions[name] = _predict(stack, place, entry)
        scores[chosen if name == VAL else f"{chosen} on {name}"] = _score(predictions[name], protocol)
    results = EvaluationResults(
        evaluator="linear",
        settings={**protocol.judging(), "chosen_by": _chosen_by(protocol, len(figures))},
        classes=val.classes,
        scores=scores,
        chosen=chosen,
        extra={"diverged": diverged},
        predictions=predictions[VAL],
    )
    return Verdict(
        results=results,
        chosen=(stack, place),
        classes=classes,
        best_of_kinds=_best_of_kinds(stacks, figures),
        test_predictions={name: (predictions[name], judged[name].classes) for name in judged if name != VAL},
    )


def side_by_side(title: str, columns: Mapping[str, Scores]) -> str:
    """The figures of one classifier on several sets with their intervals, per image and per part, as text."""
    blocks = []
    for level in ("image", "part"):
        scored = {name: getattr(scores, level) for name, scores in columns.items()}
        names = dict.fromkeys(figure for entry in scored.values() for figure in entry.metrics)
        rows = [
            [f"{title}, per {level}", *(f"{name} ({entry.count})" for name, entry in scored.items())],
            *([f"  {figure}", *(_cell(entry.metrics.get(figure)) for entry in scored.values())] for figure in names),
        ]
        blocks.append("\n".join(align(rows)))
    return "\n".join(blocks)


def _best_of_kinds(stacks: Sequence[ClassifierStack], figures: Mapping[str, float]) -> tuple[str, ...]:
    best = []
    for stack in stacks:
        own = {settings.name: figures[settings.name] for settings in stack.settings if settings.name in figures}
        best += [choose(own)] if own else []
    return tuple(best)


def _chosen_by(protocol: LinearProtocol, num_classifiers: int) -> str:
    if num_classifiers == 1:
        return "being the only one"
    metric = protocol.val_metric.replace("_", " ")
    return f"{metric} on the validation set itself, which flatters it there: only a test set gives honest figures"


def _find(stacks: Sequence[ClassifierStack], name: str) -> tuple[ClassifierStack, int]:
    for stack in stacks:
        for place, settings in enumerate(stack.settings):
            if settings.name == name:
                return stack, place
    raise AssertionError(f"no classifier is named {name}")


def _predict(stack: ClassifierStack, place: int, judged: JudgedSet) -> Predictions:
    return Predictions(
        paths=judged.features.paths,
        group_ids=judged.features.group_ids,
        labels=judged.labels,
        probabilities=probabilities_of(stack, place, judged),
    )


def _score(predictions: Predictions, protocol: LinearProtocol) -> Scores:
    return score_predictions(
        predictions.probabilities,
        predictions.labels,
        predictions.group_ids,
        aggregation=protocol.part_aggregation,
        top_k=protocol.part_top_k,
        num_resamples=protocol.num_resamples,
        seed=protocol.seed,
    )


def _cell(figure: MetricValue | None) -> str:
    if figure is None:
        return "-"
    bounds = "" if figure.low is None or figure.high is None else f" [{figure.low:.4f}, {figure.high:.4f}]"
    return f"{figure.value:.4f}{bounds}"


__all__ = ["LinearProtocol", "eval_linear"]

logger = logging.getLogger("dinov2")

DECISIVE_SETTINGS = ("image_size", "whole_image", "autocast")  # of those in the results, what features depend on


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
    output_dir: str | Path | None = None,
    weights: str = "",
    settings: Mapping[str, Any] | None = None,
) -> EvaluationResults:
    """Scores a frozen backbone by the best of a grid of linear classifiers, on all processes of the run together.

    The classifier that does best on the validation set is chosen, so its figures there are a little too good; a test
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
        test_datasets: further sets to judge the chosen classifier on, by the names that they have in the results.
        class_mapping_fpaths: by ``val`` or the name of a test set, a ``.npy`` file that says which of the training
            set's classes stands for each class of that set; the others are then not predicted there.
        train_transform: augmentation, from an RGB image to a tensor ``[3, H, W]``; by default none.
        classifier_fpath: trained classifiers (``linear_checkpoint.pth`` or ``linear_head.pth``) to judge instead of
            training new ones.
        resume: goes on from the checkpoint in ``output_dir``, if there is one.
        extraction_batch_size: images per process and forward pass; by default the protocol's batch size.
        num_workers: processes that decode images, per process of the run.
        device: where to compute; by default where the model lies.
        autocast_dtype: precision of the backbone; by default that of the model. The classifiers are float32.
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
    given, classes = (None, None) if classifier_fpath is None else read_classifiers(classifier_fpath)
    sets = check_sets(train_dataset, val_dataset, test_datasets or {}, class_mapping_fpaths or {}, classes)
    check_metric(protocol.val_metric, sets.judged[VAL].classes, sets.judged[VAL].dataset.get_targets())
    warn_of_idle_aggregation(protocol.part_aggregation, sets.classes)
    backbone = LastBlocks(model, max(classifier.kind.blocks for classifier in given or protocol.grid))
    extraction = Extraction(backbone, device, extraction_batch_size or protocol.batch_size, num_workers, autocast_dtype)
    origins = find_origins(sets.datasets, weights)
    extra = _warn_of_sets(sets)
    judged = {
        name: JudgedSet(extraction.of_dataset(entry.dataset), entry.classes, entry.class_mapping)
        for name, entry in sets.judged.items()
    }
    if given is not None:
        stacks = _fitting(stack_classifiers(given, device=device), judged[VAL], backbone, classifier_fpath)
        described: dict[str, Any] = {"classifier_fpath": str(classifier_fpath)}
    else:
        folder = None if output_dir is None else Path(output_dir)
        seen = {name: value for name, value in (settings or {}).items() if name in DECISIVE_SETTINGS}
        training = _Training(sets, judged[VAL], extraction, train_transform, protocol, {**seen, **_digests(origins)})
        stacks, described = training.run(folder, resume)
    verdict = judge_classifiers(stacks, judged, sets.classes, protocol)
    results = replace(
        verdict.results,
        settings={**described, **verdict.results.settings, **(settings or {})},
        extra={**verdict.results.extra, **extra},
        **origins,
    )
    if is_main_process():
        verdict = replace(verdict, results=results)
        logger.info("%s", verdict.table())
        if output_dir is not None:
            verdict.write(output_dir)
    return results


@dataclass(frozen=True)
class _Training:
    """What a training of the grid needs; see `eval_linear`. ``seen`` says what the features come from."""

    sets: LinearSets
    val: JudgedSet
    extraction: Extraction
    transform: Callable[[Any], Tensor] | None
    protocol: LinearProtocol
    seen: Mapping[str, Any]

    def run(self, folder: Path | None, resume: bool) -> tuple[tuple[ClassifierStack, ...], dict[str, Any]]:
        """Trains, with a checkpoint in the folder if there is one; returns classifiers and settings for the results."""
        classes = self.sets.classes
        run = TrainingRun.plan(self.protocol, self._dataset, len(classes))
        described = {**run.as_dict(), "augment": self.transform is not None}
        rows = self.val.features.embeddings
        embed_dim = rows.shape[1] // (self.extraction.backbone.num_blocks + 1)
        stacks = init_classifiers(
            self.protocol.grid, embed_dim, len(classes), seed=self.protocol.seed, device=self.extraction.device
        )
        checkpoint = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            decisive = {**described, "classes": list(classes), "embed_dim": embed_dim, **self.seen}
            checkpoint = LinearCheckpoint(folder, decisive, probe=rows[0])
        train_classifiers(stacks, self._source, run, self.val, checkpoint=checkpoint, resume=resume)
        return stacks, described

    @property
    def _dataset(self) -> ImageDataset:
        assert self.sets.train is not None, "sets without trained classifiers have a training set"
        return self.sets.train

    def _source(self) -> BatchSource:
        batch_size, seed = self.protocol.batch_size, self.protocol.seed
        if self.transform is not None:
            return ImageBatches(self.extraction, self._dataset, self.transform, batch_size=batch_size, seed=seed)
        features = self.extraction.of_dataset(self._dataset)
        return CachedBatches(features, batch_size=batch_size, seed=seed, device=self.extraction.device)


def _digests(origins: Mapping[str, Any]) -> dict[str, str]:
    """Which images and weights the features of the training set come from."""
    return {
        "train_dataset_sha256": origins["datasets"][TRAIN]["sha256"],
        "weights_sha256": origins["weights"].get("sha256", ""),
    }


def _fitting(
    stacks: tuple[ClassifierStack, ...], val: JudgedSet, backbone: LastBlocks, path: str | Path | None
) -> tuple[ClassifierStack, ...]:
    """The stacks, if they see features as wide as those of the backbone."""
    embed_dim = val.features.embeddings.shape[1] // (backbone.num_blocks + 1)
    if any(stack.embed_dim != embed_dim for stack in stacks):
        raise ValueError(f"{path} is for backbones of width {stacks[0].embed_dim}, this one has {embed_dim}")
    return stacks


def _warn_of_sets(sets: LinearSets) -> dict[str, Any]:
    """Says on the main process what about the sets makes figures worse or better than they should be."""
    if sets.train is None:
        return {}
    groups = {name: dataset.get_group_ids() for name, dataset in sets.datasets.items()}
    extra = {"num_parts_in_both": len(warn_of_shared_parts(groups[TRAIN], groups[VAL]))}
    warn_of_unseen_classes(sets.train.get_targets().tolist(), sets.classes)
    if not is_main_process():
        return extra
    for name in sets.judged:
        shared = [] if name == VAL else shared_parts([*groups[TRAIN], *groups[VAL]], groups[name])
        if shared:
            logger.warning(
                "%d parts of %s are in the training or the validation set too, so its scores are too good: %s",
                len(shared),
                name,
                name_some(shared),
            )
    return extra


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
