"""Weighted nearest-neighbour classification of frozen features, per image and per part."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dinov2.data.datasets.base import ImageDataset
from dinov2.distributed import is_main_process
from dinov2.eval.common_checks import (
    check_finite_features,
    common_classes,
    shared_parts,
    warn_of_idle_aggregation,
    warn_of_shared_parts,
    warn_of_unseen_classes,
)
from dinov2.eval.features import Features, extract_features
from dinov2.eval.few_shot import check_few_shot, few_shot_subset, mean_scores, summarise_tries
from dinov2.eval.fingerprints import find_origins
from dinov2.eval.frozen import ModelWithFeatures, ModelWithNormalize, device_of
from dinov2.eval.metrics import FloatArray
from dinov2.eval.neighbour_votes import (
    VoteSettings,
    choose_k,
    clip_nb_knn,
    neighbour_probabilities,
    num_voters,
    select_rows,
)
from dinov2.eval.part_scores import check_aggregation, score_parts
from dinov2.eval.result_tables import spread_table
from dinov2.eval.results import EvaluationResults, Predictions
from dinov2.eval.scoring import Scores, check_num_resamples, score_predictions

logger = logging.getLogger("dinov2")

ALL = -1  # in place of a number of images per class


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
    best = max(ks, key=lambda k: scores[f"k={k}"].image.figures["balanced_accuracy"].value)
    return best, "balanced accuracy over the judged images themselves, so its figures are optimistic"


def _few_shot(
    train: Features, val: Features, num_classes: int, n_per_class: int, settings: KnnSettings
) -> dict[str, list[Scores]]:
    """Scores of every try, by variant such as ``n=5 k=5``."""
    banks = [select_rows(train, few_shot_subset(train.labels, n_per_class, seed)) for seed in range(settings.n_tries)]
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
