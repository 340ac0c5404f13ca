"""Losses of predicted depth: scale-invariant logarithmic, gradient matching, squared and absolute differences."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dinov2.loss.classification_losses import positive_weights
from dinov2.loss.teacher_targets import at_least_float32

ALIGNMENTS = ("none", "least_squares", "median")


def align_depth(predictions: Tensor, targets: Tensor, known: Tensor, alignment: str) -> tuple[Tensor, Tensor]:
    """Brings the predictions and targets of every image to one scale and shift, so that their difference has neither.

    ``least_squares`` moves the predictions onto the targets: ``s · prediction + t`` with the scale and shift of least
    squared difference. Nothing keeps the scale above 0, so near and far may be exchanged; far-off pixels weigh most.
    ``median`` brings both to median 0 and mean absolute deviation 1, which is robust and keeps near and far apart.

    Args:
        predictions: ``[B, H, W]``, float32 or wider.
        targets: ``[B, H, W]``, finite where known.
        known: bool ``[B, H, W]``, the pixels that count.
        alignment: ``none``, ``least_squares`` or ``median``.

    Returns:
        Predictions and targets ``[B, H, W]``, both 0 where nothing is known. A prediction that is the same everywhere
        becomes the mean of the targets with ``least_squares``, and 0 with ``median``.

    Raises:
        ValueError: another alignment.

    Reference:
        Ranftl et al., "Towards Robust Monocular Depth Estimation" (2020), section 5, equations 4 to 6.
    """
    check_alignment(alignment)
    # Unknown targets are NaN: they are replaced, not multiplied by 0, or their gradients would be NaN too.
    predictions, targets = predictions.where(known, 0.0), targets.where(known, 0.0)
    if alignment == "least_squares":
        return _move_by_least_squares(predictions, targets, known), targets
    if alignment == "median":
        return _normalise_by_median(predictions, known), _normalise_by_median(targets, known)
    return predictions, targets


def check_alignment(alignment: str) -> None:
    """Raises ValueError for an alignment that `align_depth` does not know."""
    if alignment not in ALIGNMENTS:
        raise ValueError(f"depth alignment {alignment!r} is not one of {', '.join(ALIGNMENTS)}")


def _move_by_least_squares(predictions: Tensor, targets: Tensor, known: Tensor) -> Tensor:
    """The regression line of the targets over the predictions, image by image."""
    count = known.sum(dim=(1, 2), keepdim=True).clamp_min(1)
    prediction_mean = predictions.sum(dim=(1, 2), keepdim=True) / count
    target_mean = targets.sum(dim=(1, 2), keepdim=True) / count
    # Centred before squaring: sums of squares far from 0 lose the digits that the slope is made of.
    offsets = (predictions - prediction_mean).where(known, 0.0)
    spread = offsets.square().sum(dim=(1, 2), keepdim=True)
    together = (offsets * (targets - target_mean)).sum(dim=(1, 2), keepdim=True)
    scale = together / spread.where(spread > 0, 1.0)
    return (scale * offsets + target_mean).where(known, 0.0)


def _normalise_by_median(maps: Tensor, known: Tensor) -> Tensor:
    """Median 0 and mean absolute deviation 1 over the known pixels of every image; of two middle values, the lower."""
    count = known.sum(dim=(1, 2), keepdim=True)
    ordered = maps.where(known, torch.inf).flatten(1).sort(dim=1).values  # unknown pixels come last
    median = ordered.gather(1, (count[:, :, 0] - 1).clamp_min(0) // 2)[:, :, None]
    offsets = (maps - median.where(count > 0, 0.0)).where(known, 0.0)
    deviation = offsets.abs().sum(dim=(1, 2), keepdim=True) / count.clamp_min(1)
    return offsets / deviation.where(deviation > 0, 1.0)


EPSILON = 1e-3  # added to depths before the logarithm, as upstream does
SHARE_OF_MEAN = 0.15
STEPS = (1, 2, 4, 6)  # every how many pixels the maps are sampled


class LogDepthLoss(nn.Module, ABC):
    """A loss of the difference of logarithms between predicted and true depth.

    Args:
        valid_mask: only pixels with a target above 0 (and up to ``max_depth``) count. Without, all that are not NaN.
        loss_weight: factor of the loss.
        max_depth: largest target that counts, in the unit of the targets; None for no limit.

    Raises:
        ValueError: ``max_depth`` is given without ``valid_mask``, or out of range.
    """

    def __init__(self, valid_mask: bool = True, loss_weight: float = 1.0, max_depth: float | None = None) -> None:
        super().__init__()
        _check_limit(max_depth, valid_mask)
        self.valid_mask = valid_mask
        self.loss_weight = loss_weight
        self.max_depth = max_depth

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Computes the loss.

        Args:
            predictions: ``[B, 1, H, W]`` or ``[B, H, W]``, above 0, any floating dtype.
            targets: of the same size, NaN where unknown.

        Returns:
            Scalar, float32 or wider; 0 with gradients of 0 where no pixel counts, NaN where a prediction that counts is
            NaN or infinite.

        Raises:
            ValueError: the sizes differ.
        """
        with torch.autocast(predictions.device.type, enabled=False):
            predictions, targets = as_maps(predictions, targets)
            known = _known(targets, self.max_depth, above_zero=self.valid_mask)
            # Unknown pixels are replaced before the logarithm: NaN would come back through its gradient.
            predicted, true = (torch.log(maps.where(known, 1.0) + EPSILON) for maps in (predictions, targets))
            return self.loss_weight * self.reduce(predicted - true, known)

    @abstractmethod
    def reduce(self, difference: Tensor, known: Tensor) -> Tensor:
        """The loss of differences ``[B, H, W]``, 0 where not ``known`` (bool ``[B, H, W]``), without its weight."""


