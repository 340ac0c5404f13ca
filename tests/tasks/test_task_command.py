"""The command ``finetune``: bad input gives a clear error, before anything is computed where that can be."""

import json
import math
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from fine_tune_stand_ins import finetune, make_parts, make_small
from PIL import Image

from dinov2.config import load_config
from dinov2.data.datasets.dense_targets import BadTargetError
from dinov2.tasks import engine as fine_tune
from dinov2.tasks import load_task_config
from dinov2.tasks.package import load_backbone_config, load_task_package
from dinov2.utils.errors import RESUME_EXIT_CODE


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_parts(tmp_path_factory.mktemp("set"))


@pytest.fixture
def parts(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    shutil.copytree(original.parent, tmp_path / "set")
    return tmp_path / "set" / "parts"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)


def edit(parts: Path, split: str, change: object) -> None:
    path = parts / "annotations" / f"{split}.json"
    content = json.loads(path.read_text())
    change(content)  # type: ignore[operator]
    path.write_text(json.dumps(content))


def test_a_mask_of_another_size_names_its_file(parts: Path, tmp_path: Path) -> None:
    mask = next((parts / "masks").rglob("train/**/*.png"))
    Image.fromarray(np.zeros((5, 7), dtype=np.uint8)).save(mask)
    with pytest.raises(BadTargetError, match=mask.name):
        finetune(parts, tmp_path / "out", "optim.epochs=3", task="segmentation")


def test_a_mask_of_val_with_an_unknown_value_names_its_file(parts: Path, tmp_path: Path) -> None:
    mask = next((parts / "masks").rglob("val/**/*.png"))
    Image.fromarray(np.full(np.asarray(Image.open(mask)).shape, 7, dtype=np.uint8)).save(mask)
    with pytest.raises(BadTargetError, match=f"{mask.name}.*7"):
        finetune(parts, tmp_path / "out", task="segmentation")


def test_a_label_outside_the_classes_is_found_when_the_set_is_opened(parts: Path, tmp_path: Path) -> None:
    edit(parts, "val", lambda content: content["data_list"][3].update(gt_label=9))
    with pytest.raises(ValueError, match=r"val.json.*data_list\[3\].*9"):
        finetune(parts, tmp_path / "out")


def test_other_classes_in_val_are_an_error(parts: Path, tmp_path: Path) -> None:
    edit(parts, "val", lambda content: content["metainfo"].update(classes=["ok", "bad"]))
    with pytest.raises(ValueError, match=r"disagree.*ok.*good"):
        finetune(parts, tmp_path / "out")


def test_heights_that_nobody_knows_are_an_error(parts: Path, tmp_path: Path) -> None:
    def drop(content: dict[str, list[dict[str, object]]]) -> None:
        for row in content["data_list"]:
            row.pop("height_path")

    edit(parts, "train", drop)
    with pytest.raises(ValueError, match=r"train.json.*height_path"):
        finetune(parts, tmp_path / "out", task="depth")


@pytest.mark.parametrize(("split", "value"), [("train", 0.0), ("val", math.nan)])
def test_depths_that_teach_or_judge_nothing_are_an_error(parts: Path, tmp_path: Path, split: str, value: float) -> None:
    def spoil(content: dict[str, list[dict[str, str]]]) -> None:
        for row in content["data_list"]:
            height, width = np.asarray(Image.open(parts / row["height_path"])).shape
            row["height_path"] = row["height_path"].replace(".png", ".npy")
            np.save(parts / row["height_path"], np.full((height, width), value, dtype=np.float32))

    edit(parts, split, spoil)
    found = "not a single known depth" if math.isnan(value) else "depths of 0 to 0"
    message = rf"split={split.upper()}.*head.min_depth=100 and head.max_depth=3000.*{split}/part.*jpeg, hold {found}"
    with pytest.raises(ValueError, match=message):
        finetune(parts, tmp_path / "out", task="depth")


def test_a_wrong_unit_is_told(parts: Path, tmp_path: Path) -> None:
    metres = ("head.min_depth=0.001", "head.max_depth=10", "optim.epochs=1")  # of micrometres
    assert finetune(parts, tmp_path / "out", *metres, task="depth") == 0
    log = (tmp_path / "out" / "log" / "log.txt").read_text()
    assert re.search(r"split=TRAIN.*only 0.\d+% of the depths \(0 to \d+\) lie between head.min_depth=0.001 and", log)
    assert finetune(parts, tmp_path / "right", "optim.epochs=1", task="depth") == 0
    assert "of the depths" not in (tmp_path / "right" / "log" / "log.txt").read_text()


