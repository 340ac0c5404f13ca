"""What is watched while a run trains: targets of every batch, features of a probe set, the best teacher, warnings."""

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dinov2.config import Config, ConfigError
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.decoding import Deadline
from dinov2.data.loaders import make_dataset
from dinov2.distributed import all_gather_objects, is_main_process
from dinov2.eval.features import extract_features, make_eval_transform
from dinov2.eval.representation_measures import (
    effective_rank,
    mean_cosine_similarity,
    patch_similarities,
    similarity_drift,
)
from dinov2.fsdp import release_gathered_parameters
from dinov2.logging import read_metrics
from dinov2.train.evaluation import (
    LOGGED_FIGURES,
    evaluation_size,
    forget_later_best,
    keep_best,
    random_state_untouched,
    score_of,
)
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.target_measures import TargetMeasures
from dinov2.utils.files import shown_fault, write_with_checksum

# Targets that tell less than this about their image, in nats, teach nothing. In healthy runs masked patches stay around
# 1 (never below 0.13), while class tokens may come down to 0.08 before they are learnt; with a hundredfold learning
# rate one or both fall below.
LEAST_INFORMATION = {"cls": 0.03, "patch": 0.1}
FALL = 4  # what was never this many times the limit has not collapsed: it has not been learnt yet
LOOKS_AT_TARGETS = 3  # reports in a row
ENTROPY_AT_MAXIMUM, ENTROPY_AT_ZERO = 0.95, 0.05  # as share of log K; these only choose the words
# Directions that are nearly equal have collapsed only if they were not: class tokens of a network whose LayerScale
# starts at 1e-5 begin equal, and part while it learns.
LARGEST_COSINE = 0.99
# A rank below a tenth of its highest value has collapsed, and so has one that is small and below this share of it. That
# of the patches falls in healthy runs too, to 0.3 of what random patches had; that of the class tokens to 0.5.
SMALL_RANK = {"probe_cls_rank": (1 / 3, 8.0), "probe_patch_rank": (1 / 5, 16.0)}
LEAST_LOSS_OF_SCORE = 0.03  # of k-NN below its best, while the loss is lower than then
LOOKS_AT_SCORE = 3  # evaluations in a row

Values = Mapping[str, object]

_TRY_CALMER = "try a lower optim.base_lr (a tenth), a longer optim.warmup_epochs, or a smaller optim.clip_grad"
_KINDS = {"cls": "class tokens", "patch": "masked patches"}
# What is nearly equal, and which option pulls it apart.
_CLS_EQUAL = "class tokens of different images", "dino.koleo_loss_weight"
_PATCHES_EQUAL = "the patches of an image", "ibot.loss_weight"
_TRY_SHARPER = f"try a lower teacher.teacher_temp; else {_TRY_CALMER}"
_TRY_SPREAD = f"try a higher teacher.teacher_temp or train.centering=sinkhorn_knopp; else {_TRY_CALMER}"


@dataclass
class _Episode:
    """Turns the findings of one rule into warnings."""

    patience: int
    bad: int = 0
    good: int = 0
    raised: bool = False

    def see(self, finding: str | None) -> list[str]:
        if finding is None:
            self.good, self.bad = self.good + 1, 0
            self.raised = self.raised and self.good < self.patience
            return []
        self.good, self.bad = 0, self.bad + 1
        if self.raised or self.bad < self.patience:
            return []
        self.raised = True
        return [finding]


