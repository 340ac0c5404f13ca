"""Counts images that could not be read, and stops a run that loses too many of them."""

from collections.abc import Iterable
from typing import Any

from dinov2.utils.errors import RunError

_PATHS_SHOWN = 5


class TooManyUnreadableImages(RunError):
    """More of the dataset's images are missing or corrupt than the run allows."""


class UnreadableTally:
    """Counts distinct unreadable images; the process that trains feeds it the names that every batch carries.

    Args:
        dataset_size: Number of images in the dataset, at least 1.
        max_fraction: Largest tolerated share of unreadable images, 0..1.
    """

    def __init__(self, dataset_size: int, max_fraction: float) -> None:
        if dataset_size < 1:
            raise ValueError(f"dataset_size must be at least 1, got {dataset_size}")
        if not 0 <= max_fraction <= 1:
            raise ValueError(f"max_fraction must lie in 0..1, got {max_fraction}")
        self.dataset_size = dataset_size
        self.max_fraction = max_fraction
        self._names: set[str] = set()

    @property
    def count(self) -> int:
        """Number of distinct unreadable images so far."""
        return len(self._names)

    def add(self, names: Iterable[str]) -> None:
        """Adds the unreadable images of one batch; a name counts once however often it comes."""
        self._names.update(names)

    @property
    def exceeded(self) -> bool:
        """Whether more images cannot be read than are tolerated."""
        return self.count > self.max_fraction * self.dataset_size

    def check(self) -> None:
        """Stops a run that has lost too many images.

        Raises:
            TooManyUnreadableImages: The tolerated share is exceeded.
        """
        if self.exceeded:
            shown = ", ".join(sorted(self._names)[:_PATHS_SHOWN])
            more = f" and {self.count - _PATHS_SHOWN} more" if self.count > _PATHS_SHOWN else ""
            raise TooManyUnreadableImages(
                f"{self.count} of {self.dataset_size} images cannot be read, more than data.max_bad_fraction "
                f"({self.max_fraction:.2%}) tolerates: {shown}{more}"
            )

    def summary(self) -> str:
        """One line for the log."""
        return f"{self.count} of {self.dataset_size} images unreadable ({self.count / self.dataset_size:.2%})"

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the names, sorted."""
        return {"names": sorted(self._names)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the names of a checkpoint."""
        self._names = set(state["names"])
