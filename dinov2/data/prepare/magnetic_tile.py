"""Magnetic-tile defects as a grouped set."""

import io
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dinov2.data.datasets.base import DEFAULT_FRACTIONS, Split, check_fractions, split_groups
from dinov2.data.decoding import load_image
from dinov2.data.prepare.grouped_json_writer import GroupedItem, write_grouped_set

logger = logging.getLogger("dinov2")

DEFECT_TYPES = ("free", "blowhole", "break", "crack", "fray", "uneven")

_CLASSES = ("negative", "positive")
_NAME = re.compile(r"exp(\d+)_num_(\d+)\.jpe?g", re.IGNORECASE)


@dataclass(frozen=True)
class _TileImage:
    """One image of a tile; sorts by tile, exposure, defect."""

    tile: int
    exposure: int
    defect: int
    path: Path


def prepare_magnetic_tile(
    source: str | Path,
    output: str | Path,
    seed: int = 0,
    fractions: Sequence[float] = DEFAULT_FRACTIONS,
) -> None:
    """Writes a checkout of the Magnetic-Tile-Defect set as ``output/<split>/<tile>/<tile>-<k>.jpeg`` with annotations.

    The group is the tile, photographed at up to six exposures; images of one tile never lie in two splits. Rows keep
    ``defect_type`` and ``exposure``, and for defective images ``mask_path``, a PNG of 0 and 255. Doing it again changes
    nothing.

    Args:
        source: folder that holds ``MT_Blowhole/Imgs/exp1_num_4727.jpg`` and so on.
        output: new or empty folder.
        seed: draws the splits.
        fractions: shares of train, val and test.

    Raises:
        FileNotFoundError: when ``source`` lacks a folder or a mask.
        ValueError: for a mask of another size than its image, bad fractions, or an ``output`` that holds anything else.

    Reference:
        Huang, Qiu, Yuan, Saliency of magnetic tile surface defects, The Visual Computer 36 (2020).
    """
    fractions = check_fractions(fractions)
    write_grouped_set(
        output,
        _items(Path(source), seed, fractions),
        metainfo={"classes": list(_CLASSES), "defect_types": list(DEFECT_TYPES)},
        tool="prepare_magnetic_tile",
        settings={"seed": seed, "fractions": fractions},
    )


def _find_images(source: Path) -> list[_TileImage]:
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not a folder")
    images = []
    for defect, name in enumerate(DEFECT_TYPES):
        folder = source / f"MT_{name.capitalize()}" / "Imgs"
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is missing; {source} must be a checkout of the Magnetic-Tile-Defect set")
        for path in folder.iterdir():
            match = _NAME.fullmatch(path.name)
            if match:
                images.append(_TileImage(int(match[2]), int(match[1]), defect, path))
            elif path.suffix.lower() in (".jpg", ".jpeg") and not path.name.startswith("."):
                logger.warning("%s is left out: its name is not of the form exp1_num_4727.jpg", path)
    if not images:
        raise ValueError(f"{source} holds no images exp<exposure>_num_<tile>.jpg")
    return sorted(images, key=lambda image: (image.tile, image.exposure, image.defect))


def _items(source: Path, seed: int, fractions: Sequence[float]) -> Iterator[tuple[Split, GroupedItem]]:
    images = _find_images(source)
    tiles, kinds = [str(image.tile) for image in images], [DEFECT_TYPES[image.defect] for image in images]
    position: dict[int, int] = {}
    for image, split_number in zip(images, split_groups(tiles, kinds, fractions, seed).tolist(), strict=True):
        split = list(Split)[split_number]
        number = position[image.tile] = position.get(image.tile, -1) + 1
        stem = f"{split}/{image.tile}/{image.tile}-{number}"
        row: dict[str, str | int] = {
            "img_path": f"{stem}.jpeg",
            "gt_label": int(image.defect > 0),
            "group_id": str(image.tile),
            "defect_type": DEFECT_TYPES[image.defect],
            "exposure": image.exposure,
        }
        files: dict[str, Path | bytes] = {f"{stem}.jpeg": image.path}
        if image.defect > 0:
            row["mask_path"] = f"masks/{stem}.png"
            files[f"masks/{stem}.png"] = _read_mask(image.path)
        yield split, GroupedItem(row, files)


def _read_mask(image_path: Path) -> bytes:
    """The image's mask as a PNG of 0 and 255."""
    path = image_path.with_suffix(".png")
    if not path.is_file():
        raise FileNotFoundError(f"{image_path} has no mask {path.name}")
    mask, image = load_image(path), load_image(image_path)
    if mask.size != image.size:
        raise ValueError(f"mask {path} has {mask.size} pixels, its image has {image.size}")
    binary = np.where(np.asarray(mask.convert("L")) > 127, 255, 0).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(binary).save(buffer, "PNG")
    return buffer.getvalue()
