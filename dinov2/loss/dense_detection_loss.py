"""Which positions are to find which objects, and losses of their classes, boxes and distances."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou, complete_box_iou_loss

from dinov2.loss.classification_losses import positive_weights
from dinov2.loss.teacher_targets import at_least_float32

CLASSIFICATION_KINDS = ("bce", "varifocal")

_MIN_QUALITY = 0.1  # of the best position of an object: what weighs nothing would never come to overlap it


@torch.no_grad()
def assign_positions(
    probabilities: Tensor,
    predicted: Tensor,
    points: Tensor,
    boxes: Tensor,
    labels: Tensor,
    *,
    min_side: Tensor | float,
    max_positions: int = 10,
    alpha: float = 0.5,
    beta: float = 6.0,
) -> tuple[Tensor, Tensor]:
    """Gives each object of an image the positions that class it and box it best so far.

    Of the positions inside of its box an object takes those with the highest ``p^alpha · IoU^beta``, where ``p`` is the
    probability of its class. What several objects want goes to the one whose box it overlaps most.

    Args:
        probabilities: ``[N, C]`` in [0, 1]. Of the classes at each position.
        predicted: float32 ``[N, 4]``, (x1, y1, x2, y2) in pixels. The box of each position.
        points: float32 ``[N, 2]``, (x, y) in pixels. The positions.
        boxes: float32 ``[n, 4]`` of the objects. Those without an area get no position.
        labels: int64 ``[n]`` in ``[0, C)``. The classes of the objects.
        min_side: pixels that a box is taken to measure at least when positions inside of it are looked for; at the
            spacing of the positions every object has one.
        max_positions: that an object takes.
        alpha: exponent of the probability.
        beta: exponent of the IoU.

    Returns:
        The object of each position, int64 ``[N]``, and how well the position does, float32 ``[N]`` in [0, 1]: 0 for
        positions that no object has taken (whose object means nothing), and for each object the highest IoU of its
        positions (or 0.1 if that is more) at its best one, less at others in proportion to ``p^alpha · IoU^beta``.

    Reference:
        Feng et al., "TOOD: Task-aligned One-stage Object Detection" (2021), section 3.2; the bounds ``min_side`` and
        0.1, which keep small objects from being passed over, are not in it.
    """
    if not len(boxes):
        return points.new_zeros(len(points), dtype=torch.int64), points.new_zeros(len(points))
    sides = boxes[:, 2:] - boxes[:, :2]
    offsets = (points - (boxes[:, None, :2] + sides[:, None] / 2)).abs()  # [n, N, 2]
    inside = (offsets <= sides[:, None].clamp_min(min_side) / 2).all(dim=2) & (sides > 0).all(dim=1)[:, None]
    overlap = box_iou(boxes, predicted)  # [n, N]
    alignment = (probabilities.T[labels] ** alpha * overlap**beta).where(inside, -1)
    best = alignment.topk(min(max_positions, len(points)), dim=1)
    taken = torch.zeros_like(inside).scatter_(1, best.indices, best.values >= 0)
    owner = overlap.where(taken, -1).argmax(dim=0)  # [N]
    taken &= owner == torch.arange(len(boxes), device=boxes.device)[:, None]
    alignment, overlap = alignment.where(taken, 0), overlap.where(taken, 0)
    highest = alignment.amax(dim=1, keepdim=True)
    share = (alignment / highest).where(highest > 0, 1)  # positions that are all as bad are as good
    quality = share * overlap.amax(dim=1, keepdim=True).clamp_min(_MIN_QUALITY)
    return owner, quality.where(taken, 0).amax(dim=0)


def distribution_focal_loss(logits: Tensor, distances: Tensor) -> Tensor:
    """Cross-entropy of a distance, spread over the whole numbers below and above it so that their mean is the distance.

    Args:
        logits: float ``[..., bins]``. Of the numbers from 0 to ``bins - 1``.
        distances: float ``[...]``. What they should be; beyond these numbers the nearest counts.

    Returns:
        ``[...]``.

    Reference:
        Li et al., "Generalized Focal Loss" (2020), equation 6.
    """
    bins = logits.shape[-1]
    numbers = torch.arange(bins, dtype=logits.dtype, device=logits.device)
    spread = (1 - (distances.clamp(0, bins - 1)[..., None] - numbers).abs()).clamp_min(0)
    return -(spread * logits.log_softmax(dim=-1)).sum(dim=-1)


def varifocal_loss(logits: Tensor, qualities: Tensor, alpha: float = 0.75, gamma: float = 2.0) -> Tensor:
    """Binary cross-entropy in which objects weigh by their quality and certain background little.

    Args:
        logits: float, any shape.
        qualities: likewise, in [0, 1]; 0 where there is nothing.
        alpha: weight of the background.
        gamma: exponent of the probability there.

    Returns:
        Values of the same shape.

    Reference:
        Zhang et al., "VarifocalNet" (2021), equation 2.
    """
    weights = qualities.where(qualities > 0, alpha * logits.sigmoid() ** gamma)
    return weights * F.binary_cross_entropy_with_logits(logits, qualities, reduction="none")


class DenseDetectionLoss(nn.Module):
    """Weighted sum of the losses of a `DenseDetectionHead`; a term of weight 0 is not computed.

    The probability of an object's class is to tell how well its position does (`assign_positions`), that of any other
    class to be 0. By that quality positions weigh in the losses of boxes and distances, and all terms are divided by
    the sum of it over the batch (or 1 if that is more).

    Args:
        classification: weight of the loss of the classes.
        ciou: weight of the complete IoU of the boxes.
        distribution: weight of `distribution_focal_loss`, a mean over the four sides.
        kind: of the loss of the classes: bce, binary cross-entropy, or varifocal, `varifocal_loss`.

    Raises:
        ValueError: no weight is above 0, one is negative, or there is no such kind.

    Reference:
        Zheng et al., "Distance-IoU Loss" (2020), section 3.3, on the complete IoU.
    """

    def __init__(
        self,
        classification: float = 1.0,
        ciou: float = 2.5,
        distribution: float = 0.5,
        *,
        kind: str = "bce",
    ) -> None:
        super().__init__()
        self.weights = positive_weights(classification=classification, ciou=ciou, distribution=distribution)
        if kind not in CLASSIFICATION_KINDS:
            raise ValueError(f"kind must be one of {', '.join(CLASSIFICATION_KINDS)}, found {kind!r}")
        self.kind = kind

    def forward(
        self, outputs: Mapping[str, Tensor], boxes: Sequence[Tensor], labels: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """Computes the weighted terms, whose sum is the objective.

        Args:
            outputs: of a `DenseDetectionHead`.
            boxes: per image the objects' boxes, float32 ``[n, 4]``, (x1, y1, x2, y2) in the pixels of ``outputs``; on
                any device. Those without an area do not count.
            labels: per image their classes, int64 ``[n]`` in ``[0, C)``.

        Returns:
            Scalars by name of the argument that holds their weight, already multiplied by it; those of boxes are 0
            with gradients of 0 where there is no object.

        Raises:
            ValueError: the number of images, or of boxes and labels of one, differs.
        """
        scores = outputs["scores"]
        sizes = [(tuple(own.shape), tuple(named.shape)) for own, named in zip(boxes, labels, strict=False)]
        if not len(boxes) == len(labels) == len(scores) or any(own != (*named, 4) for own, named in sizes):
            raise ValueError(
                f"each of the {len(scores)} images needs boxes [n, 4] and labels [n], found those of {len(boxes)} and "
                f"{len(labels)} images, with shapes {sizes}"
            )
        with torch.autocast(scores.device.type, enabled=False):
            logits, predicted, points, strides = (
                at_least_float32(outputs[name]) for name in ("scores", "boxes", "points", "strides")
            )
            boxes = [own.to(points) for own in boxes]
            labels = [own.to(points.device) for own in labels]
            min_side = strides.min()
            owners, qualities = zip(
                *(
                    assign_positions(*entry, min_side=min_side)
                    for entry in zip(logits.sigmoid(), predicted, [points] * len(boxes), boxes, labels, strict=True)
                ),
                strict=True,
            )
            quality = torch.stack(qualities)  # [B, N]
            total = quality.sum().clamp_min(1)
            image, position = quality.nonzero(as_tuple=True)  # [P] each
            first = torch.tensor([0, *(len(own) for own in boxes)], device=points.device).cumsum(dim=0)[:-1]
            owner = torch.stack(owners)[image, position] + first[image]
            weights = quality[image, position]
            terms = {}
            if "classification" in self.weights:
                targets = torch.zeros_like(logits)
                targets[image, position, torch.cat(labels)[owner]] = weights
                if self.kind == "varifocal":
                    losses = varifocal_loss(logits, targets)
                else:
                    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
                terms["classification"] = losses.sum() / total
            wanted = torch.cat(boxes)[owner]  # [P, 4]
            if "ciou" in self.weights:
                losses = complete_box_iou_loss(predicted[image, position], wanted)
                terms["ciou"] = (losses * weights).sum() / total
            if "distribution" in self.weights:
                point = points[position]
                sides = torch.cat([point - wanted[:, :2], wanted[:, 2:] - point], dim=1) / strides[position, None]
                distances = at_least_float32(outputs["distances"][image, position]).unflatten(1, (4, -1))
                losses = distribution_focal_loss(distances, sides).mean(dim=1)
                terms["distribution"] = (losses * weights).sum() / total
        return {name: self.weights[name] * term for name, term in terms.items()}
