"""Where weights come from: a file, an address, or the name of a released backbone.

Reference: Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision"; Darcet et al., "Vision
Transformers Need Registers".
"""

import logging
import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch

from dinov2.utils.files import file_digest

logger = logging.getLogger("dinov2")

RELEASED_WEIGHTS = "https://dl.fbaipublicfiles.com/dinov2"
_PREFIX = re.compile(r"(?P<source>.+):prefix=(?P<prefix>[\w.]*)", re.DOTALL)
# What a folder of Hugging Face's holds, the first of these that is there.
_IN_FOLDERS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# As in names of torch's model zoo, "resnet50-0676ba61.pth"; digits alone are more likely a date.
_HASH_IN_NAME = re.compile(r"-(?=\d*[a-f])([0-9a-f]{8,64})\.\w+$")


@dataclass(frozen=True)
class ReleasedBackbone:
    """A released backbone: its architecture, its files, and what its released heads depend on.

    Attributes:
        size: such as ``vits14``, as the released files say.
        arch: name among `dinov2.models.build.ARCHITECTURES`.
        embed_dim: width of the tokens.
        num_blocks: blocks.
        spread_blocks: the four blocks that the released 4-block linear and DPT depth heads see: ``out_index`` of
            upstream's hub/depthers.py and ``OUT_INDICES`` of its depth_estimation notebook.
        num_registers: register tokens, 0 or 4.
        sha256: first digits of the SHA-256 of the file of weights, which is then checked; empty where it is not known:
            none was published with these files.
    """

    size: str
    arch: str
    embed_dim: int
    num_blocks: int
    spread_blocks: tuple[int, int, int, int]
    num_registers: int = 0
    sha256: str = ""

    @property
    def name(self) -> str:
        """Such as ``dinov2_vits14_reg``."""
        return f"dinov2_{self.size}{'_reg' if self.num_registers else ''}"

    @property
    def student(self) -> dict[str, Any]:
        """Options of the section ``student`` that describe it, as in ``configs/eval``."""
        options = {"arch": self.arch, "patch_size": 14, "num_register_tokens": self.num_registers}
        if self.arch == "vit_giant2":
            options["ffn_layer"] = "swiglufused"
        if self.num_registers:  # trained with another way of resizing position embeddings
            options |= {"interpolate_antialias": True, "interpolate_offset": 0.0}
        return options

    def last_blocks(self, count: int) -> tuple[int, ...]:
        """Numbers of the last ``count`` blocks."""
        return tuple(range(self.num_blocks - count, self.num_blocks))

    def address(self, what: str = "pretrain") -> str:
        """Address of a released file: the backbone's, or that of a head such as ``linear_head``."""
        registers = f"_reg{self.num_registers}" if self.num_registers else ""
        return f"{RELEASED_WEIGHTS}/dinov2_{self.size}/dinov2_{self.size}{registers}_{what}.pth"


_BACKBONES = (
    ReleasedBackbone("vits14", "vit_small", 384, 12, (2, 5, 8, 11)),
    ReleasedBackbone("vits14", "vit_small", 384, 12, (2, 5, 8, 11), num_registers=4),
    ReleasedBackbone("vitb14", "vit_base", 768, 12, (2, 5, 8, 11)),
    ReleasedBackbone("vitb14", "vit_base", 768, 12, (2, 5, 8, 11), num_registers=4),
    ReleasedBackbone("vitl14", "vit_large", 1024, 24, (4, 11, 17, 23)),
    ReleasedBackbone("vitl14", "vit_large", 1024, 24, (4, 11, 17, 23), num_registers=4),
    ReleasedBackbone("vitg14", "vit_giant2", 1536, 40, (9, 19, 29, 39)),
    ReleasedBackbone("vitg14", "vit_giant2", 1536, 40, (9, 19, 29, 39), num_registers=4),
)
RELEASED_BACKBONES: Mapping[str, ReleasedBackbone] = MappingProxyType({entry.name: entry for entry in _BACKBONES})


def released_backbone(name: str) -> ReleasedBackbone:
    """Facts about a released backbone.

    Raises:
        ValueError: for a name that is not among those of `RELEASED_BACKBONES`.
    """
    if name not in RELEASED_BACKBONES:
        raise ValueError(f"unknown backbone {name!r}; allowed: {', '.join(RELEASED_BACKBONES)}")
    return RELEASED_BACKBONES[name]


def split_prefix(source: str | Path) -> tuple[str | Path, str | None]:
    """Takes ``:prefix=NAME`` off the end of a source of weights; None where there is no such end."""
    match = None if isinstance(source, Path) else _PREFIX.fullmatch(source)
    return (source, None) if match is None else (match["source"], match["prefix"])


