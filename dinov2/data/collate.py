"""Collates crops into a pretraining batch and draws the masks of its global crops."""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dinov2.data.masking import Mask, MaskingGenerator
from dinov2.data.pretraining import CropSample
from dinov2.utils.seeds import derive_seed


@dataclass(frozen=True, kw_only=True)
class PretrainingBatch:
    """One process's batch of B images, crop-major: crop 0 of all images, then crop 1, and so on.

    Attributes:
        global_crops: ``[2B, 3, H, W]``.
        local_crops: ``[L*B, 3, h, w]``; None when there are no local crops.
        masks: ``[2B, N]`` bool, True where a patch of a global crop is replaced by the mask token.
        mask_indices: ``[M]`` int64, positions of the masked patches in the flattened ``masks``.
        mask_weights: ``[M]`` float32, 1 / (number of masked patches of the same crop).
        num_masked: M.
        upperbound: Size that no M of this batch size can exceed; the same for every batch of the same size.
        names: ``B`` names of the images.
        unreadable: Names of images that could not be read and were replaced.
    """

    global_crops: Tensor
    local_crops: Tensor | None
    masks: Tensor
    mask_indices: Tensor
    mask_weights: Tensor
    num_masked: int
    upperbound: int
    names: tuple[str, ...]
    unreadable: tuple[str, ...]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "PretrainingBatch":
        """The batch on ``device``, crops converted to ``dtype``; copies overlap with computation from pinned memory."""
        return self._map(
            lambda crops: crops.to(device=device, dtype=dtype, non_blocking=True),
            lambda masks: masks.to(device, non_blocking=True),
        )

    def pin_memory(self) -> "PretrainingBatch":
        """The batch in page-locked memory; called by the data loader."""
        return self._map(Tensor.pin_memory, Tensor.pin_memory)

    def _map(self, on_crops: Callable[[Tensor], Tensor], on_masks: Callable[[Tensor], Tensor]) -> "PretrainingBatch":
        return replace(
            self,
            global_crops=on_crops(self.global_crops),
            local_crops=None if self.local_crops is None else on_crops(self.local_crops),
            masks=on_masks(self.masks),
            mask_indices=on_masks(self.mask_indices),
            mask_weights=on_masks(self.mask_weights),
        )


def collate_crops(
    samples: Sequence[CropSample],
    *,
    mask_ratio_min_max: tuple[float, float],
    mask_probability: float,
    num_tokens: int,
    mask_generator: Callable[[int, random.Random], Mask],
    rng: random.Random,
    dtype: torch.dtype = torch.float32,
) -> PretrainingBatch:
    """Stacks the crops of B images and masks int(2B * mask_probability) of the 2B global crops.

    The range of mask ratios is cut into as many equal bins as there are masks; each mask's ratio is uniform in its bin,
    and the masks are dealt to the crops at random.

    Args:
        samples: At least one sample; all with the same numbers and sizes of crops.
        mask_ratio_min_max: Smallest and largest share of masked patches, 0..1.
        mask_probability: Share of global crops that get a mask, 0..1.
        num_tokens: Number N of patches of a global crop.
        mask_generator: Draws a mask with N cells and about the number of masked patches it is asked for.
        rng: Source of all randomness.
        dtype: Type of the crops in the batch.

    Reference: Oquab et al., DINOv2 (2023), section 4; Zhou et al., iBOT (2022), section 4.1.
    """
    if not samples:
        raise ValueError("cannot collate an empty list of samples")
    num_crops = len(samples) * len(samples[0].global_crops)
    num_masks = int(num_crops * mask_probability)
    bounds = torch.linspace(*mask_ratio_min_max, num_masks + 1).tolist()
    drawn: list[Mask] = []
    upperbound = 0
    for low, high in itertools.pairwise(bounds):
        drawn.append(mask_generator(int(num_tokens * rng.uniform(low, high)), rng))
        upperbound += int(num_tokens * high)
    drawn += [np.zeros(num_tokens, dtype=np.bool_)] * (num_crops - num_masks)
    rng.shuffle(drawn)
    masks = torch.from_numpy(np.stack([mask.reshape(num_tokens) for mask in drawn]))  # [2B, N]
    indices = masks.flatten().nonzero().flatten()
    weights = masks.sum(dim=1).clamp(min=1).reciprocal()[:, None].expand_as(masks)[masks]
    return PretrainingBatch(
        global_crops=_stack([sample.global_crops for sample in samples], dtype),
        local_crops=_stack([sample.local_crops for sample in samples], dtype) if samples[0].local_crops else None,
        masks=masks,
        mask_indices=indices,
        mask_weights=weights,
        num_masked=indices.numel(),
        upperbound=upperbound,
        names=tuple(sample.name for sample in samples),
        unreadable=tuple(name for sample in samples for name in sample.unreadable),
    )


class PretrainingCollate:
    """The collate function of pretraining: ``collate_crops`` with masks that depend on seed and position only.

    Args:
        mask_generator: Draws the masks; its grid is that of the global crops.
        mask_ratio_min_max: Smallest and largest share of masked patches, 0 <= smallest <= largest <= 1.
        mask_probability: Share of global crops that get a mask, 0..1.
        seed: The run's seed.
        dtype: Type of the crops in the batch.
    """

    def __init__(
        self,
        *,
        mask_generator: MaskingGenerator,
        mask_ratio_min_max: tuple[float, float] = (0.1, 0.5),
        mask_probability: float = 0.5,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        low, high = mask_ratio_min_max
        if not 0 <= low <= high <= 1:
            raise ValueError(f"mask_ratio_min_max needs 0 <= smallest <= largest <= 1, got {mask_ratio_min_max}")
        if not 0 <= mask_probability <= 1:
            raise ValueError(f"mask_probability must lie in 0..1, got {mask_probability}")
        self.mask_generator = mask_generator
        self.mask_ratio_min_max = (low, high)
        self.mask_probability = mask_probability
        self.seed = seed
        self.dtype = dtype

    def __call__(self, samples: Sequence[CropSample]) -> PretrainingBatch:
        """Collates one batch; the position of its first sample seeds the masks."""
        if not samples:
            raise ValueError("cannot collate an empty list of samples")
        return collate_crops(
            samples,
            mask_ratio_min_max=self.mask_ratio_min_max,
            mask_probability=self.mask_probability,
            num_tokens=self.mask_generator.num_patches,
            mask_generator=self.mask_generator,
            rng=random.Random(derive_seed(self.seed, "mask", samples[0].position)),
            dtype=self.dtype,
        )


def _stack(crops_of_samples: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> Tensor:
    """Crop-major batch ``[crops * B, 3, H, W]``."""
    crops = [crop for same_crop in zip(*crops_of_samples, strict=True) for crop in same_crop]
    # Written in its final type at once: a second pass over the batch costs more than the stacking.
    batch = torch.empty((len(crops), *crops[0].shape), dtype=dtype)
    return torch.stack(crops, out=batch)
