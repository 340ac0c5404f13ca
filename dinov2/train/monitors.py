"""Monitors of a run: targets of every batch, features of a probe set, the best teacher, and warnings of collapse."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from dinov2.data.datasets.base import ImageDataset
from dinov2.data.image_reader import PlacedImage
from dinov2.data.reading import Deadline
from dinov2.distributed import all_gather_objects, is_main_process
from dinov2.eval.features import extract_features
from dinov2.eval.learning import (
    FALL,
    KINDS,
    MAX_COSINE,
    MIN_INFORMATION,
    finite_number,
    rank_limit,
    score_of,
    smallest_drop,
)
from dinov2.eval.representation_measures import (
    effective_rank,
    mean_cosine_similarity,
    patch_similarities,
    similarity_drift,
)
from dinov2.fsdp import release_gathered_parameters
from dinov2.logging import read_metrics
from dinov2.train.evaluation import METRICS_FILE, keep_best, mend_best, random_state_untouched
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.target_measures import TargetMeasures
from dinov2.utils.files import shown_fault, write_with_checksum

logger = logging.getLogger("dinov2")

TARGET_PATIENCE = 3  # reports in a row
ENTROPY_AT_MAXIMUM, ENTROPY_AT_ZERO = 0.95, 0.05  # as share of log K; these only choose the words
SCORE_PATIENCE = 3  # evaluations in a row in which k-NN is below its best, while the loss is lower than then

PATCHES_PER_IMAGE = 32  # evenly spread over the image; enough for its similarities and for the rank
START_FILE = "probe_start.pth"  # under eval/

_TRY_CALMER = "try a lower optim.base_lr (a tenth), a longer optim.warmup_epochs, or a smaller optim.clip_grad"
_TRY_SHARPER = f"try a lower teacher.teacher_temp; else {_TRY_CALMER}"
_TRY_SPREAD = f"try a higher teacher.teacher_temp or train.centering=sinkhorn_knopp; else {_TRY_CALMER}"


@dataclass
class CollapseDetector:
    """Reads a run's records in order and warns of collapse, of targets that are not learnt, and of overfitting.

    It keeps nothing that the records do not tell, so a resumed run builds it anew from its metrics file. A rule warns
    once when it is broken so many times in a row, and again only after it has held as often.

    Args:
        warmup: iterations of the learning rate's warm-up; features are not compared before its end.
        total: iterations of the run; at half of them, targets should have begun to tell something.
        embed_dim: width of the features, for the text.
        num_scored: images or parts behind the k-NN score; few make it noisy, and only a fall above one standard error
            of it (at most half over their square root) counts.
    """

    warmup: int
    total: int
    embed_dim: int
    num_scored: int = 0
    _streaks: dict[str, int] = field(default_factory=dict, init=False)  # broken in a row, negative where it held
    _warned: set[str] = field(default_factory=set, init=False)
    _highest: dict[str, float] = field(default_factory=dict, init=False)
    _losses: list[float] = field(default_factory=list, init=False)  # since the last evaluation
    _best: tuple[float, float] | None = field(default=None, init=False)  # best score, and the loss around it

    def check_training(self, record: Mapping[str, Any]) -> list[str]:
        """Warnings that a progress record raises."""
        iteration, warnings = record["iteration"], []
        if (loss := finite_number(record, "total_loss")) is not None:
            self._losses.append(loss)
        for kind, limit in MIN_INFORMATION.items():
            information = finite_number(record, f"teacher_information_{kind}")
            if information is None:
                continue
            was_learnt = self._raise_highest(f"information_{kind}", information) >= FALL * limit
            silent, late = information < limit, iteration >= self.total / 2
            collapsed = self._targets_collapsed(record, kind) if silent and was_learnt else None
            warnings += self._warn(f"targets of {kind}", TARGET_PATIENCE, collapsed)
            never = self._not_learning(record, kind) if silent and late and not was_learnt else None
            warnings += self._warn(f"learning of {kind}", TARGET_PATIENCE, never)
        met = self._directions_met(record, "teacher_cosine", "class tokens of different images")
        if iteration >= self.warmup:
            warnings += self._warn("teacher_cosine", TARGET_PATIENCE, met)
        return warnings

    def check_evaluation(
        self, iteration: int, metrics: Mapping[str, Any], score: tuple[str, float] | None
    ) -> list[str]:
        """Warnings that an evaluation raises.

        Args:
            iteration: after which it was made, -1 for the start.
            metrics: of the probe set.
            score: name and value of the k-NN metric that decides, more is better; None without labelled sets.
        """
        findings = {
            "probe_cls_rank": self._rank_fell(metrics, "probe_cls_rank", "class tokens"),
            "probe_patch_rank": self._rank_fell(metrics, "probe_patch_rank", "patches"),
            "probe_cls_cosine": self._directions_met(metrics, "probe_cls_cosine", "class tokens of different images"),
            "probe_patch_cosine": self._directions_met(metrics, "probe_patch_cosine", "the patches of an image"),
        }
        warnings = []
        if iteration >= self.warmup:
            for rule, finding in findings.items():
                warnings += self._warn(rule, 1, finding)
        loss = sum(self._losses) / len(self._losses) if self._losses else None
        self._losses.clear()
        if score is not None and loss is not None:
            warnings += self._warn("overfitting", SCORE_PATIENCE, self._score_fell(*score, loss))
        return warnings

    def _warn(self, rule: str, patience: int, finding: str | None) -> list[str]:
        """The finding, if the rule is broken for the ``patience``-th time in a row and has not warned since it held."""
        streak = self._streaks.get(rule, 0)
        self._streaks[rule] = streak = min(streak, 0) - 1 if finding is None else max(streak, 0) + 1
        if streak <= -patience:
            self._warned.discard(rule)
        if finding is None or streak < patience or rule in self._warned:
            return []
        self._warned.add(rule)
        return [finding]

    def _raise_highest(self, name: str, value: float) -> float:
        self._highest[name] = max(value, self._highest.get(name, 0.0))
        return self._highest[name]

    def _targets_collapsed(self, record: Mapping[str, Any], kind: str) -> str:
        """Targets are the same for all images, be they uniform, one prototype, or anything between."""
        entropy = finite_number(record, f"teacher_entropy_{kind}") or 0.0
        if entropy >= ENTROPY_AT_MAXIMUM:
            what, remedy = f"teacher entropy at its maximum, the targets of {KINDS[kind]} are uniform", _TRY_SHARPER
        elif entropy <= ENTROPY_AT_ZERO:
            what, remedy = f"teacher entropy at zero, one prototype takes all {KINDS[kind]}", _TRY_SPREAD
        else:
            what, remedy = f"the teacher's targets of {KINDS[kind]} hardly depend on the image any more", _TRY_CALMER
        return (
            f"COLLAPSE: {what} (entropy {entropy:.3f} of log K, information "
            f"{record[f'teacher_information_{kind}']:.4f} nats, limit {MIN_INFORMATION[kind]}): {remedy}"
        )

    def _not_learning(self, record: Mapping[str, Any], kind: str) -> str:
        """Targets have told nothing so far."""
        match = finite_number(record, "crop_match")
        crops = f"; {match:.0%} of the images' global crops find each other in a batch" if match is not None else ""
        easier = " make crops easier to recognise (larger crops.global_crops_scale);" if kind == "cls" else ""
        return (
            f"NOT LEARNING: half of the run is over, and targets of {KINDS[kind]} have hardly depended on the image "
            f"yet (information {record[f'teacher_information_{kind}']:.4f} nats, limit {MIN_INFORMATION[kind]}{crops}):"
            f"{easier} let the teacher follow (teacher.momentum_teacher=auto), train longer, or start from pretrained "
            f"weights (student.pretrained_weights) or a student.layerscale of 0.1 to 1"
        )

    def _rank_fell(self, metrics: Mapping[str, Any], name: str, what: str) -> str | None:
        """Features use far fewer directions than they did."""
        rank = finite_number(metrics, name)
        if rank is None:
            return None
        highest = self._raise_highest(name, rank)
        limit = rank_limit(name, highest)
        if rank >= limit:
            return None
        return (
            f"COLLAPSE: effective rank of the {what} fell to {rank:.1f} of {self.embed_dim} (highest {highest:.1f}, "
            f"limit {limit:.1f}): {_TRY_CALMER}"
        )

    def _directions_met(self, values: Mapping[str, Any], name: str, what: str) -> str | None:
        """Directions that were apart are nearly equal now."""
        cosine = finite_number(values, name)
        if cosine is None:
            return None
        widest = self._raise_highest(name, 1 - cosine)
        if cosine <= MAX_COSINE or 1 - cosine > widest / 2 or widest < 1 - MAX_COSINE:  # or never were apart
            return None
        remedy = "ibot.loss_weight" if name == "probe_patch_cosine" else "dino.koleo_loss_weight"
        return (
            f"COLLAPSE: {what} are nearly equal (mean cosine {cosine:.3f}, lowest before {1 - widest:.3f}, limit "
            f"{MAX_COSINE}): {_TRY_CALMER}, or a higher {remedy}"
        )

    def _score_fell(self, name: str, score: float, loss: float) -> str | None:
        """The score is below its best while the loss is lower than at the best."""
        if self._best is None or score >= self._best[0]:
            self._best = score, loss
            return None
        best, loss_then = self._best
        limit = smallest_drop(self.num_scored)
        if best - score <= limit or loss >= loss_then:
            return None
        return (
            f"OVERFITTING: probe k-NN falls while the loss falls ({name} {score:.3f}, more than {limit:.3f} below its "
            f"best {best:.3f} in {SCORE_PATIENCE} evaluations; loss {loss:.4g}, at the best {loss_then:.4g}): the best "
            f"teacher is in eval/best; try fewer optim.epochs, stronger augmentation (crops), or more images"
        )


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

    def get_placed_image(self, index: int) -> PlacedImage:
        return self._in_time(self._source.get_placed_image, self._positions[index])

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            image, target = super().__getitem__(index)
        except OSError:
            return torch.zeros(self._source.preprocessing.num_channels, *self._size), -1
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


class ProbeFeatures(NamedTuple):
    """What the teacher makes of the probe images, in float32 on the CPU."""

    cls: Tensor  # class tokens [N, D]
    patches: Tensor  # evenly spread over each image, [N, P, D]
    paths: list[str]
    readable: Tensor  # [N] bool, false where an image could not be read and its features mean nothing


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
    return ProbeFeatures(tokens[:, 0], tokens[:, 1:], found.paths, found.embeddings[:, 0] > 0)


def feature_metrics(cls: Tensor, patches: Tensor, similarities: Tensor, first: Tensor) -> dict[str, float]:
    """Metrics of features of at least two images.

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
    metrics = {
        "probe_cls_rank": effective_rank(cls),
        "probe_patch_rank": effective_rank(patches.flatten(0, 1)),
        "probe_cls_cosine": float(mean_cosine_similarity(cls)),
    }
    if patches.shape[1] > 1:
        metrics["probe_patch_cosine"] = float(mean_cosine_similarity(patches).mean())
        metrics["probe_patch_drift"] = similarity_drift(similarities, first)
    return metrics