class SigLoss(LogDepthLoss):
    """Scale-invariant logarithmic loss: ``loss_weight · sqrt(var(g) + 0.15 · mean(g)²)``.

    ``g`` is the difference of the logarithms of prediction and target at the pixels of the whole batch that count; the
    variance is the unbiased one, or 0 for a single pixel. For warm-up, the first ``warm_iter`` calls in training mode
    leave the variance out; they are counted in the state dict, so that a resumed run goes on where it stopped. In
    evaluation mode the loss is always the whole one.

    Args:
        valid_mask: see `LogDepthLoss`, like the following.
        loss_weight: factor of the loss.
        max_depth: largest target that counts.
        warm_up: whether the first calls leave the variance out.
        warm_iter: how many calls.

    Raises:
        ValueError: see `LogDepthLoss`, or ``warm_iter`` is negative.

    Reference:
        Eigen et al., "Depth Map Prediction from a Single Image using a Multi-Scale Deep Network" (2014), section 3.2,
        in the form of Bhat et al., "AdaBins" (2021), equation 3.
    """

    warm_up_counter: Tensor

    def __init__(
        self,
        valid_mask: bool = True,
        loss_weight: float = 1.0,
        max_depth: float | None = None,
        warm_up: bool = False,
        warm_iter: int = 100,
    ) -> None:
        super().__init__(valid_mask, loss_weight, max_depth)
        if warm_iter < 0:
            raise ValueError(f"warm_iter must be at least 0, found {warm_iter}")
        self.warm_up = warm_up
        self.warm_iter = warm_iter
        self.register_buffer("warm_up_counter", torch.zeros((), dtype=torch.int64))

    def reduce(self, difference: Tensor, known: Tensor) -> Tensor:
        count = known.sum()
        mean = difference.sum() / count.clamp_min(1)
        variance = (difference - mean).where(known, 0.0).square().sum() / (count - 1).clamp_min(1)
        if self.warm_up and self.training:
            warming = self.warm_up_counter < self.warm_iter
            variance = variance.where(~warming, 0.0)
            self.warm_up_counter += warming
        squared = variance + SHARE_OF_MEAN * mean.square()
        # The slope of the root at 0 is infinite: a perfect prediction would get gradients of NaN. Asking for `> 0`
        # would make NaN a perfect 0 instead.
        return squared.where(squared != 0, 1.0).sqrt() * (squared != 0)


