"""Features of a frozen model over a whole dataset."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dinov2.data.datasets.base import ImageDataset
from dinov2.distributed import all_gather_objects, get_world_size
from dinov2.eval.common_checks import check_finite_features
from dinov2.eval.frozen import device_of, evaluating
from dinov2.eval.progress import report_progress
from dinov2.eval.sharding import gather_shares, share_of_this_process

NUM_PATHS_NAMED = 5


@dataclass(frozen=True)
class Features:
    """What a frozen model makes of a dataset; row ``i`` belongs to image ``i`` of the dataset.

    Attributes:
        embeddings: ``[N, D]`` float32 on the CPU.
        labels: ``[N]`` int64 on the CPU, -1 where the label is missing.
        group_ids: the part of every image.
        paths: the file of every image.
    """

    embeddings: Tensor
    labels: Tensor
    group_ids: list[str]
    paths: list[str]

    def __post_init__(self) -> None:
        lengths = {len(self.embeddings), len(self.labels), len(self.group_ids), len(self.paths)}
        if len(lengths) != 1:
            raise ValueError(f"embeddings, labels, group_ids and paths must be equally long, not {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.paths)


class _Images(Dataset[tuple[Tensor, str]]):
    """The images at some positions of a dataset, each with what kept it from being read, empty where nothing did.

    Another image stands in for one that cannot be read: all processes must run the model equally often, and they raise
    together afterwards.
    """

    def __init__(self, dataset: ImageDataset, positions: Sequence[int]) -> None:
        self.dataset = dataset
        self.positions = positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        position = self.positions[index]
        try:
            return self._read(position), ""
        except OSError as error:
            path = str(self.dataset.get_image_path(position))
            return self._stand_in(), str(error) if path in str(error) else f"{path}: {error}"

    def _read(self, position: int) -> Tensor:
        image, _ = self.dataset[position]
        if not isinstance(image, Tensor):
            raise TypeError(f"the dataset's transform must return a tensor, not {type(image).__name__}")
        return image

    def _stand_in(self) -> Tensor:
        for position in range(len(self.dataset)):
            try:
                return self._read(position)
            except OSError:
                continue
        raise ValueError(f"none of the {len(self.dataset)} images can be read")


def _collate(items: list[tuple[Tensor, str]]) -> tuple[Tensor, list[str]]:
    """Images ``[B, 3, H, W]``, and what kept some of them from being read."""
    return torch.stack([image for image, _ in items]), [problem for _, problem in items if problem]


def extract_features(
    model: nn.Module,
    dataset: ImageDataset,
    *,
    batch_size: int = 32,
    num_workers: int = 2,
    device: torch.device | str | None = None,
    autocast_dtype: torch.dtype | None = None,
) -> Features:
    """Runs a frozen model over every image of a dataset, on all processes of the run together.

    Every process runs the same number of batches of the same sizes, so that a sharded model cannot dead-lock, and ends
    with the same result, in the dataset's order.

    Args:
        model: maps images ``[B, 3, H, W]`` to features ``[B, D]``; it is not moved, and gets its modes back.
        dataset: images of one size after its transform. Labels are those of ``get_targets()``.
        batch_size: images per process and forward pass.
        num_workers: processes that decode images, per process of the run; 0 decodes in this one.
        device: where images are sent; by default where the model lies.
        autocast_dtype: precision of the forward pass; by default that of the model.

    Raises:
        ValueError: for an empty dataset, an image that cannot be read (an evaluation with holes would compare with
            nothing), features of another shape, or features that are not finite.
    """
    if len(dataset) == 0:
        raise ValueError(f"the dataset ({type(dataset).__name__}) has no images")
    device = device_of(model) if device is None else torch.device(device)
    positions = share_of_this_process(len(dataset))
    loader: DataLoader[tuple[Tensor, list[str]]] = DataLoader(
        _Images(dataset, positions),  # type: ignore[arg-type]  # `_collate` turns items into batches
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # the loader draws a seed; an evaluation must not move a training run's numbers
    )
    autocast = torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None)
    embeddings = None
    filled = 0
    problems: list[str] = []
    with evaluating(model):
        for batch, unread in report_progress(loader, "features", batch_size * get_world_size(), len(dataset)):
            problems += unread
            with autocast:
                output = model(batch.to(device, non_blocking=True))
            if not isinstance(output, Tensor) or output.ndim != 2:
                found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise ValueError(f"the model must return features of shape [B, D], not {found}")
            if embeddings is None:
                embeddings = torch.empty(len(positions), output.shape[1])
            embeddings[filled : filled + len(output)] = output.float().cpu()
            filled += len(output)
    assert embeddings is not None
    assert filled == len(positions)
    _check_all_read([problem for share in all_gather_objects(problems) for problem in share])
    features = Features(
        embeddings=gather_shares(embeddings, len(dataset), device),
        labels=torch.from_numpy(dataset.get_targets()),
        group_ids=list(dataset.get_group_ids()),
        paths=[str(dataset.get_image_path(index)) for index in range(len(dataset))],
    )
    check_finite_features(features.embeddings, features.paths)
    return features


def _check_all_read(problems: list[str]) -> None:
    if problems:
        distinct = list(dict.fromkeys(problems))  # padding repeats an image
        more = f"; and {len(distinct) - NUM_PATHS_NAMED} more" if len(distinct) > NUM_PATHS_NAMED else ""
        raise ValueError("evaluation needs every image, but " + "; ".join(distinct[:NUM_PATHS_NAMED]) + more)
