"""Scale and shift between predicted and true depth, of which relative depth knows neither."""

import torch
from torch import Tensor

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
