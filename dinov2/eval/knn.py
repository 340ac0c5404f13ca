"""Weighted nearest-neighbour classification of frozen features, per image and per part."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dinov2.config.command_line import option, parse
from dinov2.data.datasets.base import ImageDataset
from dinov2.distributed import is_main_process
from dinov2.eval.command import EvaluatorOptions, EvaluatorSetup, evaluator_session, flag_pairs
from dinov2.eval.features import (
    ALL,
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
    warn_of_unseen_classes,
)
from dinov2.eval.metrics.classification import (
    FloatArray,
    Scores,
    check_aggregation,
    check_num_resamples,
    classification_metrics,
    score_parts,
    score_predictions,
)
from dinov2.eval.neighbours import nearest_neighbours
from dinov2.eval.results import EvaluationResults, Predictions, find_origins, mean_scores, spread_table, summarise_tries
from dinov2.utils.seeds import derive_seed


def nearest_of_other_parts(
    queries: Tensor,
    query_parts: Sequence[str],
    bank: Tensor,
    bank_parts: Sequence[str],
    num_neighbours: int,
    *,
    device: torch.device | str = "cpu",
    bank_on_cpu: bool = False,
) -> tuple[Tensor, Tensor]:
    """Finds the rows of ``bank`` with the largest inner product with each query, without rows of the query's own part.

    Args:
        queries: ``[M, D]`` float32, finite.
        query_parts: the part of every query.
        bank: ``[N, D]`` float32, finite.
        bank_parts: the part of every row of the bank.
        num_neighbours: from 1 to `num_rows_of_other_parts`.
        device: where similarities are computed.
        bank_on_cpu: leaves the bank where it is, see `nearest_neighbours`.

    Returns:
        Similarities ``[M, k]`` float32 from large to small, and places in the bank ``[M, k]`` int64; both on the CPU.

    Raises:
        ValueError: when some query has fewer rows of other parts.
    """
    available = num_rows_of_other_parts(query_parts, bank_parts)
    if not 1 <= num_neighbours <= available:
        raise ValueError(f"cannot find {num_neighbours} neighbours of other parts; some query has only {available}")
    numbers = {part: number for number, part in enumerate(dict.fromkeys((*bank_parts, *query_parts)))}
    part_of_row = torch.tensor([numbers[part] for part in bank_parts])
    part_of_query = torch.tensor([numbers[part] for part in query_parts])
    own_rows = torch.bincount(part_of_row, minlength=len(numbers))[part_of_query].numpy()  # [M]
    similarities = torch.empty(len(queries), num_neighbours)
    rows = torch.empty(len(queries), num_neighbours, dtype=torch.int64)
    # Queries with about as many rows to drop go together, so that one large part does not make all searches long.
    sizes = np.ceil(np.log2(own_rows + 1)).astype(int)
    for size in np.unique(sizes):
        members = torch.from_numpy(np.flatnonzero(sizes == size))
        most = num_neighbours + int(own_rows[members].max())
        found, places = nearest_neighbours(queries[members], bank, most, device=device, bank_on_cpu=bank_on_cpu)
        own = part_of_row[places] == part_of_query[members, None]
        kept = own.int().argsort(dim=1, stable=True)[:, :num_neighbours]  # other parts first, in their order
        similarities[members] = found.gather(1, kept)
        rows[members] = places.gather(1, kept)
    return similarities, rows


def num_rows_of_other_parts(query_parts: Sequence[str], bank_parts: Sequence[str]) -> int:
    """How many rows of the bank are left for the query that loses most of them."""
    asked = set(query_parts)
    counts: dict[str, int] = {}
    for part in bank_parts:
        if part in asked:
            counts[part] = counts.get(part, 0) + 1
    return len(bank_parts) - max(counts.values(), default=0)


logger = logging.getLogger("dinov2")

MOST_IMAGES_FOR_CHOICE = 10_000


@dataclass(frozen=True, kw_only=True)
class VoteSettings:
    """How neighbours are found and how they vote.

    Attributes:
        nb_knn: numbers of neighbours.
        temperature: of the softmax over similarities.
        leave_one_part_out: the rows of a query's own part do not vote.
        gather_on_cpu: keeps the bank in host memory.
        device: where similarities are computed.
    """

    nb_knn: tuple[int, ...] = (10, 20, 100, 200)
    temperature: float = 0.07
    leave_one_part_out: bool = False
    gather_on_cpu: bool = False
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        if not self.nb_knn or min(self.nb_knn) < 1:
            raise ValueError(f"nb_knn must be one or more numbers from 1 up, found {sorted(self.nb_knn)}")
        if not self.temperature > 0:
            raise ValueError(f"the temperature must be above 0, found {self.temperature}")


def neighbour_probabilities(
    bank: Features, queries: Features, num_classes: int, settings: VoteSettings
) -> dict[int, FloatArray]:
    """Class probabilities ``[M, C]`` of the queries by number of neighbours; rows sum to 1.

    Raises:
        ValueError: when the bank has fewer rows than the largest number of neighbours; see `clip_nb_knn`.
    """
    ks = settings.nb_knn
    if settings.leave_one_part_out:
        similarities, rows = nearest_of_other_parts(
            queries.embeddings,
            queries.group_ids,
            bank.embeddings,
            bank.group_ids,
            max(ks),
            device=settings.device,
            bank_on_cpu=settings.gather_on_cpu,
        )
    else:
        similarities, rows = nearest_neighbours(
            queries.embeddings,
            bank.embeddings,
            max(ks),
            device=settings.device,
            bank_on_cpu=settings.gather_on_cpu,
        )
    neighbour_labels = bank.labels[rows]
    probabilities = {}
    for k in ks:
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


def num_voters(bank: Features, queries: Features, leave_one_part_out: bool) -> int:
    """How many images of the bank can vote on every query."""
    return num_rows_of_other_parts(queries.group_ids, bank.group_ids) if leave_one_part_out else len(bank)


def clip_nb_knn(nb_knn: Iterable[int], voters: int) -> tuple[int, ...]:
    """Numbers of neighbours from small to large, none above the number of images that can vote and none twice.

    Raises:
        ValueError: when no image can vote.
    """
    asked = sorted(set(nb_knn))
    if voters < 1:
        raise ValueError("the bank has no image that can vote; leaving one part out needs at least two parts")
    ks = tuple(sorted({min(k, voters) for k in asked}))
    if list(ks) != asked and is_main_process():
        logger.info("nb_knn %s clipped to the %d images that can vote: %s", asked, voters, list(ks))
    return ks


def choose_k(bank: Features, num_classes: int, settings: VoteSettings, seed: int) -> int | None:
    """The number of neighbours with which the bank judges itself best, every image without its own part.

    No other image is seen, so figures on a validation set stay those of images that decided nothing. The measure is
    the balanced accuracy over images; of equal numbers the smallest wins. Above 10,000 images, whole parts are drawn
    until there are as many. A number of neighbours that the bank without a part does not have stands for all there are.

    Returns:
        The number; None for a bank of one part, which cannot judge itself.
    """
    queries = _some_parts(bank, seed)
    voters = num_voters(bank, queries, True)
    if voters < 1:
        return None
    possible = {k: min(k, voters) for k in sorted(settings.nb_knn)}
    asked = replace(settings, nb_knn=tuple(sorted(set(possible.values()))), leave_one_part_out=True)
    labels = queries.labels.numpy()
    balanced = {
        k: classification_metrics(probabilities, labels)["balanced_accuracy"]
        for k, probabilities in neighbour_probabilities(bank, queries, num_classes, asked).items()
    }
    return max(possible, key=lambda k: balanced[possible[k]])


def _some_parts(features: Features, seed: int) -> Features:
    """The features themselves, or whole parts of them, in random order, with about as many images as are needed."""
    if len(features) <= MOST_IMAGES_FOR_CHOICE:
        return features
    parts = sorted(set(features.group_ids))
    order = np.random.default_rng(derive_seed(seed, "parts to choose k by")).permutation(len(parts))
    place = {parts[number]: position for position, number in enumerate(order)}
    places = np.array([place[part] for part in features.group_ids])
    kept = places < places[np.argsort(places, kind="stable")][MOST_IMAGES_FOR_CHOICE]
    kept |= places == 0  # one part alone may have more
    return features.select(torch.from_numpy(np.flatnonzero(kept)))


@dataclass(frozen=True, kw_only=True)
class KnnSettings:
    """Everything but the features that decides the figures of a k-NN evaluation.

    Attributes:
        votes: how neighbours are found and vote.
        n_per_class_list: images per class in few-shot banks; -1 for the whole bank.
        n_tries: few-shot banks per number of images.
        part_aggregation: how a part joins its photos, see `score_parts`.
        part_top_k: photos that count with ``topk_mean``.
        num_resamples: behind the intervals; 0 gives none.
        seed: of the resamples, and of the parts that choose the number of neighbours in a large bank.
    """

    votes: VoteSettings = field(default_factory=VoteSettings)
    n_per_class_list: tuple[int, ...] = (ALL,)
    n_tries: int = 1
    part_aggregation: str = "max"
    part_top_k: int = 3
    num_resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        check_few_shot(self.n_per_class_list, self.n_tries)
        check_aggregation(self.part_aggregation, self.part_top_k)
        check_num_resamples(self.num_resamples)

    def score(self, probabilities: FloatArray, val: Features, *, intervals: bool = True) -> Scores:
        """Scores class probabilities ``[M, C]`` of the validation set."""
        return score_predictions(
            probabilities,
            val.labels.numpy(),
            val.group_ids,
            aggregation=self.part_aggregation,
            top_k=self.part_top_k,
            num_resamples=self.num_resamples if intervals else 0,
            seed=self.seed,
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, without those that do not change figures."""
        values = asdict(self) | asdict(self.votes)
        del values["votes"], values["device"], values["gather_on_cpu"]
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
    seed: int = 0,
    output_dir: str | Path | None = None,
    weights: str = "",
    settings: Mapping[str, Any] | None = None,
) -> EvaluationResults:
    """Scores a frozen backbone by its nearest labelled neighbours, on all processes of the run together.

    The number of neighbours is chosen by the bank alone (see `choose_k`), so that the chosen figures are honest.

    Args:
        model: maps images ``[B, 3, H, W]`` to features ``[B, D]``, which are normalised here.
        train_dataset: the bank of labelled images.
        val_dataset: the images to classify; with two classes, class 1 is the positive one (a defect). None takes the
            bank, which needs ``leave_one_part_out``.
        nb_knn: numbers of neighbours, clipped to the images that can vote.
        temperature: of the softmax over similarities that weighs the neighbours.
        leave_one_part_out: photos of an image's own part do not vote, so that one dataset can be bank and judged set.
        n_per_class_list: images per class of few-shot banks, -1 for the whole bank. Numbers of neighbours are then
            those of ``nb_knn`` that do not exceed the images per class, and that number itself.
        n_tries: few-shot banks per number, drawn with seeds 0, 1, …; their figures' mean and spread are reported.
        batch_size: images per process and forward pass.
        num_workers: processes that decode images, per process of the run.
        device: where to compute; by default where the model lies.
        autocast_dtype: precision of the forward pass; by default that of the model.
        gather_on_cpu: keeps the bank's features in host memory, for banks larger than the device.
        features: what describes an image: ``cls``, ``patch_mean`` or ``cls_patch_mean``.
        part_aggregation: how a part joins its photos, see `score_parts`.
        part_top_k: photos that count with ``topk_mean``.
        num_resamples: resamples of parts behind the intervals; 0 gives none.
        seed: of the resamples.
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
    asked = KnnSettings(
        votes=VoteSettings(
            nb_knn=tuple(nb_knn),
            temperature=temperature,
            leave_one_part_out=leave_one_part_out,
            gather_on_cpu=gather_on_cpu,
            device=device,
        ),
        n_per_class_list=tuple(n_per_class_list),
        n_tries=n_tries,
        part_aggregation=part_aggregation,
        part_top_k=part_top_k,
        num_resamples=num_resamples,
        seed=seed,
    )
    judged = train_dataset if val_dataset is None else val_dataset
    classes = common_classes(train_dataset, judged)
    warn_of_idle_aggregation(part_aggregation, classes)
    warn_of_unseen_classes(train_dataset.get_targets().tolist(), classes)
    normalised = ModelWithNormalize(ModelWithFeatures(model, features))

    def extract(dataset: ImageDataset) -> Features:
        return extract_features(
            normalised,
            dataset,
            batch_size=batch_size,
            num_workers=num_workers,
            device=device,
            autocast_dtype=autocast_dtype,
        )

    train = extract(train_dataset)
    val = train if judged is train_dataset else extract(judged)
    results = replace(
        score_features(train, val, classes, asked),
        **find_origins({"train": train_dataset, "val": judged}, weights),
    )
    results = replace(results, settings={"features": features, **results.settings, **(settings or {})})
    if is_main_process():
        tables = (results.table(), spread_table(results.extra.get("few_shot", {})))
        logger.info("%s", "\n".join(table for table in tables if table))
        if output_dir is not None:
            results.write(output_dir)
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
    scores: dict[str, Scores] = {}
    extra: dict[str, Any] = {"num_parts_in_both": _say_shared_parts(train, val, settings.votes.leave_one_part_out)}
    chosen, chosen_by, predictions = "", "", None
    if ALL in settings.n_per_class_list:
        ks = clip_nb_knn(settings.votes.nb_knn, num_voters(train, val, settings.votes.leave_one_part_out))
        votes = replace(settings.votes, nb_knn=ks)
        probabilities = neighbour_probabilities(train, val, len(classes), votes)
        scores = {f"k={k}": settings.score(values, val) for k, values in probabilities.items()}
        k, chosen_by = _choose(train, val, scores, len(classes), votes, settings.seed)
        chosen = f"k={k}"
        labels = val.labels.numpy()
        extra["num_parts_of_several_labels"] = score_parts(probabilities[k], labels, val.group_ids).num_mixed
        predictions = Predictions(
            paths=val.paths, group_ids=val.group_ids, labels=labels, probabilities=probabilities[k]
        )
    for n_per_class in sorted(set(settings.n_per_class_list) - {ALL}):
        for name, tries in _few_shot(train, val, len(classes), n_per_class, settings).items():
            scores[name] = mean_scores(tries)
            extra.setdefault("few_shot", {})[name] = summarise_tries(tries)
    return EvaluationResults(
        evaluator="knn",
        settings=settings.as_dict() | ({"chosen_by": chosen_by} if chosen else {}),
        classes=classes,
        scores=scores,
        chosen=chosen,
        extra=extra,
        predictions=predictions,
    )


def _choose(
    train: Features, val: Features, scores: Mapping[str, Scores], num_classes: int, votes: VoteSettings, seed: int
) -> tuple[int, str]:
    """The number of neighbours to report, and how it was found."""
    ks = votes.nb_knn
    if len(ks) == 1:
        return ks[0], "being the only one"
    if val is not train:
        k = choose_k(train, num_classes, votes, seed)
        if k is not None:
            return k, "balanced accuracy over the training images, each without its own part"
        return ks[0], "being the first: the training set is a single part, which cannot judge itself"
    best = max(ks, key=lambda k: scores[f"k={k}"].image.metrics["balanced_accuracy"].value)
    return best, "balanced accuracy over the judged images themselves, so its figures are optimistic"


def _few_shot(
    train: Features, val: Features, num_classes: int, n_per_class: int, settings: KnnSettings
) -> dict[str, list[Scores]]:
    """Scores of every try, by variant such as ``n=5 k=5``."""
    banks = [train.select(few_shot_subset(train.labels, n_per_class, seed)) for seed in range(settings.n_tries)]
    voters = min(num_voters(bank, val, settings.votes.leave_one_part_out) for bank in banks)
    ks = clip_nb_knn({k for k in settings.votes.nb_knn if k < n_per_class} | {n_per_class}, voters)
    votes = replace(settings.votes, nb_knn=ks)
    tries: dict[str, list[Scores]] = {}
    for bank in banks:
        for k, probabilities in neighbour_probabilities(bank, val, num_classes, votes).items():
            tries.setdefault(f"n={n_per_class} k={k}", []).append(settings.score(probabilities, val, intervals=False))
    return tries


def _say_shared_parts(train: Features, val: Features, leave_one_part_out: bool) -> int:
    """How many parts are in both sets; warns where they spoil the scores, and where leaving them out does nothing."""
    if not leave_one_part_out:
        return len(warn_of_shared_parts(train.group_ids, val.group_ids))
    shared = shared_parts(train.group_ids, val.group_ids)
    if not shared and is_main_process():
        logger.warning("leave_one_part_out has no effect: no part is in both sets")
    return len(shared)


CONFIG_OF_FLAG = {"nb_knn": "nb_knn", "temperature": "temperature"}


@dataclass(frozen=True)
class KnnOptions(EvaluatorOptions):
    """Options of the command."""

    nb_knn: tuple[int, ...] | None = option(None, help="numbers of neighbours (usually 10 20 100 200)")
    temperature: float | None = option(None, help="temperature of the neighbours' votes (usually 0.07)")
    gather_on_cpu: bool = option(False, help="keep the bank in host memory, for one larger than the GPU")
    n_per_class_list: tuple[int, ...] = option((-1,), help="images per class of few-shot banks; -1: the whole bank")
    n_tries: int = option(1, help="few-shot banks per number of images")
    leave_one_part_out: bool = option(
        False, help="photos of an image's own part do not vote; one dataset is then enough"
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
        run_knn(options, setup)
    return 0


def run_knn(options: KnnOptions, setup: EvaluatorSetup) -> EvaluationResults:
    """Evaluates what the options and the set-up describe, inside a session of processes."""
    evaluation = setup.config.evaluation
    only_one = len(setup.datasets) == 1
    return eval_knn(
        setup.backbone,
        next(iter(setup.datasets.values())) if only_one else setup.train_dataset,
        None if only_one else setup.val_dataset,
        nb_knn=evaluation.nb_knn,
        temperature=evaluation.temperature,
        leave_one_part_out=options.leave_one_part_out,
        n_per_class_list=options.n_per_class_list,
        n_tries=options.n_tries,
        batch_size=setup.batch_size,
        num_workers=setup.num_workers,
        device=setup.device,
        autocast_dtype=setup.autocast_dtype,
        gather_on_cpu=options.gather_on_cpu,
        features=evaluation.features,
        part_aggregation=options.part_aggregation,
        part_top_k=options.part_top_k,
        num_resamples=options.num_resamples,
        seed=options.seed,
        output_dir=setup.output_dir,
        weights=setup.weights,
        settings=setup.settings,
    )