@dataclass
class RunWatch:
    """Sees a run's records in order and says when it collapses or overfits.

    It keeps nothing that the records do not tell, so a resumed run builds it anew from its metrics file.

    Args:
        warmup: iterations of the learning rate's warm-up; features are not judged before its end.
        total: iterations of the run; at half of them, targets should have begun to tell something.
        embed_dim: width of the features, for the text.
        num_scored: images or parts behind the k-NN score; few make it noisy, and only a fall above one standard error
            of it (at most half over their square root) counts.
    """

    warmup: int
    total: int
    embed_dim: int
    num_scored: int = 0
    _episodes: dict[str, _Episode] = field(default_factory=dict, init=False)
    _highest: dict[str, float] = field(default_factory=dict, init=False)
    _losses: list[float] = field(default_factory=list, init=False)  # since the last evaluation
    _best: tuple[float, float] | None = field(default=None, init=False)  # best score, and the loss around it

    def see_training(self, record: Values) -> list[str]:
        """Looks at a progress record; returns the warnings that it raises."""
        loss = _number(record, "total_loss")
        if loss is not None:
            self._losses.append(loss)
        warnings = self._see_targets(record)
        met = self._directions_met(record, "teacher_cosine", _CLS_EQUAL)
        if _iteration(record) >= self.warmup:
            warnings += self._judge("teacher_cosine", LOOKS_AT_TARGETS, met)
        return warnings

    def see_evaluation(self, iteration: int, figures: Values, score: tuple[str, float] | None) -> list[str]:
        """Looks at the figures of an evaluation.

        Args:
            iteration: after which it was made, -1 for the start.
            figures: of the probe set.
            score: name and value of the k-NN figure that judges a teacher, more is better; None without labelled sets.

        Returns:
            The warnings that it raises.
        """
        findings = {
            "probe_cls_rank": self._rank_fell(figures, "probe_cls_rank", "class tokens"),
            "probe_patch_rank": self._rank_fell(figures, "probe_patch_rank", "patches"),
            "probe_cls_cosine": self._directions_met(figures, "probe_cls_cosine", _CLS_EQUAL),
            "probe_patch_cosine": self._directions_met(figures, "probe_patch_cosine", _PATCHES_EQUAL),
        }
        warnings = []
        if iteration >= self.warmup:
            for rule, finding in findings.items():
                warnings += self._judge(rule, 1, finding)
        loss = sum(self._losses) / len(self._losses) if self._losses else None
        self._losses.clear()
        if score is not None and loss is not None:
            warnings += self._judge("overfitting", LOOKS_AT_SCORE, self._score_falls(*score, loss))
        return warnings

    def _see_targets(self, record: Values) -> list[str]:
        """Looks at what targets tell about their image; judged from the first step, by how far it has fallen."""
        warnings = []
        for kind, limit in LEAST_INFORMATION.items():
            information = _number(record, f"teacher_information_{kind}")
            if information is None:
                continue
            was_learnt = self._raise_highest(f"information_{kind}", information) >= FALL * limit
            silent, late = information < limit, _iteration(record) >= self.total / 2
            fell = targets_say_nothing(record, kind) if silent and was_learnt else None
            warnings += self._judge(f"targets of {kind}", LOOKS_AT_TARGETS, fell)
            never = not_learning(record, kind) if silent and late and not was_learnt else None
            warnings += self._judge(f"learning of {kind}", LOOKS_AT_TARGETS, never)
        return warnings

    def _rank_fell(self, figures: Values, name: str, what: str) -> str | None:
        """Faults features that use far fewer directions than they did."""
        rank = _number(figures, name)
        if rank is None:
            return None
        highest = self._raise_highest(name, rank)
        share, small = SMALL_RANK[name]
        limit = max(highest / 10, min(highest * share, small))
        if rank >= limit:
            return None
        return (
            f"COLLAPSE: effective rank of the {what} fell to {rank:.1f} of {self.embed_dim} (highest {highest:.1f}, "
            f"limit {limit:.1f}): {_TRY_CALMER}"
        )

    def _directions_met(self, values: Values, name: str, words: tuple[str, str]) -> str | None:
        """Faults directions that were apart and are nearly equal now."""
        cosine = _number(values, name)
        if cosine is None:
            return None
        widest = self._raise_highest(name, 1 - cosine)
        if cosine <= LARGEST_COSINE or 1 - cosine > widest / 2:
            return None
        what, more = words
        return (
            f"COLLAPSE: {what} are nearly equal (mean cosine {cosine:.3f}, lowest before {1 - widest:.3f}, limit "
            f"{LARGEST_COSINE}): {_TRY_CALMER}, or a higher {more}"
        )

    def _raise_highest(self, name: str, value: float) -> float:
        self._highest[name] = max(value, self._highest.get(name, 0.0))
        return self._highest[name]

    def _judge(self, rule: str, patience: int, finding: str | None) -> list[str]:
        return self._episodes.setdefault(rule, _Episode(patience)).see(finding)

    def _score_falls(self, name: str, score: float, loss: float) -> str | None:
        if self._best is None or score >= self._best[0]:
            self._best = score, loss
            return None
        best, loss_then = self._best
        limit = max(LEAST_LOSS_OF_SCORE, 0.5 / math.sqrt(max(self.num_scored, 1)))
        if best - score <= limit or loss >= loss_then:
            return None
        return (
            f"OVERFITTING: probe k-NN falls while the loss falls ({name} {score:.3f}, more than {limit:.3f} below its "
            f"best {best:.3f} in {LOOKS_AT_SCORE} evaluations; loss {loss:.4g}, at the best {loss_then:.4g}): the best "
            f"teacher is in eval/best; try fewer optim.epochs, stronger augmentation (crops), or more photos"
        )


