"""Heads that score how unlike those of good parts the features of every patch are."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from dinov2.models.heads.features import BlockFeatures

CLASSES = ("good", "anomalous")
FOREGROUNDS = ("none", "pca")
NUM_NEIGHBOURS = 9  # of the nearest patch of the memory, itself counted, that weigh the score of an image
SMOOTHING = 4.0  # pixels of the image that the backbone sees
ROWS_AT_A_TIME = 1024


def patch_rows(features: Sequence[BlockFeatures]) -> Tensor:
    """Features of all blocks, each of unit length, one behind the other: ``[B, N, D]``, row after row of patches.

    Every patch has unit length, so that distances lie in [0, 2].
    """
    rows = [F.normalize(maps.float().flatten(2).transpose(1, 2), dim=2) for maps, _ in features]
    joined: Tensor = torch.cat(rows, dim=2) / len(rows) ** 0.5
    return joined


class MemoryHead(nn.Module):
    """Distance of every patch to the nearest of a memory of patches of good parts; nothing is trained.

    In training mode patches are only collected in `shown`; `remember` is given the memory that is made of them.

    Args:
        embed_dim: width of a block's features.
        num_outputs: not looked at.
        num_blocks: whose features are joined.

    Reference:
        Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022.
    """

    centres: Tensor  # [K, D] of unit length
    neighbours: Tensor  # [K, k] int64: the other centres that lie nearest to each, from near to far
    radius: Tensor  # largest distance of a remembered patch to its nearest centre
    num_patches: Tensor  # int64, that the centres stand for
    foreground: Tensor | None  # see `is_foreground`; None where all patches count

    def __init__(self, embed_dim: int, num_outputs: int, *, num_blocks: int) -> None:
        super().__init__()
        self.shown: list[Tensor] = []
        self.register_buffer("centres", torch.empty(0, embed_dim * num_blocks))
        self.register_buffer("neighbours", torch.empty(0, 0, dtype=torch.int64))
        self.register_buffer("radius", torch.zeros(()))
        self.register_buffer("num_patches", torch.zeros((), dtype=torch.int64))
        self.register_buffer("foreground", None)
        self.register_load_state_dict_pre_hook(_make_room)  # type: ignore[no-untyped-call]

    def forward(self, features: Sequence[BlockFeatures]) -> dict[str, Tensor]:
        """Scores maps ``[B, D, h, w]`` of blocks: ``patches`` ``[B, 1, h, w]`` and their images' ``score`` ``[B]``.

        An image scores as its farthest patch, times a weight that is smaller where other centres lie about as near.
        Background scores 0.
        """
        patches = patch_rows(features)
        count, (height, width) = patches.shape[0], features[0][0].shape[-2:]
        if self.training:
            self.shown.append(patches.detach().flatten(0, 1).cpu())
            return {"patches": patches.new_zeros(count, 1, height, width), "score": patches.new_zeros(count)}
        similarities, nearest = (patches @ self.centres.T).max(dim=2)
        scores = distance_of(similarities)
        if self.foreground is not None:
            scores = scores * is_foreground(patches, self.foreground)
        found = image_scores(patches, scores, nearest, self.centres, self.neighbours)
        return {"patches": scores.view(count, 1, height, width), "score": found}

    @torch.no_grad()
    def remember(self, centres: Tensor, *, radius: float, num_patches: int, foreground: Tensor | None = None) -> None:
        """Takes a memory: centres ``[K, D]`` of unit length, see `dinov2.eval.anomaly.memory.PatchMemory`."""
        self.shown.clear()
        self.centres = centres.to(self.centres)
        self.radius.fill_(radius)
        self.num_patches.fill_(num_patches)
        self.neighbours = neighbours_of(self.centres)
        self.foreground = None if foreground is None else foreground.to(self.centres)


def _make_room(module: nn.Module, state: Mapping[str, Any], prefix: str, *more: Any) -> None:
    """Before weights are loaded: as many centres as they have, and a foreground if they have one."""
    found, centres = state.get(prefix + "foreground"), cast(Tensor, module.centres)
    module.register_buffer("foreground", centres.new_empty(found.shape) if isinstance(found, Tensor) else None)
    for name in ("centres", "neighbours"):
        found, own = state.get(prefix + name), getattr(module, name)
        if isinstance(found, Tensor) and found.ndim == own.ndim:
            wide = own.shape[1] if name == "centres" else found.shape[1]
            setattr(module, name, own.new_empty(len(found), wide))


def is_foreground(patches: Tensor, foreground: Tensor) -> Tensor:
    """Which patches ``[..., D]`` show the part: bool ``[...]``.

    Args:
        patches: of unit length.
        foreground: ``[D + 1]``: a direction, and the product with it from which on a patch shows the part.
    """
    return (patches @ foreground[:-1]) >= foreground[-1]


def distance_of(similarities: Tensor) -> Tensor:
    """Between rows of unit length."""
    return (2 - 2 * similarities).clamp_min(0).sqrt()


@torch.no_grad()
def neighbours_of(centres: Tensor) -> Tensor:
    """The other centres that lie nearest to each of ``[K, D]``, ``[K, k]`` int64, from near to far."""
    others = min(NUM_NEIGHBOURS, len(centres)) - 1
    pieces = []
    for rows in torch.arange(len(centres), device=centres.device).split(ROWS_AT_A_TIME):
        similarities = centres[rows] @ centres.T
        similarities[torch.arange(len(rows)), rows] = -torch.inf
        pieces.append(similarities.topk(others, dim=1).indices)
    return torch.cat(pieces)


def image_scores(patches: Tensor, scores: Tensor, nearest: Tensor, centres: Tensor, neighbours: Tensor) -> Tensor:
    """Scores images ``[B]`` as their farthest patch, times a weight that is smaller where other centres lie as near.

    The weight is 1 less the softmax, at the nearest centre, of the patch's distances to it and its neighbours.

    Args:
        patches: ``[B, N, D]``.
        scores: ``[B, N]``, their distances to the nearest centre.
        nearest: ``[B, N]`` int64, which that is.
        centres: ``[K, D]``.
        neighbours: of these, see `neighbours_of`.

    Reference:
        Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022, section 3.3.
    """
    highest, place = scores.max(dim=1)
    if not neighbours.shape[1]:
        return highest
    centre = nearest.gather(1, place[:, None])  # [B, 1]
    around = torch.cat([centre, neighbours[centre[:, 0]]], dim=1)
    farthest = patches.gather(1, place[:, None, None].expand(-1, -1, patches.shape[2]))  # [B, 1, D]
    distances = distance_of((farthest * centres[around]).sum(dim=2))
    return highest * (1 - distances.softmax(dim=1)[:, 0])


class ReconstructionHead(nn.Module):
    """A small decoder that has learnt to give back features of good parts: what it fails to give back is unlike them.

    Features go through a narrow layer, of which some inputs are dropped in training, so that a patch is given back by
    what good patches have in common with it and its neighbours.

    Args:
        embed_dim: width of a block's features.
        num_outputs: not looked at.
        num_blocks: whose features are joined.
        channels: width of the narrow layer.
        dropout: share of the inputs that is dropped in training.

    Reference:
        Guo et al., "Dinomaly: The Less Is More Philosophy in Multi-Class Unsupervised Anomaly Detection", CVPR 2025.
    """

    def __init__(self, embed_dim: int, num_outputs: int, *, num_blocks: int, channels: int, dropout: float) -> None:
        super().__init__()
        self.num_blocks = num_blocks
        width = embed_dim * num_blocks
        self.layers = nn.Sequential(
            nn.Dropout(dropout),
            nn.Conv2d(width, channels, 1),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
            nn.GELU(),
            nn.Conv2d(channels, width, 1),
        )

    def forward(self, features: Sequence[BlockFeatures]) -> dict[str, Tensor]:
        """Scores maps ``[B, D, h, w]`` of blocks: ``patches`` ``[B, 1, h, w]`` and their images' ``score`` ``[B]``.

        A patch scores 1 less the cosine of its features and what is given back, the mean over blocks: in [0, 2].
        """
        joined = torch.cat([F.normalize(maps.float(), dim=1) for maps, _ in features], dim=1)
        wanted = joined.unflatten(1, (self.num_blocks, -1))
        given = self.layers(joined * wanted.shape[2] ** 0.5).unflatten(1, (self.num_blocks, -1))
        patches = (1 - F.cosine_similarity(given.float(), wanted, dim=2)).mean(dim=1, keepdim=True).clamp_min(0)
        return {"patches": patches, "score": patches.flatten(1).amax(dim=1)}


def anomaly_map(
    scores: Tensor, image_size: tuple[int, int], size: tuple[int, int], smoothing: float = SMOOTHING
) -> npt.NDArray[np.float32]:
    """Scores of patches as a map of pixels: enlarged bilinearly (corners not aligned), then smoothed.

    Args:
        scores: ``[h, w]``.
        image_size: that the backbone saw, (height, width).
        size: of the map, such as that of the original image, which the evaluated one is squeezed from.
        smoothing: standard deviation of the Gaussian in pixels of the evaluated image; 0 leaves it out.
    """
    enlarged = F.interpolate(scores[None, None].float(), size, mode="bilinear", align_corners=False)[0, 0].numpy()
    if smoothing:
        sigmas = tuple(smoothing * ours / seen for ours, seen in zip(size, image_size, strict=True))
        enlarged = gaussian_filter(enlarged, sigmas, mode="nearest")
    return np.asarray(np.maximum(enlarged, 0), dtype=np.float32)
