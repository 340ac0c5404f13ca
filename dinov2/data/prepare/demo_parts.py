"""A small drawn set for trying every task without any data: plates with labels, masks, boxes and height maps."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from dinov2.data.datasets.splits import DEFAULT_FRACTIONS, Split, split_groups
from dinov2.data.prepare.grouped_json_writer import GroupedItem, write_grouped_set
from dinov2.data.prepare.part_drawing import DEFECT_TYPES, Part, draw_part, take_photo
from dinov2.utils.seeds import derive_seed

_TOOL = "make_demo_parts"
_CLASSES = ("good", "defective")


def make_demo_parts(output: str | Path, parts: int = 60, photos: int = 4, seed: int = 0, image_size: int = 256) -> None:
    """Draws a grouped set of metal plates, each photographed several times under changing light.

    Every third part is defective. Each row holds ``gt_label``, ``group_id``, ``defect_type``, ``boxes``
    (``[x0, y0, x1, y1]`` in pixels, the end excluded) with ``box_labels`` (positions in ``metainfo.box_classes``),
    ``height_path`` (16-bit PNG, micrometres above the table) and, where there is a defect, ``mask_path`` (PNG, 0 and
    255). The same arguments draw the same set.

    Args:
        output: new or empty folder.
        parts: number of plates, at least 6.
        photos: photos of each plate, at least 1.
        seed: draws everything.
        image_size: side of a photo in pixels, at least 32.

    Raises:
        ValueError: for numbers out of range, or an ``output`` that holds anything else.
    """
    for name, value, least in (("parts", parts, 6), ("photos", photos, 1), ("image_size", image_size, 32)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    write_grouped_set(
        output,
        _items(parts, photos, seed, image_size),
        metainfo={
            "classes": list(_CLASSES),
            "defect_types": ["free", *DEFECT_TYPES],
            "box_classes": list(DEFECT_TYPES),
        },
        tool=_TOOL,
        settings={"parts": parts, "photos": photos, "seed": seed, "image_size": image_size},
    )


def _items(parts: int, photos: int, seed: int, image_size: int) -> Iterator[tuple[Split, GroupedItem]]:
    names = [f"part_{number:04d}" for number in range(parts)]
    kinds = [DEFECT_TYPES[number // 3 % len(DEFECT_TYPES)] if number % 3 == 2 else "free" for number in range(parts)]
    strata = ["free" if kind == "free" else "defective" for kind in kinds]
    splits = [list(Split)[number] for number in split_groups(names, strata, DEFAULT_FRACTIONS, seed).tolist()]
    for name, kind, split in sorted(zip(names, kinds, splits, strict=True)):
        part = draw_part(image_size, kind, _generator(seed, "product"), _generator(seed, name))
        for number in range(photos):
            yield split, _item(part, name, number, split, image_size, _generator(seed, name, number))


def _item(part: Part, name: str, number: int, split: Split, image_size: int, rng: np.random.Generator) -> GroupedItem:
    photo = take_photo(part, image_size, rng)
    stem = f"{split}/{name}/{name}-{number}"
    kind = part.defect_type if photo.boxes else "free"
    row = {
        "img_path": f"{stem}.jpeg",
        "gt_label": int(bool(photo.boxes)),
        "group_id": name,
        "defect_type": kind,
        "boxes": [list(box) for box in photo.boxes],
        "box_labels": [DEFECT_TYPES.index(kind) for _ in photo.boxes],
        "height_path": f"heights/{stem}.png",
    }
    files: dict[str, Path | bytes] = {
        f"{stem}.jpeg": _encode(photo.image, "JPEG"),
        f"heights/{stem}.png": _encode(photo.height, "PNG"),
    }
    if photo.boxes:
        row["mask_path"] = f"masks/{stem}.png"
        files[f"masks/{stem}.png"] = _encode(photo.mask, "PNG")
    return GroupedItem(row, files)


def _encode(pixels: npt.NDArray[np.uint8] | npt.NDArray[np.uint16], kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, quality=92)
    return buffer.getvalue()


def _generator(seed: int, *parts: int | str) -> np.random.Generator:
    return np.random.default_rng(derive_seed(seed, "demo parts", *parts))
