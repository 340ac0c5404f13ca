"""Predicted boxes as files of other tools: COCO read back by our own reader, the others by their structure."""

import json
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from dinov2.data.datasets import CocoDetection
from dinov2.data.prepare.box_files import export_boxes

OBJECTS = [
    {"label": "dent", "score": 0.9, "box": [1.5, 2, 11.25, 22]},
    {"label": "a <b> & ü", "score": 0.25, "box": [0, 0, 40, 30]},
]


@pytest.fixture
def images(tmp_path):
    for number in (1, 2, 3):
        path = tmp_path / f"set/train/part {number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (40, 30), number).save(path)
    return tmp_path / "set"


def write_predictions(tmp_path, images, lines=None):
    path = tmp_path / "predictions.jsonl"
    names = [str(images / f"train/part {number}.png") for number in (1, 2, 3)]
    lines = lines or [
        {"image": names[1], "objects": OBJECTS, "defect_score": 0.9, "overlay": "x.png"},
        {"image": names[0], "objects": [], "defect_score": 0.0},
        {"image": names[2], "error": "it is truncated"},
    ]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


def test_coco_comes_back(tmp_path, images, caplog):
    export_boxes(write_predictions(tmp_path, images), images / "annotations", images=images)
    dataset = CocoDetection(images, "TRAIN", "coco.json")
    assert dataset.box_classes == ("a <b> & ü", "dent")
    assert [dataset.get_image_path(index).name for index in range(2)] == ["part 2.png", "part 1.png"]
    boxes, labels = dataset.get_boxes(0)
    np.testing.assert_allclose(boxes, [found["box"] for found in OBJECTS])
    assert (labels.tolist(), len(dataset.get_boxes(1)[0])) == ([1, 0], 0)
    assert "1 images could not be predicted and are left out" in caplog.text


def test_ids_of_a_coco_set_are_kept(tmp_path, images):
    entries = [{"id": 70 - number, "file_name": f"part {number}.png"} for number in (1, 2, 3)]
    categories = [{"id": 90, "name": "a <b> & ü"}, {"id": 13, "name": "dent"}]
    (images / "annotations").mkdir()
    content = {"images": entries, "annotations": [], "categories": categories}
    (images / "annotations/train.json").write_text(json.dumps(content))
    dataset = CocoDetection(images, "TRAIN")
    export_boxes(write_predictions(tmp_path, images), tmp_path / "out", images=images, dataset=dataset)
    assert json.loads((tmp_path / "out/coco_results.json").read_text()) == [
        {"image_id": 68, "category_id": 13, "bbox": [1.5, 2, 9.75, 20], "score": 0.9},
        {"image_id": 68, "category_id": 90, "bbox": [0, 0, 40, 30], "score": 0.25},
    ]
    evaluation = pytest.importorskip("pycocotools.coco")
    whole = evaluation.COCO(str(tmp_path / "out/coco.json"))
    assert whole.loadRes(str(tmp_path / "out/coco_results.json")).getAnnIds(imgIds=[68]) == [1, 2]


def test_label_studio(tmp_path, images):
    export_boxes(write_predictions(tmp_path, images), tmp_path, images=images, url="/data/local-files/?d=")
    tasks = json.loads((tmp_path / "label_studio.json").read_text(encoding="utf-8"))
    assert [task["data"]["image"] for task in tasks] == [
        f"/data/local-files/?d=train/part {number}.png" for number in (2, 1)
    ]
    view = ElementTree.parse(tmp_path / "label_studio_config.xml").getroot()
    control, image = view.find("RectangleLabels"), view.find("Image")
    for found, region in zip(OBJECTS, tasks[0]["predictions"][0]["result"], strict=True):
        value = region["value"]
        assert (region["from_name"], region["to_name"]) == (control.get("name"), image.get("name"))
        assert region["type"] == control.tag.lower()
        assert value["rectanglelabels"] == [found["label"]]
        assert found["label"] in [label.get("value") for label in control]
        left, top = value["x"] * 40 / 100, value["y"] * 30 / 100
        corners = left, top, left + value["width"] * 40 / 100, top + value["height"] * 30 / 100
        np.testing.assert_allclose(corners, found["box"], atol=1e-6)
    assert tasks[1]["predictions"][0]["result"] == []


def test_cvat(tmp_path, images):
    export_boxes(write_predictions(tmp_path, images), tmp_path, images=images)
    root = ElementTree.parse(tmp_path / "cvat.xml").getroot()
    assert (root.tag, root.findtext("version")) == ("annotations", "1.1")
    assert [name.text for name in root.iterfind("meta/task/labels/label/name")] == ["a <b> & ü", "dent"]
    entries = root.findall("image")
    assert [entry.attrib for entry in entries] == [
        {"id": str(place), "name": f"train/part {number}.png", "width": "40", "height": "30"}
        for place, number in enumerate((2, 1))
    ]
    for found, box in zip(OBJECTS, entries[0], strict=True):
        assert box.get("label") == found["label"]
        np.testing.assert_allclose([float(box.get(key)) for key in ("xtl", "ytl", "xbr", "ybr")], found["box"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"image": "train/part 1.png", "label": "good"}, r"jsonl, line 1: has no objects; only .* detection"),
        ({"image": "train/part 1.png", "objects": [{"box": [1]}]}, "line 1: a box must be four numbers"),
        ([1], "line 1: must be an object with the path of an image"),
        ({"image": "a.png", "error": "gone"}, "has the prediction of no image"),
        ({"image": "a.png", "objects": []}, r"a\.png: no such file"),
    ],
)
def test_faults(tmp_path, images, line, message):
    with pytest.raises((ValueError, OSError), match=message):
        export_boxes(write_predictions(tmp_path, images, [line]), tmp_path / "out", images=images)
    assert not (tmp_path / "out").exists()
