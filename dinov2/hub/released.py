"""What was released: the four architectures, where their files lie, and fetching one."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

RELEASED_WEIGHTS = "https://dl.fbaipublicfiles.com/dinov2"
NUM_REGISTERS = 4


@dataclass(frozen=True, kw_only=True)
class ReleasedArchitecture:
    """Facts about a released backbone that its heads depend on.

    Attributes:
        embed_dim: width of the tokens.
        num_blocks: blocks.
        spread_blocks: the four blocks that the released 4-block linear and DPT depth heads see: ``out_index`` of
            upstream's hub/depthers.py and ``OUT_INDICES`` of its depth_estimation notebook.
    """

    embed_dim: int
    num_blocks: int
    spread_blocks: tuple[int, int, int, int]

    def last_blocks(self, count: int) -> tuple[int, ...]:
        """Numbers of the last ``count`` blocks."""
        return tuple(range(self.num_blocks - count, self.num_blocks))


ARCHITECTURES: Mapping[str, ReleasedArchitecture] = MappingProxyType(
    {
        "vits14": ReleasedArchitecture(embed_dim=384, num_blocks=12, spread_blocks=(2, 5, 8, 11)),
        "vitb14": ReleasedArchitecture(embed_dim=768, num_blocks=12, spread_blocks=(2, 5, 8, 11)),
        "vitl14": ReleasedArchitecture(embed_dim=1024, num_blocks=24, spread_blocks=(4, 11, 17, 23)),
        "vitg14": ReleasedArchitecture(embed_dim=1536, num_blocks=40, spread_blocks=(9, 19, 29, 39)),
    }
)


def released_architecture(name: str) -> ReleasedArchitecture:
    """Facts about a released backbone.

    Raises:
        ValueError: for a name that is not among those of `ARCHITECTURES`.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"unknown backbone {name!r}; allowed: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def released_address(name: str, what: str, *, registers: bool = False) -> str:
    """Address of a released file, such as that of ``what="linear_head"`` for ``name="vits14"``."""
    suffix = f"_reg{NUM_REGISTERS}" if registers else ""
    return f"{RELEASED_WEIGHTS}/dinov2_{name}/dinov2_{name}{suffix}_{what}.pth"


def local_file(source: str | Path) -> Path:
    """The file itself, or that of a URL, downloaded once into torch's hub folder.

    Raises:
        urllib.error.URLError: when the download fails.
    """
    address = str(source)
    if "://" not in address:
        return Path(source)
    path = Path(torch.hub.get_dir()) / "checkpoints" / address.rpartition("/")[2]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(address, str(path))
    return path
