"""A small grouped set on disk, and the options of a backbone that fits it, for tests of evaluators' commands."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

TINY = (
    "student.arch=vit_tiny",
    "student.patch_size=14",
    "crops.global_crops_size=28",
    "crops.local_crops_size=14",
    "train.device=cpu",
)


def make_parts(root: Path) -> Path:
    """Two photos of each of eight parts; defective parts are red, good ones blue, in training and validation."""
    (root / "annotations").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        (root / split).mkdir()
        rows = []
        for photo in range(16):
            part, label = photo // 2, photo // 2 % 2
            pixels = generator.integers(0, 60, (40, 50, 3), dtype=np.uint8)
            pixels[..., 0 if label else 2] += 180
            name = f"{split}/{photo}.png"
            Image.fromarray(pixels).save(root / name)
            rows.append({"img_path": name, "gt_label": label, "group_id": f"{split} {part}"})
        content = {"metainfo": {"classes": ["good", "defect"]}, "data_list": rows}
        (root / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return root


def dataset_strings(root: Path) -> tuple[str, str]:
    """Of the training and the validation set."""
    escaped = str(root).replace(":", "\\:")
    return f"GroupedJSON:split=TRAIN:root={escaped}", f"GroupedJSON:split=VAL:root={escaped}"
