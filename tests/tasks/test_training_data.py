"""What a supervised run draws and how it weighs classes: sets without labels of images, and rare classes of pixels."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.data.class_balance import class_weights
from dinov2.tasks import load_task_config, segmentation
from dinov2.tasks.options import TaskConfig
from dinov2.tasks.training_data import TrainingData, open_task_sets

NAMES = ("background", "scratch", "dent")


def write_set(root: Path, masks: list[list[int]]) -> None:
    """Images with a mask each, made of the given values."""
    for kind in ("images", "masks"):
        (root / kind / "train").mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(NAMES))
    for number, values in enumerate(masks):
        mask = np.resize(np.array(values, dtype=np.uint8), (8, 8))
        Image.fromarray(mask).save(root / "masks" / "train" / f"{number:02d}.png")
        Image.new("RGB", (8, 8), (number, 0, 0)).save(root / "images" / "train" / f"{number:02d}.png")


def config_of(root: Path, *pairs: str) -> TaskConfig:
    return load_task_config(
        None,
        [
            "task=segmentation",
            f"data.train_dataset_path=ImageMaskFolder:split=train:root={root}",
            "data.image_size=8",
            "data.num_workers=0",
            "train.batch_size_per_gpu=1",
            *pairs,
        ],
    )


def open_data(config: TaskConfig) -> TrainingData:
    sets = open_task_sets(config)
    return TrainingData(config.task_class(config, sets.facts), sets.train)


def test_without_labels_of_images_those_of_their_masks_are_balanced(tmp_path: Path) -> None:
    # Eight good images, three scratched, one dented: each kind should come as often as the others.
    write_set(tmp_path, [[0]] * 8 + [[0, 1], [1], [255, 1]] + [[0, 0, 2]])
    data = open_data(config_of(tmp_path, "data.balance_classes=true"))
    batches = itertools.islice(data.batches(), 10 * len(data))
    kinds = ["good"] * 8 + ["scratched"] * 3 + ["dented"]
    drawn = Counter(kinds[int(torch.as_tensor(batch["index"]))] for batch in batches)
    assert drawn == {kind: pytest.approx(40, abs=5) for kind in kinds}


def test_sets_whose_values_mean_different_things_and_images_in_both_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_set(tmp_path, [[0, 1, 2], [0, 1]])
    (tmp_path / "classes.txt").write_text("\n".join(NAMES))
    same = f"data.val_dataset_path=ImageMaskFolder:split=train:root={tmp_path}"
    open_task_sets(config_of(tmp_path, same))
    assert "all 2 images of val that were looked at are in train too" in caplog.text
    assert "mask_values differ" not in caplog.text
    open_task_sets(config_of(tmp_path, f"{same}:mask_values=0,2,1"))
    assert "mask_values differ: train has none, val has 0,2,1" in caplog.text


def test_what_has_no_classes_cannot_be_balanced(tmp_path: Path) -> None:
    config = load_task_config(
        None,
        ["task=depth", f"data.train_dataset_path=NYUDepthV2:split=TRAIN:root={tmp_path}", "data.balance_classes=true"],
    )
    (tmp_path / "a").mkdir()
    (tmp_path / "nyu_train.txt").write_text("a/rgb.png a/depth.png 500\n")
    Image.new("RGB", (28, 28)).save(tmp_path / "a" / "rgb.png")
    Image.fromarray(np.full((28, 28), 2000, dtype=np.uint16)).save(tmp_path / "a" / "depth.png")
    data = open_data(config)
    with pytest.raises(ValueError, match=r"data.balance_classes: no image of NYUDepthV2.* has a class"):
        data.batches()


def test_a_rare_class_is_found_behind_the_masks_that_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segmentation, "_MASKS_COUNTED", 3)
    write_set(tmp_path, [[0], [0, 1], [2], [0], [1], [0], [0], [0]])  # the first, the fourth and the last are counted
    data = open_data(config_of(tmp_path, "loss.class_weights=inverse"))
    counts = data.task.count_classes(data.images, range(8), ())
    assert counts == [3 * 64 + 32, 32, 64]  # and on to the third, where every class has been seen
    assert data.class_weights() == pytest.approx(class_weights(np.array(counts), "inverse"))


def test_mixtures_and_image_sizes_are_those_of_an_uninterrupted_run(tmp_path: Path) -> None:
    write_set(tmp_path, [[0, 1], [0, 2], [0], [1, 2, 0]])
    config = config_of(
        tmp_path,
        *("augmentation.mosaic=1", "augmentation.copy_paste=0.5", "augmentation.multi_scale=[0.5,2]"),
        *("train.batch_size_per_gpu=2", "optim.epochs=5"),
    )
    batches = list(itertools.islice(open_data(config).batches(), 10))
    assert len({batch["image"].shape[-1] for batch in batches}) > 3
    resumed = list(itertools.islice(open_data(config).batches(samples_seen=8), 6))
    for before, after in zip(batches[4:], resumed, strict=True):
        assert all(torch.equal(before[key], after[key]) for key in ("image", "mask"))


def test_the_last_tenth_of_a_run_is_without_mosaics(tmp_path: Path) -> None:
    write_set(tmp_path, [[0, 1], [0, 2], [0], [1, 2, 0], [1], [2]])
    pairs = ("augmentation.mosaic=1", "augmentation.brightness=0", "augmentation.contrast=0", "optim.epochs=5")
    batches = itertools.islice(open_data(config_of(tmp_path, *pairs)).batches(), 30)  # of one image of one colour each
    mixed = [len(batch["image"][0, 0].unique()) > 1 for batch in batches]
    assert sum(mixed) > 22
    assert not any(mixed[-3:])
