"""The shipped recipes of detection begin on sets of the layout that they name, with their head and classes."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fine_tune_stand_ins import small_vit
from PIL import Image

from dinov2.models import build
from dinov2.tasks import load_task_config
from dinov2.tasks.engine import main

RECIPES = sorted(path.stem for path in (Path(__file__).parents[2] / "configs" / "task").glob("detection_*.yaml"))
BOXES = [[4, 6, 30, 40], [50, 20, 90, 44]]


def write_images(root: Path, *names: str) -> None:
    rng = np.random.default_rng(0)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (96, 112), dtype=np.uint8)).save(root / name)


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``data/`` of the recipes: two images of two boxes per split, with as many classes as the sets have."""
    data = tmp_path_factory.mktemp("sets") / "data"
    for name, folder, annotations, classes in (
        ("deep_pcb", "{split}", "{split}", range(1, 7)),
        ("coco", "{split}2017", "instances_{split}2017", range(1, 160, 2)),  # ids with gaps, as COCO's
    ):
        for split in ("train", "val"):
            images = [{"id": n, "file_name": f"{n}.png", "width": 112, "height": 96} for n in (3, 8)]
            write_images(data / name / folder.format(split=split), "3.png", "8.png")
            if name == "deep_pcb":
                write_images(data / name / "template", "3.png", "8.png")
                images = [{**image, "reference": f"template/{image['file_name']}"} for image in images]
            entries = [
                {"id": 2 * image + k, "image_id": image, "category_id": classes[k], "iscrowd": 0}
                | {"bbox": [left, top, right - left, bottom - top], "area": (right - left) * (bottom - top)}
                for image in (3, 8)
                for k, (left, top, right, bottom) in enumerate(BOXES)
            ]
            categories = [{"id": number, "name": f"class {number}"} for number in classes]
            content = {"images": images, "annotations": entries, "categories": categories}
            write_json(data / name / "annotations" / f"{annotations.format(split=split)}.json", content)
    for split in ("train", "val"):
        names = [f"{split}/a.png", f"{split}/b.png"]
        write_images(data / "neu", *names)
        boxes = [{"bbox": box, "label": label} for label, box in enumerate(BOXES)]
        rows = [{"img_path": name, "gt_label": 0, "group_id": name, "boxes": boxes} for name in names]
        content = {"metainfo": {"classes": [f"kind {number}" for number in range(6)]}, "data_list": rows}
        write_json(data / "neu" / "annotations" / f"{split}.json", content)
    return data


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_begins(
    sets: Path, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recipe: str
) -> None:
    """With a narrow backbone of the depth, patch and weights' name that the recipe asks for, on small images."""
    path = repository / "configs" / "task" / f"{recipe}.yaml"
    config = load_task_config(path)
    is_small = config.backbone.pretrained_weights == "dinov2_vits14"
    narrow = {name: partial(small_vit, depth=depth) for name, depth in (("vit_small", 12), ("vit_mini", 6))}
    monkeypatch.setattr(build, "ARCHITECTURES", narrow)
    backbone = repository / ("configs/eval/vits14_pretrain.yaml" if is_small else config.backbone.config_file)
    pairs = [
        f"data.train_dataset_path={config.data.train_dataset_path.replace('root=data', f'root={sets}')}",
        f"data.val_dataset_path={config.data.val_dataset_path.replace('root=data', f'root={sets}')}",
        *("backbone.pretrained_weights=", f"backbone.config_file={backbone}"),
        *("data.image_size=112", "data.num_workers=0", "train.batch_size_per_gpu=2", "train.device=cpu"),
    ]
    assert main(["--config", str(path), "--dry-run", *pairs]) == 0
    said = capsys.readouterr().out
    kind = "yolo" if "yolo" in recipe or "reference" in recipe else "detr"
    assert re.search(rf"head +{kind}, [\d,]+ parameters", said)
    assert re.search(rf"classes +{80 if 'coco' in recipe else 6}, ", said)
    assert re.search(rf"schedule +{config.optim.epochs} epochs", said)
    assert "no effect" not in said


def test_the_settings_of_the_reference_card_are_those_that_it_documents(repository: Path) -> None:
    config = load_task_config(repository / "configs" / "task" / "detection_coco_detr.yaml")
    optim = config.optim
    assert (optim.optimizer, optim.lr, optim.epochs, config.train.batch_size_per_gpu) == ("adam", 1e-4, 50, 8)
    assert (config.backbone.mode, config.head.kind, config.head.num_queries) == ("lora", "detr", 100)
    assert (optim.schedule, optim.warmup_epochs, optim.weight_decay, optim.backbone_lr_mult) == ("constant", 0, 0, 1)