def fetch_weights(source: str | Path) -> Path:
    """The local file of weights; what is not on this machine is downloaded once.

    Args:
        source: a file, or a folder as Hugging Face's ``save_pretrained`` writes it; an address such as
            ``https://…/weights.pth``; or a name of `RELEASED_BACKBONES`, unless a file is called so. ``~`` is the
            user's folder, and ``:prefix=NAME`` at its end is left to `load_pretrained_backbone`. Downloads are kept
            below ``checkpoints`` in torch's hub folder, where a released file that torch.hub has put there is found
            too. Where the SHA-256 is known, from the table of released backbones or from an address as
            ``weights-0676ba61.pth``, it is checked.

    Returns:
        The file; a path is given back as it is, also when there is nothing.

    Raises:
        ConnectionError: when the download fails; the message names the address and the folder.
        FileNotFoundError: for what looks like the name of a released backbone and is none.
        ValueError: when the file has another SHA-256 or is a web page or picture, and is deleted then; or for an
            address of an unknown kind.
    """
    source = split_prefix(source)[0]
    address, sha256 = str(source), ""
    local = Path(source).expanduser() if address.startswith("~") else Path(source)
    if isinstance(source, Path) or os.path.exists(local):  # Path.is_file fails for long addresses
        return next((local / name for name in _IN_FOLDERS if (local / name).is_file()), local)
    if released := RELEASED_BACKBONES.get(address):
        address, sha256 = released.address(), released.sha256
    elif re.fullmatch(r"dinov2_\w+", address):
        raise FileNotFoundError(
            f"{address} is no file and no released backbone; those are {', '.join(RELEASED_BACKBONES)}"
        )
    if address.startswith("file://"):
        return Path(url2pathname(urlsplit(address).path))
    if not address.startswith(("https://", "http://", "ftp://")):
        if "://" in address:
            raise ValueError(f"{address}: addresses of weights begin with https://, http://, ftp:// or file://")
        return local

    path = _download(address)
    if kind := file_kind(path):
        path.unlink()
        raise ValueError(f"{address} gave no weights, but {kind}; {path} was deleted")
    if match := _HASH_IN_NAME.search(urlsplit(address).path):
        sha256 = sha256 or match[1]
    if sha256 and not (digest := file_digest(path)).startswith(sha256):
        path.unlink()
        raise ValueError(
            f"{address} should have a SHA-256 that begins with {sha256}, but what came has {digest}: it is damaged or "
            f"another file, and {path} was deleted; fetch it again, or give a file"
        )
    return path


def _download(address: str) -> Path:
    from iopath.common.file_io import HTTPURLHandler, PathManager

    folder, parts = Path(torch.hub.get_dir()) / "checkpoints", urlsplit(address)
    from_torch_hub = folder / Path(parts.path).name
    if address.startswith(RELEASED_WEIGHTS) and from_torch_hub.is_file():
        return from_torch_hub
    manager = PathManager()
    manager.register_handler(HTTPURLHandler())
    # Files of two hosts may have one path; a colon before a port is no name of a folder everywhere.
    cache = folder / parts.netloc.replace(":", "_")
    logger.info("looking for %s in %s, or downloading it", address, cache)
    try:
        return Path(manager.get_local_path(address, cache_dir=str(cache)))
    except (OSError, HTTPException) as error:
        by_name = f", or put it at {from_torch_hub}" if address.startswith(RELEASED_WEIGHTS) else ""
        raise ConnectionError(
            f"{address} could not be downloaded into {cache} ({error}). Without a network, fetch the weights "
            f"{from_torch_hub.name} from that address on another machine, copy them to this one and give its path: "
            f"student.pretrained_weights=FILE, backbone.pretrained_weights=FILE, --pretrained-weights FILE, "
            f"dinov2.load(FILE), or weights=FILE in dinov2.hub{by_name}"
        ) from error


_KINDS = (
    (b"version https://git-lfs", "a Git LFS pointer in place of the file: git lfs pull fetches it"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF8", "a GIF picture"),
    (b"II*\x00", "a TIFF picture"),
    (b"MM\x00*", "a TIFF picture"),
    (b"BM", "a BMP picture"),
    (b"%PDF", "a PDF document"),
    (b"\x1f\x8b", "packed by gzip: unpack it first"),
    (b"7z\xbc\xaf", "packed by 7-Zip: unpack it first"),
    (b"\x89HDF", "an HDF5 file, as Keras writes it"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"GGUF", "a GGUF file of quantised weights"),
)


def file_kind(path: Path) -> str:
    """What a file is, in a few words, where its first bytes show that it is no file of weights; empty otherwise."""
    with path.open("rb") as file:
        start = file.read(512)
    if start[8:9] == b"{":  # safetensors, whose length comes first and may begin with any of these
        return ""
    for mark, kind in _KINDS:
        if start.startswith(mark):
            return kind
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        return "a web page, such as that of a login or an error: download the file again, signed in, by its own address"
    if start.startswith(b"PK\x03\x04"):
        if not zipfile.is_zipfile(path):
            return "truncated: its end is missing"
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if not any(name.endswith(("data.pkl", ".data/version")) for name in names):
            return f"a zip archive that torch.save did not write ({', '.join(names[:3]) or 'empty'}): unpack it first"
    return "" if start else "empty"