class GradientLoss(LogDepthLoss):
    """Multi-scale gradient matching: where depth changes in the target, it shall change in the prediction.

    The difference of the logarithms of prediction and target is sampled at every first, second, fourth and sixth pixel;
    its absolute changes between samples two apart, downwards and to the right, are added up and divided by the number
    of samples that count.

    Upstream slices the first two axes of ``[B, 1, H, W]``, so what it compares are the depths of one pixel in different
    *images*, and with fewer than three images the loss is 0. ``upstream_slicing`` computes that, for comparison with
    scores of such trainings.

    Args:
        valid_mask: see `LogDepthLoss`, like the following.
        loss_weight: factor of the loss.
        max_depth: largest target that counts.
        upstream_slicing: slices images and channels instead of height and width.

    Reference:
        Li and Snavely, "MegaDepth: Learning Single-View Depth Prediction from Internet Photos" (2018), section 4.1.
    """

    def __init__(
        self,
        valid_mask: bool = True,
        loss_weight: float = 1.0,
        max_depth: float | None = None,
        *,
        upstream_slicing: bool = False,
    ) -> None:
        super().__init__(valid_mask, loss_weight, max_depth)
        self.upstream_slicing = upstream_slicing

    def reduce(self, difference: Tensor, known: Tensor) -> Tensor:
        if self.upstream_slicing:  # [B, H, W] -> [H · W, B, 1]: images and channels are sliced
            difference, known = (maps.flatten(1).T[:, :, None] for maps in (difference, known))
        scales = []
        for step in STEPS:
            sampled, counts = difference[:, ::step, ::step], known[:, ::step, ::step]
            down = (sampled[:, 2:] - sampled[:, :-2]).abs() * (counts[:, 2:] & counts[:, :-2])
            right = (sampled[:, :, 2:] - sampled[:, :, :-2]).abs() * (counts[:, :, 2:] & counts[:, :, :-2])
            scales.append((down.sum() + right.sum()) / counts.sum().clamp_min(1))
        return torch.stack(scales).sum()


def masked_mse_loss(
    predictions: Tensor, targets: Tensor, *, alignment: str = "none", max_depth: float | None = None
) -> Tensor:
    """Mean squared difference over the known pixels of the batch.

    Args:
        predictions: ``[B, 1, H, W]`` or ``[B, H, W]``, any floating dtype.
        targets: of the same size, NaN where unknown; 0 and negative heights count.
        alignment: for relative depth, how each image's scale and shift are taken out first, see `align_depth`.
        max_depth: largest target that counts; None for no limit.

    Returns:
        Scalar in squared units of the targets (without unit for ``median``), float32 or wider; 0 with gradients of 0
        where no pixel counts.

    Raises:
        ValueError: the sizes differ, for another alignment, or ``max_depth`` not above 0.

    Reference:
        With alignment: Ranftl et al., "Towards Robust Monocular Depth Estimation" (2020), section 5, equation 3.
    """
    return _regression_loss(predictions, targets, torch.square, alignment, max_depth)


def masked_l1_loss(
    predictions: Tensor, targets: Tensor, *, alignment: str = "none", max_depth: float | None = None
) -> Tensor:
    """Mean absolute difference over the known pixels of the batch; see `masked_mse_loss`."""
    return _regression_loss(predictions, targets, torch.abs, alignment, max_depth)


