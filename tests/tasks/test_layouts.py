"""Every layout on disk goes through the whole of a supervised run: training, evaluation, results."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fine_tune_stand_ins import BACKBONE, finetune, make_small
from PIL import Image

RNG = np.random.default_rng(0)


def image(path: Path, size: tuple[int, int] = (40, 48)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


def plane(path: Path, low: int, high: int, kind: type = np.uint8, size: tuple[int, int] = (40, 48)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(low, high, size).astype(kind)).save(path)


def image_folder(root: Path) -> tuple[str, str]:
    for split, name, number in [(s, n, k) for s in ("train", "val") for n in ("ok", "bad") for k in range(3)]:
        image(root / split / name / f"{number}.png")
    return f"ImageFolder:split=TRAIN:root={root}", f"ImageFolder:split=VAL:root={root}"


def cifar10(root: Path) -> tuple[str, str]:
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        rows = RNG.integers(0, 256, (4, 3073), dtype=np.uint8)
        rows[:, 0] = RNG.permutation(10)[:4]
        (folder / f"{name}.bin").write_bytes(rows.tobytes())
    return f"CIFAR10:split=TRAIN:root={root}", f"CIFAR10:split=TEST:root={root}"


def elpv(root: Path) -> tuple[str, str]:
    lines = []
    for number in range(30):
        image(root / "images" / f"cell{number:04d}.png", (16, 16))
        lines.append(f"images/cell{number:04d}.png  {(number % 4) / 3}   {'mono' if number % 8 < 4 else 'poly'}\n")
    (root / "labels.csv").write_text("".join(lines))
    return f"ELPV:split=TRAIN:root={root}", f"ELPV:split=VAL:root={root}"


def voc(root: Path) -> tuple[str, str]:
    year = root / "VOCdevkit" / "VOC2012"
    for split in ("train", "val"):
        names = [f"2007_{split}{number}" for number in range(4)]
        for name in names:
            image(year / "JPEGImages" / f"{name}.jpg")
            plane(year / "SegmentationClass" / f"{name}.png", 0, 21)
        (year / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
        (year / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names))
    return f"VOCSegmentation:split=TRAIN:root={root}", f"VOCSegmentation:split=VAL:root={root}"


def image_mask_folder(root: Path) -> tuple[str, str]:
    for split, number in [(s, k) for s in ("train", "val") for k in range(4)]:
        image(root / "images" / split / f"{number}.jpg")
        plane(root / "masks" / split / f"{number}.png", 0, 2)
    return f"ImageMaskFolder:split=train:root={root}", f"ImageMaskFolder:split=val:root={root}"


def nyu(root: Path) -> tuple[str, str]:
    for split in ("train", "test"):
        lines = []
        for number in range(4):
            image(root / f"{split}_room" / f"rgb_{number}.jpg")
            plane(root / f"{split}_room" / f"sync_depth_{number}.png", 500, 9000, np.uint16)
            lines.append(f"/{split}_room/rgb_{number}.jpg /{split}_room/sync_depth_{number}.png 518.8579\n")
        (root / f"nyu_{split}.txt").write_text("".join(lines))
    return f"NYUDepthV2:split=TRAIN:root={root}", f"NYUDepthV2:split=TEST:root={root}"


def kitti(root: Path) -> tuple[str, str]:
    for split in ("train", "test"):
        drive, lines = f"2011_09_26_drive_{split}_sync", []
        for number in range(4):
            seen = f"2011_09_26/{drive}/image_02/data/{number:010d}.png"
            measured = f"{drive}/proj_depth/groundtruth/image_02/{number:010d}.png"
            image(root / "input" / seen)
            plane(root / "gt_depth" / measured, 256, 60 * 256, np.uint16)
            lines.append(f"{seen} {measured} 721.5377\n")
        (root / f"kitti_eigen_{split}.txt").write_text("".join(lines))
    return f"KITTIDepth:split=TRAIN:root={root}", f"KITTIDepth:split=TEST:root={root}"


@pytest.mark.parametrize(
    ("make", "task", "pairs", "figure"),
    [
        (image_folder, "classification", ("data.resize=shorter_side",), "image_auroc"),
        (cifar10, "classification", ("head.kind=mlp", "backbone.blocks=[0,1]"), "image_balanced_accuracy"),
        (elpv, "classification", ("head.pooling=cls",), "image_auroc"),
        (voc, "segmentation", ("head.kind=multi_scale", "backbone.blocks=[0,1]", "loss.focal=1"), "mean_iou"),
        (image_mask_folder, "segmentation", ("head.kind=bn_linear", "data.resize=original"), "iou/defect"),
        (
            nyu,
            "depth",
            ("head.kind=linear_bins", "head.min_depth=0.1", "head.max_depth=10", "evaluation.depth_crop=nyu_eigen"),
            "delta1",
        ),
        (
            kitti,
            "depth",
            ("data.image_size=[16,40]", "head.min_depth=0.1", "head.max_depth=80", "evaluation.depth_crop=kitti_garg"),
            "abs_rel",
        ),
    ],
)
def test_every_layout_is_learnt_from_and_evaluated(
    make: Callable[[Path], tuple[str, str]],
    task: str,
    pairs: tuple[str, ...],
    figure: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_small(monkeypatch)
    (tmp_path / "backbone.yaml").write_text(BACKBONE)
    train, val = make(tmp_path / "set")
    sets = (f"data.train_dataset_path={train}", f"data.val_dataset_path={val}")
    assert finetune(tmp_path / "set", tmp_path / "out", "optim.epochs=1", *sets, *pairs, task=task) == 0
    results = json.loads((tmp_path / "out" / "val" / "results.json").read_text())
    assert results["extra"]["figures"][figure] >= 0
