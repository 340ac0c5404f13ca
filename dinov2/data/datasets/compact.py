"""A list of strings in two arrays: small, and shared by worker processes instead of copied."""

from collections.abc import Iterator, Sequence
from typing import Self, overload

import numpy as np
import numpy.typing as npt


class CompactStrings(Sequence[str]):
    """An immutable sequence of strings.

    A Python list of a million paths costs about 120 bytes per path, and forked workers copy it page by page because
    reading a string changes its reference count. Here the characters lie in one buffer, which workers share.

    Attributes:
        bytes: the UTF-8 of all strings, one after another, uint8 ``[M]``.
        ends: 0 and then the end of each string in ``bytes``, int64 ``[N + 1]``.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        """Copies the strings."""
        encoded = [string.encode("utf-8", "surrogatepass") for string in strings]
        self.bytes: npt.NDArray[np.uint8] = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        self.ends: npt.NDArray[np.int64] = np.concatenate([np.zeros(1, np.int64), lengths.cumsum()])

    @classmethod
    def from_arrays(cls, data: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64]) -> Self:
        """Takes the two arrays of another instance.

        Raises:
            ValueError: when they do not belong together.
        """
        if data.dtype != np.uint8 or ends.dtype != np.int64 or data.ndim != 1 or ends.ndim != 1 or not len(ends):
            raise ValueError(f"not the arrays of strings: {data.dtype} {data.shape} and {ends.dtype} {ends.shape}")
        if ends[0] != 0 or ends[-1] != len(data) or (np.diff(ends) < 0).any():
            raise ValueError("the ends of the strings do not fit their bytes")
        strings = cls(())
        strings.bytes, strings.ends = data, ends
        return strings

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._get(position) for position in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} strings")
        return self._get(position)

    def __iter__(self) -> Iterator[str]:
        return (self._get(position) for position in range(len(self)))

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        return int(self.bytes.nbytes + self.ends.nbytes)

    def _get(self, position: int) -> str:
        start, end = self.ends[position], self.ends[position + 1]
        return self.bytes[start:end].tobytes().decode("utf-8", "surrogatepass")
