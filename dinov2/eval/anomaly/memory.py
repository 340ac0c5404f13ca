"""What good parts look like: a memory of patch features, or a Gaussian of patch statistics."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dinov2.eval.anomaly.coreset import greedy_coreset
from dinov2.eval.anomaly.operating_point import OperatingPoint
from dinov2.eval.neighbours import nearest_neighbours
from dinov2.models.heads.anomaly import distance_of, image_scores, is_foreground, neighbours_of
from dinov2.utils.files import write_atomically

FORMAT = "dinov2 anomaly memory"
VERSION = 1
THRESHOLDS = ("image", "part", "pixel")


class Scorer(Protocol):
    """What tells how unlike good patches are."""

    def score(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Scores patches ``[B, N, D]``: ``[B, N]``, and their images ``[B]``, on the CPU, from 0 up."""
        ...


def choose_centres(
    patches: Tensor, *, share: float, max_centres: int, projection: int | None = None, seed: int = 0
) -> tuple[Tensor, float]:
    """Patches ``[K, D]`` that stand for all patches of good parts, and the largest distance of one to the nearest.

    The arguments are those of `PatchMemory.fit`.

    Raises:
        ValueError: there are no patches, some are not finite, or the share or the number is out of range.
    """
    if not 0 < share <= 1 or max_centres < 1:
        raise ValueError(f"the share must be in (0, 1] and the centres at least 1, found {share} and {max_centres}")
    _check_finite(patches)
    count = min(max(round(share * len(patches)), 1), max_centres)
    rows, radius = greedy_coreset(patches, count, projection=projection, seed=seed)
    centres = patches[rows.to(patches.device)].clone()
    if projection is not None:  # that radius is one of projections
        radius = float(_distances(patches, centres, 1)[0].max())
    return centres, radius


def add_centres(centres: Tensor, radius: float, patches: Tensor) -> Tensor:
    """Centres ``[K, D]``, and behind them greedy ones of patches ``[N, D]`` that lie farther than the radius from all.

    Raises:
        ValueError: some are not finite.
    """
    _check_finite(patches)
    patches = patches.to(centres.device)
    rows, _ = greedy_coreset(patches, len(patches), known=centres, radius=radius)
    return torch.cat([centres, patches[rows.to(patches.device)]])


@dataclass(frozen=True, kw_only=True)
class MemoryOrigin:
    """What the patches of a memory come from; others cannot be compared with them.

    Attributes:
        backbone: `fingerprint` of its weights.
        image_size: height and width in pixels.
        blocks: whose features are joined.
        light: ``original`` or ``standardized``, as in dataset strings.
        value_range: values of files that become black and white; empty where they say so themselves.
        preprocessing: steps that images went through, as JSON; empty for none.
    """

    backbone: str
    image_size: tuple[int, int]
    blocks: tuple[int, ...]
    light: str = "original"
    value_range: tuple[float, ...] = ()
    preprocessing: str = ""

    def check(self, other: "MemoryOrigin", path: str | Path) -> None:
        """Raises ValueError naming what differs where this, that of a file, is not what shall be scored with."""
        names = {"backbone": "the backbone's weights", "image_size": "the image size"}
        differing = [
            f"{names.get(field.name, field.name)} ({_short(getattr(self, field.name))} there, "
            f"{_short(getattr(other, field.name))} here)"
            for field in fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]
        if differing:
            raise ValueError(f"{path} was made with something else: {', '.join(differing)}; build the memory again")