def as_maps(predictions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Both as ``[B, H, W]`` in float32 or wider; raises ValueError where their sizes differ."""
    maps = tuple(
        at_least_float32(m.squeeze(1) if m.ndim == 4 and m.shape[1] == 1 else m) for m in (predictions, targets)
    )
    if maps[0].shape != maps[1].shape or maps[0].ndim != 3:
        raise ValueError(
            f"predicted and true depth must both be [B, 1, H, W] or [B, H, W] of one size, "
            f"found {list(predictions.shape)} and {list(targets.shape)}"
        )
    return maps[0], maps[1]


def _check_limit(max_depth: float | None, valid_mask: bool) -> None:
    if max_depth is not None and not valid_mask:
        raise ValueError(f"max_depth={max_depth} has no effect without valid_mask")
    if max_depth is not None and not max_depth > 0:
        raise ValueError(f"max_depth must be above 0, found {max_depth}")


def _known(targets: Tensor, max_depth: float | None, *, above_zero: bool) -> Tensor:
    """The pixels that count, bool of the shape of the targets."""
    known = targets.isfinite()
    if above_zero:
        known &= targets > 0
    if max_depth is not None:
        known &= targets <= max_depth
    return known


def _regression_loss(
    predictions: Tensor, targets: Tensor, error: Callable[[Tensor], Tensor], alignment: str, max_depth: float | None
) -> Tensor:
    check_alignment(alignment)
    _check_limit(max_depth, valid_mask=True)
    with torch.autocast(predictions.device.type, enabled=False):
        predictions, targets = as_maps(predictions, targets)
        known = _known(targets, max_depth, above_zero=False)
        predictions, targets = align_depth(predictions, targets, known, alignment)
        return error(predictions - targets).sum() / known.sum().clamp_min(1)


class DepthLoss(nn.Module):
    """Weighted sum of depth losses; a term of weight 0 is not computed.

    Args:
        scale_invariant_log: weight of `SigLoss`, for metric depth above 0.
        gradient: weight of `GradientLoss`.
        mse: weight of `masked_mse_loss`.
        l1: weight of `masked_l1_loss`.
        alignment: what ``mse`` and ``l1`` take out of each image: ``none`` for metric depth, ``least_squares`` or
            ``median`` for relative depth, see `align_depth`.
        max_depth: largest target that counts, in its unit; None for no limit.
        warm_up_iterations: how many training calls leave the variance out of `SigLoss`.
        upstream_slicing: of `GradientLoss`.

    Raises:
        ValueError: no weight is above 0, one is negative, or a setting has no effect or is out of range.
    """

    def __init__(
        self,
        *,
        scale_invariant_log: float = 1.0,
        gradient: float = 0.0,
        mse: float = 0.0,
        l1: float = 0.0,
        alignment: str = "none",
        max_depth: float | None = None,
        warm_up_iterations: int = 0,
        upstream_slicing: bool = False,
    ) -> None:
        super().__init__()
        self.weights = positive_weights(scale_invariant_log=scale_invariant_log, gradient=gradient, mse=mse, l1=l1)
        check_alignment(alignment)
        if alignment != "none" and not {"mse", "l1"} & self.weights.keys():
            raise ValueError(f"alignment {alignment!r} has no effect: the weights of mse and l1 are 0")
        if warm_up_iterations and "scale_invariant_log" not in self.weights:
            raise ValueError(f"{warm_up_iterations=} has no effect: the weight of scale_invariant_log is 0")
        if upstream_slicing and "gradient" not in self.weights:
            raise ValueError("upstream_slicing has no effect: the weight of gradient is 0")
        self.alignment = alignment
        self.max_depth = max_depth
        self.scale_invariant_log = SigLoss(
            loss_weight=scale_invariant_log,
            max_depth=max_depth,
            warm_up=warm_up_iterations > 0,
            warm_iter=warm_up_iterations,
        )
        self.gradient = GradientLoss(loss_weight=gradient, max_depth=max_depth, upstream_slicing=upstream_slicing)

    def forward(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Computes the weighted terms, whose sum is the objective.

        Args:
            outputs: predicted depth ``[B, 1, H, W]`` or ``[B, H, W]``.
            targets: true depth of the same size, NaN where unknown.

        Returns:
            Scalars by name of the argument that holds their weight, already multiplied by it.

        Raises:
            ValueError: the sizes differ.
        """
        terms = {}
        if "scale_invariant_log" in self.weights:
            terms["scale_invariant_log"] = self.scale_invariant_log(outputs, targets)
        if "gradient" in self.weights:
            terms["gradient"] = self.gradient(outputs, targets)
        for name, loss in (("mse", masked_mse_loss), ("l1", masked_l1_loss)):
            if name in self.weights:
                value = loss(outputs, targets, alignment=self.alignment, max_depth=self.max_depth)
                terms[name] = self.weights[name] * value
        return terms