def targets_say_nothing(record: Values, kind: str) -> str:
    """Words for targets that are the same for all images, be they uniform, one prototype, or anything between."""
    entropy, information = _number(record, f"teacher_entropy_{kind}") or 0.0, record[f"teacher_information_{kind}"]
    numbers = f"entropy {entropy:.3f} of log K, information {information:.4f} nats, limit {LEAST_INFORMATION[kind]}"
    if entropy >= ENTROPY_AT_MAXIMUM:
        what, remedy = "teacher entropy at its maximum, the targets of {} are uniform", _TRY_SHARPER
    elif entropy <= ENTROPY_AT_ZERO:
        what, remedy = "teacher entropy at zero, one prototype takes all {}", _TRY_SPREAD
    else:
        what, remedy = "the teacher's targets of {} hardly depend on the image any more", _TRY_CALMER
    return f"COLLAPSE: {what.format(_KINDS[kind])} ({numbers}): {remedy}"


def not_learning(record: Values, kind: str) -> str:
    """Words for targets that have told nothing so far."""
    match = _number(record, "crop_match")
    crops = f"; {match:.0%} of the photos' global crops find each other in a batch" if match is not None else ""
    easier = " make crops easier to recognise (larger crops.global_crops_scale, no flips);" if kind == "cls" else ""
    return (
        f"NOT LEARNING: half of the run is over, and targets of {_KINDS[kind]} have hardly depended on the image yet "
        f"(information {record[f'teacher_information_{kind}']:.4f} nats, limit {LEAST_INFORMATION[kind]}{crops}):"
        f"{easier} train longer, or start from pretrained weights (student.pretrained_weights) or a "
        f"student.layerscale of 0.1 to 1"
    )


def _iteration(record: Values) -> int:
    iteration = record["iteration"]
    assert isinstance(iteration, int)
    return iteration


def _number(values: Values, name: str) -> float | None:
    """A finite value; None where it is absent, NaN, or null as NaN is in a metrics file."""
    value = values.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


PATCHES_PER_IMAGE = 32  # evenly spread over the image; enough for its similarities and for the rank


