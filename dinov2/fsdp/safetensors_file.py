"""Writing the safetensors format: a JSON header, then the tensors' bytes one after the other."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO

import torch
from torch import Tensor

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that lies in files.

    Attributes:
        shape: of the whole tensor.
        dtype: number format.
        pieces: returns its rows in order, in one piece or several, mapped from files and not read yet.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Sequence[Tensor]]

    @property
    def nbytes(self) -> int:
        """Size of the whole tensor."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def write(self, file: IO[bytes]) -> None:
        """Writes its bytes in row-major order, from one file into the other."""
        for piece in self.pieces():
            file.write(piece.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def write_safetensors(file: IO[bytes], tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors in turn, from their files into this one.

    Args:
        file: binary file object, written front to back.
        tensors: by name.
        metadata: further texts by name.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    # Wide formats first: every tensor then begins at a multiple of its own item size.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    for name in order:
        tensor = tensors[name]
        end = position + tensor.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        tensors[name].write(file)