@dataclass(kw_only=True)
class Monitors:
    """Measures a run's teacher, keeps the best, and warns of collapse and overfitting.

    Nothing here changes a parameter or a random state. Every process must call every method: sharded networks need all
    of them for a forward pass. Metrics, files and warnings are those of the main process.

    Args:
        model: the method, whose teacher may be sharded.
        output_dir: folder of the run.
        check_folder: called before anything is written there; an `OSError` counts as one of writing.
        device: where to compute.
        probe: images on which features are measured; None for none.
        detector: warns.
        targets: measures of the batches.
        start: first iteration to come.
        best_metric: decides which teacher is the best, see `score_of`.
        batch_size: images per process and forward pass.
        num_workers: processes that decode images, per process of the run.
    """

    model: SSLMetaArch
    output_dir: Path
    device: torch.device
    probe: ProbeSet | None
    detector: CollapseDetector
    targets: TargetMeasures
    start: int
    best_metric: str
    batch_size: int
    num_workers: int
    check_folder: Callable[[], None] = lambda: None
    _first: dict[str, Any] = field(default_factory=dict, init=False)  # see `_compare`; main process only
    _warnings: list[str] = field(default_factory=list, init=False)

    def begin(self) -> dict[str, float]:
        """Measures the features that the run starts from, or reads what an earlier start of it measured.

        Must be called once, when records of iterations to come are gone from the metrics file.

        Returns:
            Metrics of the features now; empty when they were read, or no image is watched.
        """
        if is_main_process():
            folder, records = self.output_dir / "eval" / "best", read_metrics(self.output_dir / METRICS_FILE)
            try:
                mend_best(folder, records, self.best_metric, before=self.start)
            except OSError as error:
                logger.error("THE BEST TEACHER IS NOT KEPT in %s, training goes on: %s", folder, error)
            self._replay(records)
        if self.probe is None:
            return {}
        if is_main_process() and self.start > 0:
            self._first = self._read_first()
        if all_gather_objects(bool(self._first))[0]:
            return {}
        if self.start > 0:
            logger.info("patch_drift counts from iteration %d: no earlier measure of this run is there", self.start)
        metrics = self._measure()
        if is_main_process():
            self.detector.check_evaluation(self.start - 1, metrics, None)
        return metrics

    def complete_report(self, record: dict[str, Any]) -> None:
        """Adds the period's metrics of the targets to a progress record, and the warnings that it raises."""
        record |= self.targets.close_period()
        if is_main_process():
            self._warn(self.detector.check_training(record))
            if warnings := self.take_warnings():
                record["warnings"] = warnings

    def evaluate(self, iteration: int, knn: Mapping[str, float], teacher: Path | None) -> dict[str, float]:
        """Measures the teacher's features after an iteration and keeps the teacher if it is the best so far.

        Args:
            iteration: just done.
            knn: metrics of k-NN, empty without labelled sets.
            teacher: the teacher's file; None where it could not be written.

        Returns:
            ``knn`` and the metrics of the probe set.
        """
        metrics = {**knn, **self._measure()}
        if is_main_process():
            folder = self.output_dir / "eval" / "best"
            try:
                if teacher is not None:
                    self.check_folder()
                    keep_best(folder, teacher, iteration, knn, metric=self.best_metric)
            except OSError as error:  # its own file is there
                logger.error("THE BEST TEACHER IS NOT KEPT in %s, training goes on: %s", folder, error)
            self._warn(self.detector.check_evaluation(iteration, metrics, score_of(knn, self.best_metric)))
        return metrics

    def take_warnings(self) -> list[str]:
        """Warnings since the last call; those of the main process."""
        taken, self._warnings = self._warnings, []
        return taken

    def _warn(self, warnings: Iterable[str]) -> None:
        for warning in warnings:
            logger.warning("%s", warning)
            self._warnings.append(warning)

    def _replay(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Shows the detector what the run has recorded before a resume; its warnings have been raised then."""
        for record in records:
            if "evaluation" in record and "iteration" in record:
                metrics = record["evaluation"]
                finite = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
                score = score_of(finite, self.best_metric)
                self.detector.check_evaluation(record["iteration"], metrics, score)
            elif "iteration" in record:
                self.detector.check_training(record)

    def _measure(self) -> dict[str, float]:
        """Metrics of the teacher's features now, the same on every process; empty where there are none."""
        if self.probe is None:
            return {}
        backbone = self.model.teacher_backbone
        with random_state_untouched():
            try:
                features = probe_features(
                    backbone,
                    self.probe,
                    embed_dim=backbone.embed_dim,
                    batch_size=self.batch_size,
                    num_workers=self.num_workers,
                    device=self.device,
                )
            except ValueError as error:  # on all processes alike; no reason to lose a run
                logger.warning("the probe set could not be measured: %s", error)
                features = None
        self.model.train()
        release_gathered_parameters(self.model.teacher)
        metrics: dict[str, float] = {}
        if features is not None and is_main_process():
            metrics = self._compare(features)
        return all_gather_objects(metrics)[0]

    def _compare(self, features: ProbeFeatures) -> dict[str, float]:
        """Metrics of the images that can be read now and could be at the start; the first call writes the start."""
        similarities = patch_similarities(features.patches)
        if not self._first:
            names = [Path(path).name for path in features.paths]
            self._first = {"names": names, "readable": features.readable, "similarities": similarities}
            path = self.output_dir / "eval" / START_FILE
            try:
                self.check_folder()
                path.parent.mkdir(exist_ok=True)
                write_with_checksum(path, lambda file: torch.save(self._first, file))
            except OSError as error:  # the next start measures anew
                logger.error("%s cannot be written, training goes on: %s", path, error)
        usable = features.readable & self._first["readable"]
        if usable.sum() < 2:
            logger.warning("the probe set could not be measured: %d of its images can be read", int(usable.sum()))
            return {}
        first: Tensor = self._first["similarities"]
        return feature_metrics(features.cls[usable], features.patches[usable], similarities[usable], first[usable])

    def _read_first(self) -> dict[str, Any]:
        """What an earlier start of this run kept; empty when there is none, or none of the same images and patches."""
        assert self.probe is not None
        path = self.output_dir / "eval" / START_FILE
        if not path.exists():
            return {}
        fault = shown_fault(path)
        try:
            first: dict[str, Any] = {} if fault else torch.load(path, weights_only=True)
            found = [] if fault else list(first["names"])
        except Exception as error:  # bytes that are no file of torch make the unpickler raise almost anything
            fault = f"cannot be read: {error!r:.300}"
        if fault:
            logger.error("%s %s: it is not used, and written anew", path, fault)
            return {}
        # Names without folders: a set may be moved between two starts of a run.
        names = [self.probe.get_image_path(index).name for index in range(len(self.probe))]
        return first if found == names else {}
