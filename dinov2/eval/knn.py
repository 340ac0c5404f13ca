"""Weighted nearest-neighbour classification of frozen features, per image and per part."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dinov2.config.command_line import option, parse, run_as
from dinov2.data.datasets.base import ImageDataset
from dinov2.distributed import is_main_process
from dinov2.eval.command import EvaluatorOptions, evaluator_session, find_origins, flag_pairs
from dinov2.eval.features import (
    ALL,
    TRAIN,
    VAL,
    Features,
    ModelWithFeatures,
    ModelWithNormalize,
    check_few_shot,
    check_finite_features,
    common_classes,
    device_of,
    extract_features,
    few_shot_subset,
    shared_parts,
    warn_of_idle_aggregation,
    warn_of_shared_parts,
)
from dinov2.eval.metrics.classification import (
    CHOICE_METRICS,
    RANKING_METRICS,
    FloatArray,
    IntArray,
    Scores,
    ScoringSettings,
    choice_key,
    classification_metrics,
    deciding_metric,
    score_parts,
)
from dinov2.eval.neighbours import nearest_neighbours, nearest_of_other_parts, num_rows_of_other_parts
from dinov2.eval.results import EvaluationResults, Predictions, mean_scores, summarise_tries
from dinov2.eval.yardsticks import add_yardsticks, classify_by_statistics, warn_of_unseen
from dinov2.utils.seeds import derive_seed

logger = logging.getLogger("dinov2")

MAX_IMAGES_FOR_CHOICE = 10_000


@dataclass(frozen=True, kw_only=True)
class KnnSettings(ScoringSettings):
    """Everything but the features that decides the metrics of a k-NN evaluation.

    Attributes:
        nb_knn: numbers of neighbours.
        temperature: of the softmax over similarities that weighs the neighbours.
        leave_one_part_out: the images of a query's own part do not vote.
        gather_on_cpu: keeps the bank in host memory.
        device: where similarities are computed.
        n_per_class_list: images per class in few-shot banks; -1 for the whole bank.
        n_tries: few-shot banks per number of images.
        metric: by which the number of neighbours is chosen, one of `CHOICE_METRICS`; empty for the AUROC of two classes
            and the balanced accuracy of more.
        seed: of the resamples, and of the parts that choose the number of neighbours in a large bank.
    """

    nb_knn: tuple[int, ...] = (10, 20, 100, 200)
    temperature: float = 0.07
    leave_one_part_out: bool = False
    gather_on_cpu: bool = False
    device: torch.device | str = "cpu"
    n_per_class_list: tuple[int, ...] = (ALL,)
    n_tries: int = 1
    metric: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.nb_knn or min(self.nb_knn) < 1:
            raise ValueError(f"nb_knn must be one or more numbers from 1 up, found {sorted(self.nb_knn)}")
        if not self.temperature > 0:
            raise ValueError(f"the temperature must be above 0, found {self.temperature}")
        if self.metric not in ("", *CHOICE_METRICS):
            raise ValueError(f"metric {self.metric!r} is not one of {', '.join(CHOICE_METRICS)}")
        check_few_shot(self.n_per_class_list, self.n_tries)

    def metric_for(self, labels: IntArray, num_classes: int) -> str:
        """The metric by which images with these labels choose the number of neighbours.

        Raises:
            ValueError: for one that needs two classes that both occur.
        """
        if self.metric in RANKING_METRICS and deciding_metric(labels, num_classes) != "auroc":
            raise ValueError(
                f"{self.metric} needs two classes that both occur; the images that choose k show "
                f"{len(np.unique(labels))} of {num_classes}: choose by accuracy or balanced_accuracy"
            )
        return self.metric or deciding_metric(labels, num_classes)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, without those that do not change metrics."""
        values = asdict(self)
        del values["device"], values["gather_on_cpu"]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def eval_knn(
    model: nn.Module,
    train_dataset: ImageDataset,
    val_dataset: ImageDataset | None = None,
    *,
    nb_knn: Iterable[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    leave_one_part_out: bool = False,
    n_per_class_list: Sequence[int] = (ALL,),
    n_tries: int = 1,
    batch_size: int = 256,
    num_workers: int = 4,
    device: torch.device | str | None = None,
    autocast_dtype: torch.dtype | None = None,
    gather_on_cpu: bool = False,
    features: str = "cls",
    part_aggregation: str = "max",
    part_top_k: int = 3,
    num_resamples: int = 1000,
    metric: str = "",
    seed: int = 0,
    image_statistics: bool = True,
    random_backbone: nn.Module | None = None,
    output_dir: str | Path | None = None,
    weights: str = "",
    settings: Mapping[str, Any] | None = None,
) -> EvaluationResults:
    """Scores a frozen backbone by its nearest labelled neighbours, on all processes of the run together.

    The number of neighbours is chosen by the bank alone (see `choose_k`), so that the chosen metrics are honest.

    Args:
        model: maps images ``[B, 3, H, W]`` to features ``[B, D]``, which are normalised here.
        train_dataset: the bank of labelled images.
        val_dataset: the images to classify; with two classes, class 1 is the positive one (a defect). None takes the
            bank, which needs ``leave_one_part_out``.
        nb_knn: numbers of neighbours, clipped to the images that can vote.
        temperature: of the softmax over similarities that weighs the neighbours.
        leave_one_part_out: images of an image's own part do not vote, so that one dataset can be bank and evaluated
            set.
        n_per_class_list: images per class of few-shot banks, -1 for the whole bank. Numbers of neighbours are then
            those of ``nb_knn`` that do not exceed the images per class, and that number itself.
        n_tries: few-shot banks per number, drawn with seeds 0, 1, …; their metrics' mean and spread are reported.
        batch_size: images per process and forward pass.
        num_workers: processes that decode images, per process of the run.
        device: where to compute; by default where the model lies.
        autocast_dtype: precision of the forward pass; by default that of the model.
        gather_on_cpu: keeps the bank's features in host memory, for banks larger than the device.
        features: what describes an image, see `ModelWithFeatures`.
        part_aggregation: how a part joins its images, see `score_parts`.
        part_top_k: images that count with ``topk_mean``.
        num_resamples: resamples of parts behind the intervals; 0 gives none.
        metric: by which the number of neighbours is chosen: empty for the AUROC of two classes and the balanced
            accuracy of more; ``balanced_accuracy`` is what two classes had before, too.
        seed: of the resamples.
        image_statistics: shows beside the scores those of ten statistics of brightness; images are decoded once more.
        random_backbone: shows beside the scores those of this network.
        output_dir: folder that gets ``results.json`` and ``predictions.csv``; by default nothing is written.
        weights: file of the weights, for the results.
        settings: further plain values for the results, such as the image size.

    Raises:
        ValueError: for missing labels, sets whose classes differ, images that cannot be read, features that are not
            finite, or settings out of range. Labels and settings are checked before anything is computed.
    """
    if val_dataset is None and not leave_one_part_out:
        raise ValueError("k-NN without a validation set needs leave_one_part_out: an image would find itself")
    device = device_of(model) if device is None else torch.device(device)
    knn = KnnSettings(
        nb_knn=tuple(nb_knn),
        temperature=temperature,
        leave_one_part_out=leave_one_part_out,
        gather_on_cpu=gather_on_cpu,
        device=device,
        n_per_class_list=tuple(n_per_class_list),
        n_tries=n_tries,
        metric=metric,
        part_aggregation=part_aggregation,
        part_top_k=part_top_k,
        num_resamples=num_resamples,
        seed=seed,
    )
    evaluated = train_dataset if val_dataset is None else val_dataset
    classes = common_classes(train_dataset, evaluated)
    knn.metric_for(train_dataset.get_targets(), len(classes))
    warn_of_idle_aggregation(part_aggregation, classes)
    datasets = {TRAIN: train_dataset, VAL: evaluated}
    warn_of_unseen(datasets, classes)
    extract = partial(
        extract_features,
        batch_size=batch_size,
        num_workers=num_workers,
        device=device,
        autocast_dtype=autocast_dtype,
    )

    def evaluate(model: nn.Module) -> EvaluationResults:
        described = ModelWithNormalize(ModelWithFeatures(model, features))
        train = extract(described, train_dataset)
        val = train if evaluated is train_dataset else extract(described, evaluated)
        return score_features(train, val, classes, knn)

    results = evaluate(model)
    by_statistics = None
    if image_statistics:
        by_statistics = classify_by_statistics(
            datasets,
            len(classes),
            "knn",
            leave_one_part_out=leave_one_part_out,
            num_workers=num_workers,
            device=device,
        )
    random = None if random_backbone is None else evaluate(random_backbone)
    results = add_yardsticks(results, datasets, knn, by_statistics=by_statistics, random=random)
    results = replace(
        results,
        settings={"features": features, **results.settings, **(settings or {})},
        **find_origins(datasets, weights),
    )
    results.publish(output_dir)
    return results


def score_features(
    train: Features, val: Features, classes: tuple[str, ...], settings: KnnSettings | None = None
) -> EvaluationResults:
    """Scores features that are already there; see `eval_knn`. Rows must have unit length and labels in ``classes``.

    Raises:
        ValueError: for features that are not finite, or when no image can vote.
    """
    settings = settings or KnnSettings()
    check_finite_features(train.embeddings, train.paths, "training")
    check_finite_features(val.embeddings, val.paths, "validation")
    if settings.leave_one_part_out:
        shared = shared_parts(train.group_ids, val.group_ids)
        if not shared and is_main_process():
            logger.warning("leave_one_part_out has no effect: no part is in both sets")
    else:
        shared = warn_of_shared_parts(train.group_ids, val.group_ids)
    scores: dict[str, Scores] = {}
    extra: dict[str, Any] = {"num_parts_in_both": len(shared)}
    labels = val.labels.numpy()
    chosen, chosen_by, predictions = "", {}, None
    if ALL in settings.n_per_class_list:
        whole = replace(settings, nb_knn=_clip_nb_knn(settings.nb_knn, _num_voters(train, val, settings)))
        probabilities = neighbour_probabilities(train, val, len(classes), whole)
        scores = {f"k={k}": settings.score(rows, labels, val.group_ids) for k, rows in probabilities.items()}
        ks = whole.nb_knn
        if len(ks) == 1:
            k, why = ks[0], "being the only one"
        elif val is train:
            metric = settings.metric_for(labels, len(classes))
            found = {k: {name: one.value for name, one in scores[f"k={k}"].image.metrics.items()} for k in ks}
            k = max(ks, key=lambda k: choice_key(found[k], metric))
            why = f"{_in_words(metric)} over the judged images themselves, so its figures are optimistic"
        elif (best := choose_k(train, len(classes), whole)) is not None:
            metric = settings.metric_for(train.labels.numpy(), len(classes))
            k, why = best, f"{_in_words(metric)} over the training images, each without its own part"
        else:
            k, why = ks[0], "being the first: the training set is a single part, which cannot judge itself"
        chosen, chosen_by = f"k={k}", {"chosen_by": why}
        extra["num_parts_of_several_labels"] = score_parts(probabilities[k], labels, val.group_ids).num_mixed
        predictions = Predictions(
            paths=val.paths, group_ids=val.group_ids, labels=labels, probabilities=probabilities[k]
        )
    for n_per_class in sorted(set(settings.n_per_class_list) - {ALL}):
        banks = [train.select(few_shot_subset(train.labels, n_per_class, seed)) for seed in range(settings.n_tries)]
        asked = {k for k in settings.nb_knn if k < n_per_class} | {n_per_class}
        few = replace(settings, nb_knn=_clip_nb_knn(asked, min(_num_voters(bank, val, settings) for bank in banks)))
        tries: dict[str, list[Scores]] = {f"n={n_per_class} k={k}": [] for k in few.nb_knn}
        for bank in banks:
            for k, rows in neighbour_probabilities(bank, val, len(classes), few).items():
                tries[f"n={n_per_class} k={k}"].append(few.score(rows, labels, val.group_ids, intervals=False))
        scores |= {name: mean_scores(found) for name, found in tries.items()}
        extra.setdefault("few_shot", {}).update({name: summarise_tries(found) for name, found in tries.items()})
    return EvaluationResults(
        evaluator="knn",
        settings=settings.as_dict() | chosen_by,
        classes=classes,
        scores=scores,
        chosen=chosen,
        extra=extra,
        predictions=predictions,
    )


def neighbour_probabilities(
    bank: Features, queries: Features, num_classes: int, settings: KnnSettings
) -> dict[int, FloatArray]:
    """Class probabilities ``[M, C]`` of the queries by number of neighbours; rows sum to 1.

    Raises:
        ValueError: when the bank has fewer rows than the largest number of neighbours; see `_clip_nb_knn`.
    """
    search = partial(nearest_neighbours, queries.embeddings, bank.embeddings)
    if settings.leave_one_part_out:
        search = partial(nearest_of_other_parts, queries.embeddings, queries.group_ids, bank.embeddings, bank.group_ids)
    similarities, rows = search(max(settings.nb_knn), device=settings.device, bank_on_cpu=settings.gather_on_cpu)
    neighbour_labels = bank.labels[rows]
    probabilities = {}
    for k in settings.nb_knn:
        votes = knn_votes(similarities, neighbour_labels, k, settings.temperature, num_classes).double()
        # The sum differs between images for all but the largest k; only shares of it can be compared between images.
        probabilities[k] = (votes / votes.sum(dim=1, keepdim=True)).numpy()
    return probabilities


def knn_votes(
    similarities: Tensor, neighbour_labels: Tensor, num_neighbours: int, temperature: float, num_classes: int
) -> Tensor:
    """Weighs the classes of the nearest neighbours.

    The weights are a softmax over *all* neighbours given, of which the first ``num_neighbours`` vote; rows therefore
    sum to 1 only where all of them do.

    Args:
        similarities: ``[M, K]`` from large to small.
        neighbour_labels: ``[M, K]`` int64 in ``[0, num_classes)``.
        num_neighbours: in ``[1, K]``.
        temperature: divides the similarities.
        num_classes: width of the result.

    Returns:
        Sum of the weights per class, ``[M, num_classes]``.

    Reference: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", section 3.4.
    """
    weights = (similarities / temperature).softmax(dim=1)[:, :num_neighbours]
    votes = weights.new_zeros(len(similarities), num_classes)
    return votes.scatter_add_(1, neighbour_labels[:, :num_neighbours], weights)


def _num_voters(bank: Features, queries: Features, settings: KnnSettings) -> int:
    """How many images of the bank can vote on every query."""
    return num_rows_of_other_parts(queries.group_ids, bank.group_ids) if settings.leave_one_part_out else len(bank)


def _clip_nb_knn(nb_knn: Iterable[int], voters: int) -> tuple[int, ...]:
    """Numbers of neighbours from small to large, none above the number of images that can vote and none twice."""
    asked = sorted(set(nb_knn))
    if voters < 1:
        raise ValueError("the bank has no image that can vote; leaving one part out needs at least two parts")
    ks = tuple(sorted({min(k, voters) for k in asked}))
    if list(ks) != asked and is_main_process():
        logger.info("nb_knn %s clipped to the %d images that can vote: %s", asked, voters, list(ks))
    return ks


def choose_k(bank: Features, num_classes: int, settings: KnnSettings) -> int | None:
    """The number of neighbours with which the bank classifies itself best, every image without its own part.

    No other image takes part, so metrics on a validation set stay those of images that decided nothing. The metric is
    that of `KnnSettings.metric` over images (see `choice_key`); of equal numbers the smallest wins. Above 10,000
    images, whole parts are drawn until there are as many. A number of neighbours that the bank without a part does not
    have stands for all there are.

    Returns:
        The number; None for a bank of one part, which cannot classify itself.
    """
    queries = bank
    if len(bank) > MAX_IMAGES_FOR_CHOICE:
        parts = sorted(set(bank.group_ids))
        order = np.random.default_rng(derive_seed(settings.seed, "parts to choose k by")).permutation(len(parts))
        place = {parts[number]: position for position, number in enumerate(order)}
        places = np.array([place[part] for part in bank.group_ids])
        kept = places < places[np.argsort(places, kind="stable")][MAX_IMAGES_FOR_CHOICE]
        kept |= places == 0  # one part alone may have more
        queries = bank.select(torch.from_numpy(np.flatnonzero(kept)))
    settings = replace(settings, leave_one_part_out=True)
    voters = _num_voters(bank, queries, settings)
    if voters < 1:
        return None
    possible = {k: min(k, voters) for k in sorted(settings.nb_knn)}
    settings = replace(settings, nb_knn=tuple(sorted(set(possible.values()))))
    labels = queries.labels.numpy()
    metric = settings.metric_for(labels, num_classes)
    values = {
        k: choice_key(classification_metrics(probabilities, labels), metric)
        for k, probabilities in neighbour_probabilities(bank, queries, num_classes, settings).items()
    }
    return max(possible, key=lambda k: values[possible[k]])


def _in_words(metric: str) -> str:
    return {"auroc": "AUROC"}.get(metric, metric.replace("_", " "))


CONFIG_OF_FLAG = {"nb_knn": "nb_knn", "temperature": "temperature"}


@dataclass(frozen=True)
class KnnOptions(EvaluatorOptions):
    """Options of the command."""

    nb_knn: tuple[int, ...] | None = option(None, help="numbers of neighbours (usually 10 20 100 200)")
    temperature: float | None = option(None, help="temperature of the neighbours' votes (usually 0.07)")
    metric: str = option(
        "",
        help="by which the training images choose the number of neighbours (usually auroc for two classes, "
        "balanced_accuracy for more; before, balanced_accuracy for all)",
        choices=CHOICE_METRICS,
    )
    gather_on_cpu: bool = option(False, help="keep the bank in host memory, for one larger than the GPU")
    n_per_class_list: tuple[int, ...] = option((ALL,), help="images per class of few-shot banks; -1: the whole bank")
    n_tries: int = option(1, help="few-shot banks per number of images")
    leave_one_part_out: bool = option(
        False, help="images of an image's own part do not vote; one dataset is then enough"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the words after its name; returns the exit code."""
    options = parse(
        KnnOptions,
        argv,
        description="Scores a frozen backbone by weighted nearest-neighbour classification, per image and per part.",
        example=(
            "python eval/knn.py --config-file configs/eval/vitl14_pretrain.yaml --pretrained-weights W.pth "
            "--train-dataset GroupedJSON:split=TRAIN:root=/data/parts "
            "--val-dataset GroupedJSON:split=VAL:root=/data/parts --output-dir outputs/knn"
        ),
    )
    pairs = flag_pairs(options, CONFIG_OF_FLAG)
    with evaluator_session(options, extra_pairs=pairs, any_of_them=options.leave_one_part_out) as setup:
        only_one = len(setup.datasets) == 1
        eval_knn(
            setup.backbone,
            next(iter(setup.datasets.values())) if only_one else setup.train_dataset,
            None if only_one else setup.val_dataset,
            nb_knn=setup.config.evaluation.nb_knn,
            temperature=setup.config.evaluation.temperature,
            leave_one_part_out=options.leave_one_part_out,
            n_per_class_list=options.n_per_class_list,
            n_tries=options.n_tries,
            metric=options.metric,
            gather_on_cpu=options.gather_on_cpu,
            features=setup.config.evaluation.features,
            **options.scoring,
            **setup.yardsticks,
            **setup.extraction,
            **setup.reporting,
        )
    return 0


if __name__ == "__main__":
    run_as("knn")
