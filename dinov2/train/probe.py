"""The probe set: a fixed handful of images on which the teacher's features are watched during pretraining."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from dinov2.data.datasets.base import ImageDataset
from dinov2.data.deadline import Deadline
from dinov2.eval.features import extract_features

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
