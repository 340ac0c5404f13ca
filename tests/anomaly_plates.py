"""Drawn plates, some with a white square, for tests of what learns from good parts alone."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (48, 64)  # height and width
SQUARE = (slice(12, 28), slice(20, 40))  # rows and columns


def draw_plates(root: Path, parts: Mapping[str, tuple[int, int]]) -> Path:
    """Grey, noisy plates of two images each, and masks; by split, how many, and the first of them that are defective.

    The second image of a defective one shows the square.
    """
    generator = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    for split, (count, bad) in parts.items():
        (root / split).mkdir()
        rows = []
        for number in range(2 * count):
            part, view = divmod(number, 2)
            pixels = generator.integers(90, 110, SIZE).astype(np.uint8)
            row = {"img_path": f"{split}/{number}.png", "gt_label": 0, "group_id": f"{split} {part}"}
            if part < bad and view:
                mask = np.zeros_like(pixels)
                pixels[SQUARE], mask[SQUARE] = 250, 255
                Image.fromarray(mask).save(root / split / f"{number}-mask.png")
                row |= {"gt_label": 1, "mask_path": f"{split}/{number}-mask.png"}
            Image.fromarray(pixels).save(root / row["img_path"])
            rows.append(row)
        table = {"metainfo": {"classes": ["good", "defect"]}, "data_list": rows}
        (root / "annotations" / f"{split}.json").write_text(json.dumps(table))
    return root