class ProbeSet(ImageDataset):
    """Some images of a dataset, evenly spread over it, without labels.

    An image that cannot be read, or not in time, becomes a tensor of zeros: a run that tolerates a missing image must
    not stop because it is among those that are watched.

    Args:
        source: where the images come from; its own transform is not used.
        num_images: how many to take, or all if there are fewer.
        transform: maps an RGB image to a tensor ``[3, H, W]``.
        size: height and width of that tensor.
        read_timeout: seconds after which an image counts as unreadable; 0 for no limit.
    """

    def __init__(
        self,
        source: ImageDataset,
        num_images: int,
        transform: Callable[[Image.Image], Tensor],
        size: tuple[int, int],
        *,
        read_timeout: float = 0.0,
    ) -> None:
        super().__init__(transform=transform)
        self._source = source
        self._size = size
        self._in_time = Deadline(read_timeout)
        count = min(num_images, len(source))
        self._positions = [number * len(source) // count for number in range(count)]

    def __len__(self) -> int:
        return len(self._positions)

    def get_image_path(self, index: int) -> Path:
        return self._source.get_image_path(self._positions[index])

    def get_target(self, index: int) -> int | None:
        return None

    def get_image_bytes(self, index: int) -> bytes:
        return self._source.get_image_bytes(self._positions[index])

    def get_image(self, index: int) -> Image.Image:
        return self._in_time(self._source.get_image, self._positions[index])

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            image, target = super().__getitem__(index)
        except OSError:
            return torch.zeros(3, *self._size), -1
        return image, target

    def unreadable(self) -> list[str]:
        """Reads every image; names those that cannot be read, and why."""
        faults = []
        for index in range(len(self)):
            try:
                self.get_image(index)
            except OSError as error:
                name = str(self.get_image_path(index))
                faults.append(str(error) if name in str(error) else f"{name}: {error}")
        return faults


@dataclass(frozen=True)
class ProbeFeatures:
    """What the teacher makes of the probe images.

    Attributes:
        cls: class tokens ``[N, D]`` float32 on the CPU.
        patches: evenly spread patches ``[N, P, D]`` float32 on the CPU.
        paths: files of the images.
        readable: ``[N]`` bool, false where an image could not be read and its features mean nothing.
    """

    cls: Tensor
    patches: Tensor
    paths: list[str]
    readable: Tensor


class _Tokens(nn.Module):
    """A backbone whose output ``[B, 1 + (1 + P) D]`` is: was there an image, its class token, some of its patches."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.backbone(images, is_training=True)
        patches = tokens["x_norm_patchtokens"]
        num_patches = patches.shape[1]
        count = min(num_patches, PATCHES_PER_IMAGE)
        chosen = torch.arange(count, device=patches.device) * num_patches // count
        features = torch.cat([tokens["x_norm_clstoken"][:, None], patches[:, chosen]], dim=1).float().flatten(1)
        return torch.cat([images.flatten(1).any(dim=1, keepdim=True).float(), features], dim=1)


def probe_features(
    backbone: nn.Module, probe: ProbeSet, *, embed_dim: int, batch_size: int, num_workers: int, device: torch.device
) -> ProbeFeatures:
    """Runs a backbone, which may be sharded, over the probe images on all processes together.

    Args:
        backbone: a vision transformer of width ``embed_dim``.
        probe: the images.
        embed_dim: width ``D`` of the tokens.
        batch_size: images per process and forward pass.
        num_workers: processes that decode images, per process of the run.
        device: where to compute.

    Raises:
        ValueError: the features are not finite.
    """
    found = extract_features(_Tokens(backbone), probe, batch_size=batch_size, num_workers=num_workers, device=device)
    tokens = found.embeddings[:, 1:].unflatten(1, (-1, embed_dim))
    return ProbeFeatures(
        cls=tokens[:, 0], patches=tokens[:, 1:], paths=found.paths, readable=found.embeddings[:, 0] > 0
    )


logger = logging.getLogger("dinov2")

START_FILE = "probe_start.pth"  # under eval/


class Monitors:
    """Measures a run's teacher, keeps the best, and warns of collapse and overfitting.

    Nothing here changes a parameter or a random state. Every process must call every method: sharded networks need all
    of them for a forward pass. Figures, files and warnings are those of the main process.

    Args:
        config: options of the run.
        model: the method, whose teacher may be sharded.
        output_dir: folder of the run.
        device: where to compute.
        targets: measures of the batches.
        training_images: watched where the options name no other set.
        start: first iteration to come.

    Raises:
        ConfigError: an option of ``evaluation`` is wrong.
        FileNotFoundError, ValueError: the probe set is missing or wrong.
    """

    def __init__(
        self,
        config: Config,
        model: SSLMetaArch,
        output_dir: Path,
        device: torch.device,
        *,
        targets: TargetMeasures,
        training_images: ImageDataset,
        start: int,
    ) -> None:
        check_best_metric(config)
        self._config = config
        self._model = model
        self._output_dir = output_dir
        self._device = device
        self._targets = targets
        self._start = start
        settings = config.evaluation
        val = make_dataset(dataset_str=settings.val_dataset_path) if settings.val_dataset_path else None
        self._probe = open_probe(config, training_images if val is None else val)
        self._first: dict[str, Any] = {}  # what the first teacher made of the probe set; main process only
        per_image = settings.best_metric.startswith("image")
        num_scored = 0 if val is None else len(val) if per_image else len(set(val.get_group_ids()))
        self._watch = RunWatch(
            config.optim.warmup_epochs * config.train.OFFICIAL_EPOCH_LENGTH,
            config.optim.epochs * config.train.OFFICIAL_EPOCH_LENGTH,
            model.teacher_backbone.embed_dim,
            num_scored,
        )
        self._warnings: list[str] = []

    def begin(self) -> dict[str, float]:
        """Measures the features that the run starts from, or reads what an earlier start of it measured.

        Must be called once, when records of iterations to come are gone from the metrics file.

        Returns:
            Figures of the features now; empty when they were read, or no image is watched.
        """
        if is_main_process():
            forget_later_best(self._output_dir / "eval" / "best", self._start)
            self._replay(read_metrics(self._output_dir / "metrics.jsonl"))
        if self._probe is None:
            return {}
        if is_main_process() and self._start > 0:
            self._first = self._read_first()
        if all_gather_objects(bool(self._first))[0]:
            return {}
        if self._start > 0:
            logger.info("patch_drift counts from iteration %d: no earlier measure of this run is there", self._start)
        figures = self._measure()
        if is_main_process():
            self._watch.see_evaluation(self._start - 1, figures, None)
        return figures

    def see_report(self, record: dict[str, Any]) -> None:
        """Adds the period's figures of the targets to a progress record, and the warnings that it raises."""
        record |= self._targets.close_period()
        if is_main_process():
            self._warn(self._watch.see_training(record))
            if warnings := self.take_warnings():
                record["warnings"] = warnings

    def see_evaluation(self, iteration: int, knn: Mapping[str, float], teacher: Path | None) -> dict[str, float]:
        """Measures the teacher's features after an iteration and keeps the teacher if it is the best so far.

        Args:
            iteration: just done.
            knn: figures of k-NN, empty without labelled sets.
            teacher: the teacher's file; None where it could not be written.

        Returns:
            ``knn`` and the figures of the probe set.
        """
        figures = {**knn, **self._measure()}
        if is_main_process():
            metric = self._config.evaluation.best_metric
            if teacher is not None:
                self._keep_best(teacher, iteration, knn)
            self._warn(self._watch.see_evaluation(iteration, figures, score_of(knn, metric)))
        return figures

    def _keep_best(self, teacher: Path, iteration: int, knn: Mapping[str, float]) -> None:
        folder = self._output_dir / "eval" / "best"
        try:
            keep_best(folder, teacher, iteration, knn, metric=self._config.evaluation.best_metric)
        except OSError as error:  # its own file is there
            logger.error("THE BEST TEACHER IS NOT KEPT in %s, training goes on: %s", folder, error)

    def take_warnings(self) -> list[str]:
        """Warnings since the last call; those of the main process."""
        taken, self._warnings = self._warnings, []
        return taken

    def _warn(self, warnings: Iterable[str]) -> None:
        for warning in warnings:
            logger.warning("%s", warning)
            self._warnings.append(warning)

    def _replay(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Shows the watch what the run has recorded before a resume; its warnings have been raised then."""
        for record in records:
            if "iteration" not in record:
                continue
            if "evaluation" in record:
                figures = record["evaluation"]
                score = score_of(_finite(figures), self._config.evaluation.best_metric)
                self._watch.see_evaluation(record["iteration"], figures, score)
            else:
                self._watch.see_training(record)

    def _measure(self) -> dict[str, float]:
        """Figures of the teacher's features now, the same on every process; empty where there are none."""
        if self._probe is None:
            return {}
        with random_state_untouched():
            try:
                features = probe_features(
                    self._model.teacher_backbone,
                    self._probe,
                    embed_dim=self._model.teacher_backbone.embed_dim,
                    batch_size=self._config.evaluation.batch_size,
                    num_workers=self._config.train.num_workers,
                    device=self._device,
                )
            except ValueError as error:  # on all processes alike; no reason to lose a run
                logger.warning("the probe set could not be measured: %s", error)
                features = None
        self._model.train()
        release_gathered_parameters(self._model.teacher)
        figures: dict[str, float] = {}
        if features is not None and is_main_process():
            figures = self._figures(features)
        return all_gather_objects(figures)[0]

    def _figures(self, features: ProbeFeatures) -> dict[str, float]:
        similarities = patch_similarities(features.patches)
        if not self._first:
            self._first = {
                "names": _names(features.paths), "readable": features.readable, "similarities": similarities
            }  # fmt: skip
            path = self._output_dir / "eval" / START_FILE
            path.parent.mkdir(parents=True, exist_ok=True)
            write_with_checksum(path, lambda file: torch.save(self._first, file))
        usable = features.readable & self._first["readable"]
        if usable.sum() < 2:
            logger.warning("the probe set could not be measured: %d of its images can be read", int(usable.sum()))
            return {}
        first: Tensor = self._first["similarities"]
        return feature_figures(features.cls[usable], features.patches[usable], similarities[usable], first[usable])

    def _read_first(self) -> dict[str, Any]:
        """What an earlier start of this run kept; empty when there is none, or none of the same images and patches."""
        assert self._probe is not None
        path = self._output_dir / "eval" / START_FILE
        if not path.exists():
            return {}
        fault = shown_fault(path)
        try:
            first: dict[str, Any] = {} if fault else torch.load(path, weights_only=True)
        except Exception as error:  # bytes that are no file of torch make the unpickler raise almost anything
            fault = f"cannot be read: {error}"
        if fault:
            logger.error("%s %s: it is not used, and written anew", path, fault)
            return {}
        names = _names(str(self._probe.get_image_path(index)) for index in range(len(self._probe)))
        return first if first["names"] == names else {}


def feature_figures(cls: Tensor, patches: Tensor, similarities: Tensor, first: Tensor) -> dict[str, float]:
    """Figures of features of at least two images.

    Args:
        cls: class tokens ``[N, D]``.
        patches: ``[N, P, D]``.
        similarities: of these patches, ``[N, P, P]``.
        first: of the same patches when the run started.

    Returns:
        ``probe_cls_rank`` and ``probe_patch_rank``, effective ranks; ``probe_cls_cosine``, mean cosine between images;
        with more than one patch ``probe_patch_cosine``, mean cosine between patches of an image, and
        ``probe_patch_drift``, mean absolute change of those cosines since the start.
    """
    figures = {
        "probe_cls_rank": effective_rank(cls),
        "probe_patch_rank": effective_rank(patches.flatten(0, 1)),
        "probe_cls_cosine": float(mean_cosine_similarity(cls)),
    }
    if patches.shape[1] > 1:
        figures["probe_patch_cosine"] = float(mean_cosine_similarity(patches).mean())
        figures["probe_patch_drift"] = similarity_drift(similarities, first)
    return figures


def open_probe(config: Config, default: ImageDataset) -> ProbeSet | None:
    """Opens the images on which features are watched.

    Args:
        config: options of the run.
        default: taken where they name no set.

    Returns:
        The set; None where none is wanted, or there are no two images to compare.

    Raises:
        ConfigError: the image size is no multiple of the patch.
        FileNotFoundError, ValueError: the set is missing or wrong.
    """
    settings = config.evaluation
    size = evaluation_size(config)
    source = make_dataset(dataset_str=settings.probe_dataset_path) if settings.probe_dataset_path else default
    if min(settings.probe_images, len(source)) < 2:
        if settings.probe_images > 0:
            logger.warning("features are not watched: that takes two images at least")
        return None
    transform = make_eval_transform(size, whole_image=settings.whole_image)
    return ProbeSet(source, settings.probe_images, transform, size, read_timeout=config.data.read_timeout_seconds)


def check_best_metric(config: Config) -> None:
    """Checks ``evaluation.best_metric``.

    Raises:
        ConfigError: it names no figure of k-NN.
    """
    metric = config.evaluation.best_metric
    match = re.fullmatch(r"(image|part)_(?P<figure>[a-z0-9_]+?)(_k(?P<k>\d+))?", metric)
    if metric and (match is None or match["figure"] not in LOGGED_FIGURES):
        names = ", ".join(LOGGED_FIGURES)
        raise ConfigError(
            f"evaluation.best_metric={metric!r} must be image_ or part_ and one of {names}, with _k and a number of "
            f"neighbours or without, such as part_auroc or image_accuracy_k10"
        )


def _finite(figures: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if isinstance(value, int | float)}


def _names(paths: Iterable[str]) -> list[str]:
    """Names of files without their folders: a set may be moved between two starts of a run."""
    return [Path(path).name for path in paths]
