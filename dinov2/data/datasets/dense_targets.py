"""Datasets that know something about every pixel: its class, or its depth."""

from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import numpy.typing as npt

IGNORED = 255  # value of pixels without a class, in every mask that this library hands out


class BadTargetError(ValueError):
    """A mask or depth map that cannot be used: unreadable, of another size than its image, or with wrong values.

    Attributes:
        path: the file, as it was named.
        reason: what is wrong with it.
    """

    def __init__(self, path: str | Path, reason: str) -> None:
        """Names the file and the reason."""
        super().__init__(f"{path}: {reason}")
        self.path = str(path)
        self.reason = reason

    def __reduce__(self) -> tuple[type["BadTargetError"], tuple[str, str]]:
        """Lets the error travel from a worker process."""
        return type(self), (self.path, self.reason)


class MaskSource(ABC):
    """A dataset that knows the class of every pixel.

    Attributes:
        mask_classes: names of the classes by value; where there is a background, it is value 0.
    """

    mask_classes: tuple[str, ...]

    @abstractmethod
    def get_mask(self, index: int) -> npt.NDArray[np.uint8]:
        """Class of every pixel ``[H, W]``: below ``len(mask_classes)``, or `IGNORED`; of the size of the image.

        Raises:
            BadTargetError: when the file is missing, damaged, of another size, or holds other values.
        """


class DepthSource(ABC):
    """A dataset that knows the depth, or the height, at every pixel.

    Attributes:
        depth_unit: unit of the values, such as ``m`` or ``um``.
    """

    depth_unit: str

    @abstractmethod
    def get_depth(self, index: int) -> npt.NDArray[np.float32]:
        """Depth of every pixel ``[H, W]``, NaN where nothing was measured; of the size of the image.

        Raises:
            BadTargetError: when the file is missing, damaged, of another size, or holds other values.
        """
