"""The loss of a set of boxes: every object is matched with one query, and all others must see background."""

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.ops import box_convert, generalized_box_iou, generalized_box_iou_loss, sigmoid_focal_loss

from dinov2.distributed import all_reduce_sum, get_world_size
from dinov2.loss.classification_losses import positive_weights
from dinov2.loss.teacher_targets import at_least_float32

logger = logging.getLogger("dinov2")

_NO_QUERY = -2  # in denoising_targets; -1 is background
_EPS = 1e-12  # areas are in shares of the image's: those of the smallest defects are near 1e-6


class SetDetectionLoss(nn.Module):
    """Focal loss, L1 and generalised IoU of matched boxes, for every layer and every group of `SetDetectionHead`.

    The sums over an image's queries are divided by the number of matched queries, of all processes, so that a batch
    weighs the same however it is spread.

    Args:
        classification: weight of the focal loss, and of its cost in the matching.
        l1: weight of the distance of (cx, cy, w, h) in shares of the image; alike.
        giou: weight of 1 less the generalised IoU; alike.
        focal_alpha: weight of an object against ``1 - focal_alpha`` of background.
        focal_gamma: exponent of the focal loss.
        matches_per_object: queries of the second group that one object is matched with.

    Raises:
        ValueError: no weight is above 0, one is negative, or another value is out of range.

    Reference:
        Carion et al., "End-to-End Object Detection with Transformers" (2020), section 3.1; Zhu et al., "Deformable
        DETR" (2021), appendix A.4 (focal cost); Jia et al., "DETRs with Hybrid Matching" (2023), section 3.2.
    """

    def __init__(
        self,
        classification: float = 1.0,
        l1: float = 5.0,
        giou: float = 2.0,
        *,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        matches_per_object: int = 4,
    ) -> None:
        super().__init__()
        positive_weights(classification=classification, l1=l1, giou=giou)
        if not (0 <= focal_alpha <= 1 and focal_gamma >= 0 and matches_per_object >= 1):
            raise ValueError(
                f"focal_alpha={focal_alpha} must be in [0, 1], focal_gamma={focal_gamma} 0 or above, "
                f"matches_per_object={matches_per_object} 1 or more"
            )
        self.weights = (classification, l1, giou)
        self.focal_alpha = focal_alpha
        self.focal_gamma = focal_gamma
        self.matches_per_object = matches_per_object
        self._is_told = False  # that an image has more objects than queries

    def forward(
        self, outputs: Mapping[str, Tensor], boxes: Sequence[Tensor], labels: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """Computes the weighted terms, whose sum is the objective.

        Args:
            outputs: of a `SetDetectionHead` in training.
            boxes: of every image, ``[n, 4]``, XYXY in pixels of the head's images.
            labels: of every image, int64 ``[n]`` in ``[0, C)``.

        Returns:
            Scalars: ``classification``, ``l1`` and ``giou`` of the last layer, ``auxiliary`` of those before it, and,
            each where the head has it, ``proposals``, ``one_to_many`` and ``denoising``.

        Raises:
            ValueError: the outputs are not those of training, or there is not one entry of targets per image.
        """
        if "layer_scores" not in outputs:
            raise ValueError(f"the loss needs outputs of a head in training, got {', '.join(outputs)}")
        num_images, num_queries = outputs["layer_scores"].shape[1:3]
        if not len(boxes) == len(labels) == num_images:
            raise ValueError(f"{num_images} images came with {len(boxes)} entries of boxes, {len(labels)} of labels")
        device = outputs["layer_scores"].device
        with torch.autocast(device.type, enabled=False):
            size = outputs["image_size"]
            objects = _Objects(
                [box_convert(entry.to(size) / size, "xyxy", "cxcywh") for entry in boxes],
                [entry.to(device) for entry in labels],
            )
            self._tell_if_too_many(objects, num_queries)
            sums: dict[str, Tensor] = {}
            counts: dict[str, float] = {}
            # One proposal each, or the queries of an object would all begin alike.
            for name, repeats in {"layer": 1, "proposal": 1, "many": self.matches_per_object, "denoising": 0}.items():
                if f"{name}_scores" not in outputs:
                    continue
                scores, found = (at_least_float32(outputs[f"{name}_{what}"]) for what in ("scores", "boxes"))
                known = outputs["denoising_targets"] if name == "denoising" else None
                matches = (
                    self._match(scores, found, objects, repeats)
                    if known is None
                    else _known(objects.starts, known, len(scores))
                )
                sums[name] = self._terms(scores, found, objects, matches, known)
                counts[name] = matches.shape[1] / len(scores)
            average = all_reduce_sum(torch.tensor(list(counts.values()), device=device)) / get_world_size()
            means = {name: sums[name] / count.clamp(min=1) for name, count in zip(sums, average, strict=True)}
            return _named(means)

    def costs(self, scores: Tensor, boxes: Tensor, target_boxes: Tensor, labels: Tensor) -> Tensor:
        """What it costs to match queries with the objects of an image.

        Args:
            scores: logits ``[..., C]``.
            boxes: ``[..., 4]``, (cx, cy, w, h) in shares of the image.
            target_boxes: ``[n, 4]``, alike.
            labels: int64 ``[n]``.

        Returns:
            ``[..., n]``, no NaN and nothing infinite.
        """
        logits = scores[..., labels]
        probabilities = logits.sigmoid()
        positive = self.focal_alpha * (1 - probabilities) ** self.focal_gamma * F.softplus(-logits)
        negative = (1 - self.focal_alpha) * probabilities**self.focal_gamma * F.softplus(logits)
        distance = torch.cdist(boxes.flatten(0, -2), target_boxes, p=1).view_as(logits)
        corners = (box_convert(entry, "cxcywh", "xyxy") for entry in (boxes.flatten(0, -2), target_boxes))
        overlap = generalized_box_iou(*corners).view_as(logits)
        classification, l1, giou = self.weights
        cost: Tensor = classification * (positive - negative) + l1 * distance - giou * overlap
        return cost.nan_to_num()  # a network that diverges is found by its loss, after this

    @torch.no_grad()
    def _match(self, scores: Tensor, boxes: Tensor, objects: "_Objects", repeats: int) -> Tensor:
        """Layer, image, query and object (of the batch) of every match, int64 ``[4, M]``, layer by layer."""
        costs = [
            self.costs(scores[:, image], boxes[:, image], *targets) for image, targets in enumerate(objects.by_image())
        ]
        matches = []
        for image, entry in enumerate(costs):  # all were asked for before the first is waited for
            for layer, matrix in enumerate(entry.cpu().numpy()):
                queries, places = match(matrix, repeats)
                here = np.full((2, len(queries)), [[layer], [image]])
                matches.append(np.concatenate([here, [queries, places + objects.starts[image]]]))
        joined = np.concatenate(matches, axis=1)
        return torch.from_numpy(joined[:, np.argsort(joined[0], kind="stable")]).to(scores.device)

    def _terms(
        self, scores: Tensor, boxes: Tensor, objects: "_Objects", matches: Tensor, known: Tensor | None
    ) -> Tensor:
        """Weighted sums over all queries: ``[L, 3]`` for classification, L1 and GIoU of every layer."""
        layer, image, query, number = matches
        labels, targets = objects.labels[number], objects.boxes[number]
        one_hot = torch.zeros_like(scores)
        one_hot[layer, image, query, labels] = 1
        focal = sigmoid_focal_loss(scores, one_hot, self.focal_alpha, self.focal_gamma)
        if known is not None:
            focal = focal * (known > _NO_QUERY)[..., None]
        found = boxes[layer, image, query]
        distance = F.l1_loss(found, targets, reduction="none").sum(dim=1)
        corners = (box_convert(entry, "cxcywh", "xyxy") for entry in (found, targets))
        overlap = generalized_box_iou_loss(*corners, eps=_EPS)
        per_layer = (len(scores), matches.shape[1] // len(scores))
        terms = (focal.flatten(1), distance.view(per_layer), overlap.view(per_layer))
        return torch.stack([weight * term.sum(dim=1) for weight, term in zip(self.weights, terms, strict=True)], dim=1)

    def _tell_if_too_many(self, objects: "_Objects", num_queries: int) -> None:
        most = max(objects.counts)
        if most > num_queries and not self._is_told:
            self._is_told = True
            logger.warning(
                "an image has %d objects, and the head %d queries: the others are not learnt, nor will more ever be "
                "found in an image; raise num_queries (this is said once)",
                most, num_queries,
            )  # fmt: skip


def match(costs: NDArray[np.floating], repeats: int = 1) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The cheapest matches of queries with objects, every query once at most.

    Args:
        costs: finite, ``[Q, n]``.
        repeats: queries that every object is matched with; fewer where they do not suffice for all.

    Returns:
        Queries and their objects, one entry per match.
    """
    queries, places = linear_sum_assignment(np.tile(costs, (1, repeats)))
    return queries, places % max(costs.shape[1], 1)


class _Objects:
    """The objects of a batch, image after image: boxes ``[N, 4]``, (cx, cy, w, h) in shares, and labels ``[N]``."""

    def __init__(self, boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> None:
        self.boxes = torch.cat(list(boxes))
        self.labels = torch.cat(list(labels))
        self.counts = [len(entry) for entry in labels]
        self.starts = [0, *itertools.accumulate(self.counts)][:-1]

    def by_image(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Boxes and labels of every image."""
        return zip(self.boxes.split(self.counts), self.labels.split(self.counts), strict=True)


def _known(starts: Sequence[int], numbers: Tensor, num_layers: int) -> Tensor:
    """Matches as of `SetDetectionLoss._match`, alike in all layers, from the number ``[B, Q]`` in the image of each."""
    image, query = torch.nonzero(numbers >= 0, as_tuple=True)
    number = numbers[image, query] + torch.tensor(starts, device=numbers.device)[image]
    layer = torch.arange(num_layers, device=numbers.device).repeat_interleave(len(image))
    return torch.stack([layer, *(entry.repeat(num_layers) for entry in (image, query, number))])


def _named(means: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The terms of every layer and kind, ``[L, 3]``, as they are logged."""
    named = dict(zip(("classification", "l1", "giou"), means["layer"][-1], strict=True))
    if len(means["layer"]) > 1:
        named["auxiliary"] = means["layer"][:-1].sum()
    names = {"proposal": "proposals", "many": "one_to_many", "denoising": "denoising"}
    return named | {name: means[kind].sum() for kind, name in names.items() if kind in means}
