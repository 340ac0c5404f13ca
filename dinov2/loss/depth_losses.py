"""Losses of predicted depth: scale-invariant logarithmic, gradient matching, squared and absolute differences."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dinov2.loss.cross_entropy import at_least_float32
from dinov2.loss.depth_alignment import align_depth, check_alignment

EPSILON = 1e-3  # added to depths before the logarithm, as upstream does
SHARE_OF_MEAN = 0.15
STEPS = (1, 2, 4, 6)  # every how many pixels the maps are sampled


class SigLoss(nn.Module):
    """Scale-invariant logarithmic loss: ``loss_weight · sqrt(var(g) + 0.15 · mean(g)²)``.

    ``g`` is the difference of the logarithms of prediction and target at the pixels of the whole batch that count; the
    variance is the unbiased one, or 0 for a single pixel. For warm-up, the first ``warm_iter`` calls in training mode
    leave the variance out; they are counted in the state dict, so that a resumed run goes on where it stopped. In
    evaluation mode the loss is always the whole one.

    Args:
        valid_mask: only pixels with a target above 0 (and up to ``max_depth``) count. Without, all that are not NaN.
        loss_weight: factor of the loss.
        max_depth: largest target that counts, in the unit of the targets; None for no limit.
        warm_up: whether the first calls leave the variance out.
        warm_iter: how many calls.

    Raises:
        ValueError: ``max_depth`` is given without ``valid_mask``, or out of range, or ``warm_iter`` is negative.

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
        super().__init__()
        _check_limit(max_depth, valid_mask)
        if warm_iter < 0:
            raise ValueError(f"warm_iter must be at least 0, found {warm_iter}")
        self.valid_mask = valid_mask
        self.loss_weight = loss_weight
        self.max_depth = max_depth
        self.warm_up = warm_up
        self.warm_iter = warm_iter
        self.register_buffer("warm_up_counter", torch.zeros((), dtype=torch.int64))

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Computes the loss.

        Args:
            predictions: ``[B, 1, H, W]`` or ``[B, H, W]``, above 0, any floating dtype.
            targets: of the same size, NaN where unknown.

        Returns:
            Scalar, float32 or wider; 0 with gradients of 0 where no pixel counts.

        Raises:
            ValueError: the sizes differ.
        """
        with torch.autocast(predictions.device.type, enabled=False):
            predictions, targets = as_maps(predictions, targets)
            known = _known(targets, self.max_depth, above_zero=self.valid_mask)
            count = known.sum()
            difference = _log_difference(predictions, targets, known)
            mean = difference.sum() / count.clamp_min(1)
            variance = (difference - mean).where(known, 0.0).square().sum() / (count - 1).clamp_min(1)
            if self.warm_up and self.training:
                warming = self.warm_up_counter < self.warm_iter
                variance = variance.where(~warming, 0.0)
                self.warm_up_counter += warming
            squared = variance + SHARE_OF_MEAN * mean.square()
            # The slope of the root at 0 is infinite: a perfect prediction would get gradients of NaN.
            return self.loss_weight * squared.where(squared > 0, 1.0).sqrt() * (squared > 0)


class GradientLoss(nn.Module):
    """Multi-scale gradient matching: where depth changes in the target, it shall change in the prediction.

    The difference of the logarithms of prediction and target is sampled at every first, second, fourth and sixth pixel;
    its absolute changes between samples two apart, downwards and to the right, are added up and divided by the number
    of samples that count.

    Upstream slices the first two axes of ``[B, 1, H, W]``, so what it compares are the depths of one pixel in different
    *images*, and with fewer than three images the loss is 0. ``upstream_slicing`` computes that, for comparison with
    scores of such trainings.

    Args:
        valid_mask: only pixels with a target above 0 (and up to ``max_depth``) count. Without, all that are not NaN.
        loss_weight: factor of the loss.
        max_depth: largest target that counts, in the unit of the targets; None for no limit.
        upstream_slicing: slices images and channels instead of height and width.

    Raises:
        ValueError: ``max_depth`` is given without ``valid_mask``, or out of range.

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
        super().__init__()
        _check_limit(max_depth, valid_mask)
        self.valid_mask = valid_mask
        self.loss_weight = loss_weight
        self.max_depth = max_depth
        self.upstream_slicing = upstream_slicing

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Computes the loss.

        Args:
            predictions: ``[B, 1, H, W]`` or ``[B, H, W]``, above 0, any floating dtype.
            targets: of the same size, NaN where unknown.

        Returns:
            Scalar, float32 or wider; 0 with gradients of 0 where no pixel counts.

        Raises:
            ValueError: the sizes differ.
        """
        with torch.autocast(predictions.device.type, enabled=False):
            predictions, targets = as_maps(predictions, targets)
            known = _known(targets, self.max_depth, above_zero=self.valid_mask)
            difference = _log_difference(predictions, targets, known)
            if self.upstream_slicing:
                difference, known = _images_by_channels(difference), _images_by_channels(known)
            scales = [_mean_change(difference[:, ::step, ::step], known[:, ::step, ::step]) for step in STEPS]
            return self.loss_weight * torch.stack(scales).sum()


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


def _log_difference(predictions: Tensor, targets: Tensor, known: Tensor) -> Tensor:
    """Logarithm of prediction / target, 0 where unknown."""
    # Unknown pixels are replaced before the logarithm: NaN would come back through its gradient.
    return torch.log(predictions.where(known, 1.0) + EPSILON) - torch.log(targets.where(known, 1.0) + EPSILON)


def _images_by_channels(maps: Tensor) -> Tensor:
    """``[B, H, W]`` -> ``[H · W, B, 1]``: images and channels where height and width are sliced."""
    return maps.flatten(1).T[:, :, None]


def _mean_change(difference: Tensor, known: Tensor) -> Tensor:
    """Absolute changes between samples two apart on the last two axes, added up, per sample that counts."""
    down = (difference[:, 2:] - difference[:, :-2]).abs() * (known[:, 2:] & known[:, :-2])
    right = (difference[:, :, 2:] - difference[:, :, :-2]).abs() * (known[:, :, 2:] & known[:, :, :-2])
    return (down.sum() + right.sum()) / known.sum().clamp_min(1)


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