def test_a_photo_that_cannot_be_read_is_replaced_in_training_and_an_error_in_val(parts: Path, tmp_path: Path) -> None:
    photo = next((parts / "train").rglob("*.jpeg"))
    photo.write_bytes(b"")
    assert finetune(parts, tmp_path / "out", "data.max_bad_fraction=0.5") == 0
    with pytest.raises(RuntimeError, match=r"data.max_bad_fraction"):
        finetune(parts, tmp_path / "strict", "data.max_bad_fraction=0")
    photo = next((parts / "val").rglob("*.jpeg"))
    photo.write_bytes(b"")
    with pytest.raises(OSError, match=photo.name):
        finetune(parts, tmp_path / "val", "data.max_bad_fraction=0.5")


def test_no_training_set_and_no_such_set_are_errors(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.train_dataset_path is empty"):
        finetune(parts, tmp_path / "out", "data.train_dataset_path=")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        finetune(parts, tmp_path / "out", "data.train_dataset_path=GroupedJSON:split=TRAIN:root=nowhere")


def test_a_metric_that_val_does_not_have_is_an_error(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such metric; there are image_accuracy"):
        finetune(parts, tmp_path / "out", "evaluation.metric=mean_iou")


def test_a_task_model_for_another_backbone_is_an_error(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert finetune(parts, tmp_path / "out", "optim.epochs=1") == 0
    monkeypatch.undo()  # now vit_tiny is wider than what was trained
    with pytest.raises(ValueError, match=r"best.pth: the weights do not fit the options beside them"):
        load_task_package(tmp_path / "out" / "best.pth")


def test_a_damaged_or_foreign_file_is_no_task_model(parts: Path, tmp_path: Path) -> None:
    assert finetune(parts, tmp_path / "out", "optim.epochs=1") == 0
    checkpoint = next((tmp_path / "out").glob("model_*.rank_0.pth"))
    with pytest.raises(ValueError, match="rank"):
        load_task_package(checkpoint)
    best = tmp_path / "out" / "best.pth"
    content = bytearray(best.read_bytes())
    content[len(content) // 2] ^= 1
    best.write_bytes(content)
    with pytest.raises(ValueError, match=r"best.pth"):
        load_task_package(best)


def test_idle_options_of_the_head_are_named(parts: Path, tmp_path: Path) -> None:
    assert finetune(parts, tmp_path / "out", "optim.epochs=1", "head.channels=7") == 0
    assert (
        "head.channels has no effect on a linear head for classification"
        in (tmp_path / "out" / "log" / "log.txt").read_text()
    )


def test_parts_in_train_and_val_are_warned_of(parts: Path, tmp_path: Path) -> None:
    train = f"data.val_dataset_path=GroupedJSON:split=TRAIN:root={parts}"
    assert finetune(parts, tmp_path / "out", "optim.epochs=1", train) == 0
    assert "parts are in both train and val" in (tmp_path / "out" / "log" / "log.txt").read_text()


@pytest.mark.parametrize("task", ["classification", "segmentation", "depth"])
def test_a_figure_that_does_not_exist_is_an_error_before_training(parts: Path, tmp_path: Path, task: str) -> None:
    real = {"classification": "part_auroc", "segmentation": "mean_dice", "depth": "rmse"}[task]
    with pytest.raises(ValueError, match=rf"evaluation\.metric={real}s: .* no such metric \(did you mean {real}\?\)"):
        finetune(parts, tmp_path / "out", f"evaluation.metric={real}s", task=task)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
    assert finetune(parts, tmp_path / "out", f"evaluation.metric={real}", "optim.epochs=1", task=task) == 0


def test_a_val_set_of_one_class_is_an_error_before_training(parts: Path, tmp_path: Path) -> None:
    def all_good(content: dict[str, list[dict[str, object]]]) -> None:
        for row in content["data_list"]:
            row["gt_label"] = 0

    edit(parts, "val", all_good)
    with pytest.raises(ValueError, match="image_auroc"):
        finetune(parts, tmp_path / "out")
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
    assert finetune(parts, tmp_path / "out", "evaluation.metric=image_accuracy") == 0


def test_a_signal_before_training_ends_it_with_the_code_to_start_again(parts: Path, tmp_path: Path) -> None:
    def interrupted(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the preparation went on")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fine_tune, "prepare_run", interrupted)
        assert finetune(parts, tmp_path / "out") == RESUME_EXIT_CODE
    assert "the same command starts again" in (tmp_path / "out" / "log" / "log.txt").read_text()
    assert finetune(parts, tmp_path / "out") == 0


def test_without_a_file_the_backbone_is_that_of_the_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no checkout is near, as after an installation as a package."""
    monkeypatch.chdir(tmp_path)
    assert load_backbone_config(load_task_config()) == load_config()