@dataclass(frozen=True, kw_only=True, eq=False)
class PatchMemory:
    """Patches that stand for all patches of good parts.

    Attributes:
        centres: ``[K, D]`` float32 of unit length, on the device that shall compute.
        radius: the largest distance of a good patch to its nearest centre.
        num_patches: how many good patches they stand for.
        origin: what they come from.
        thresholds: operating points by level (`THRESHOLDS`), as plain values.
        foreground: ``[D + 1]``, see `is_foreground`; None where all patches count.
    """

    centres: Tensor
    radius: float
    num_patches: int
    origin: MemoryOrigin
    thresholds: Mapping[str, Any]
    foreground: Tensor | None = None

    @classmethod
    def fit(
        cls,
        patches: Tensor,
        origin: MemoryOrigin,
        *,
        share: float = 0.1,
        max_centres: int = 10_000,
        projection: int | None = None,
        seed: int = 0,
        foreground: Tensor | None = None,
    ) -> Self:
        """Chooses centres among the patches of good parts.

        Args:
            patches: ``[N, D]``, finite, of unit length.
            origin: what they come from.
            share: of the patches that become centres, in (0, 1].
            max_centres: limits them.
            projection: see `greedy_coreset`.
            seed: of the projection.
            foreground: which of them count, see `find_foreground`.

        Raises:
            ValueError: see `choose_centres`.
        """
        if foreground is not None:
            foreground = foreground.to(patches)
            patches = patches[is_foreground(patches, foreground)]
        centres, radius = choose_centres(
            patches, share=share, max_centres=max_centres, projection=projection, seed=seed
        )
        return cls(
            centres=centres,
            radius=radius,
            num_patches=len(patches),
            origin=origin,
            thresholds={},
            foreground=foreground,
        )

    def add(self, patches: Tensor) -> Self:
        """The memory with the patches ``[N, D]`` of further good parts.

        Patches within the radius of a centre are known already; of the others greedy ones become centres. Thresholds
        are left out, for they came from the former scores.
        """
        if self.foreground is not None:
            patches = patches[is_foreground(patches, self.foreground.to(patches))]
        return replace(
            self,
            centres=add_centres(self.centres, self.radius, patches),
            num_patches=self.num_patches + len(patches),
            thresholds={},
        )

    def score(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Scores patches ``[B, N, D]`` by their distance to the nearest centre, images as `image_scores` does.

        Background scores 0.

        Returns:
            ``[B, N]`` and ``[B]`` on the CPU.
        """
        distances, nearest = _distances(patches.flatten(0, 1), self.centres, 1)
        scores, nearest = distances.view(patches.shape[:2]), nearest.view(patches.shape[:2])
        patches = patches.cpu().float()
        if self.foreground is not None:
            scores = scores * is_foreground(patches, self.foreground.cpu())
        return scores, image_scores(patches, scores, nearest, self.centres.cpu(), self._neighbours)

    @cached_property
    def _neighbours(self) -> Tensor:
        """See `neighbours_of`; on the CPU."""
        return neighbours_of(self.centres).cpu()

    def operating_point(self, level: str) -> OperatingPoint | None:
        """The stored threshold of images or parts; None where there is none."""
        values = self.thresholds.get(level)
        return OperatingPoint.from_dict(values) if values else None

    def save(self, path: str | Path) -> None:
        """Writes the memory as safetensors, its origin and thresholds (key ``thresholds``) as JSON in the metadata.

        Raises:
            OSError: it cannot be written.
        """
        metadata = {
            "format": FORMAT,
            "version": str(VERSION),
            "origin": json.dumps(asdict(self.origin)),
            "radius": repr(self.radius),
            "num_patches": str(self.num_patches),
            "thresholds": json.dumps(dict(self.thresholds), allow_nan=False),
        }
        tensors = {"centres": self.centres, **({} if self.foreground is None else {"foreground": self.foreground})}
        content = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, metadata)
        write_atomically(path, lambda file: file.write(content))

    @classmethod
    def load(cls, path: str | Path, origin: MemoryOrigin | None = None, device: torch.device | str = "cpu") -> Self:
        """Reads a memory.

        Args:
            path: of the file.
            origin: what shall be scored with it; None does not compare.
            device: where distances are computed.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no memory, is damaged, or was made with another backbone, image size, blocks or light.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no memory of good parts at {path}")
        try:
            with safe_open(str(path), "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT or metadata.get("version") != str(VERSION):
                    raise ValueError(f"its format is {metadata.get('format')!r}, version {metadata.get('version')!r}")
                centres = file.get_tensor("centres").to(device)
                foreground = file.get_tensor("foreground").to(device) if "foreground" in set(file.keys()) else None
            values = json.loads(metadata["origin"])
            lists: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
            }
            stored = MemoryOrigin(**lists)
            memory = cls(
                centres=centres,
                radius=float(metadata["radius"]),
                num_patches=int(metadata["num_patches"]),
                origin=stored,
                thresholds=json.loads(metadata["thresholds"]),
                foreground=foreground,
            )
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no memory of good parts ({FORMAT}, version {VERSION}): {error}") from error
        if origin is not None:
            stored.check(origin, path)
        return memory


@dataclass(frozen=True, kw_only=True, eq=False)
class PatchGaussian:
    """Mean and covariance of the statistics of good patches.

    Attributes:
        mean: ``[D]`` float64.
        whitening: ``[D, D]``: the Mahalanobis distance is the length of a whitened row.
    """

    mean: Tensor
    whitening: Tensor

    @classmethod
    def fit(cls, patches: Tensor) -> Self:
        """Estimates both from rows ``[N, D]``; directions in which rows do not differ count little, not infinitely."""
        rows = patches.double().cpu()
        mean = rows.mean(dim=0)
        covariance = (rows - mean).T @ (rows - mean) / max(len(rows) - 1, 1)
        spread = covariance.diagonal().mean().clamp_min(1e-12)
        covariance += 1e-6 * spread * torch.eye(len(mean), dtype=torch.float64)
        return cls(mean=mean, whitening=torch.linalg.inv(torch.linalg.cholesky(covariance)).T)

    def score(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Scores patches ``[B, N, D]`` by their Mahalanobis distance ``[B, N]``, images by their farthest ``[B]``."""
        scores = ((patches.double().cpu() - self.mean) @ self.whitening).norm(dim=2).float()
        return scores, scores.amax(dim=1)


def _distances(queries: Tensor, centres: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Distances ``[M, k]`` of rows of unit length to their nearest centres, from small to large, and which they are."""
    similarities, rows = nearest_neighbours(queries, centres, count, device=centres.device)
    return distance_of(similarities), rows


def _check_finite(patches: Tensor) -> None:
    for rows in patches.split(2**16):
        if not rows.isfinite().all():
            raise ValueError(
                "features of good parts are NaN or infinite: the backbone's weights are damaged, or images are not "
                "finite after preprocessing"
            )


def _short(value: object) -> str:
    return value[:12] if isinstance(value, str) else str(value)
