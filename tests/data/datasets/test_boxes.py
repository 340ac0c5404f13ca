"""Sets of boxes: what each layout means, how boxes are checked, and what every kind of fault is answered with."""

import json
import logging

import numpy as np
import pycocotools.mask
import pytest
import torch
from PIL import Image

from dinov2.data.datasets import (
    BadTargetError,
    BoxSource,
    CocoDetection,
    GroupedJSON,
    ImageFolder,
    VOCDetection,
    YOLODetection,
)
from dinov2.data.datasets.boxes import boxes_of_mask
from dinov2.data.datasets.references import References
from dinov2.data.loaders import make_dataset
from dinov2.data.task_dataset import TaskDataset, box_targets, collate_task, reference_targets
from dinov2.data.task_transforms import make_eval_transform

SIZE = (40, 30)  # width, height


def draw(path, size=SIZE, level=9):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, level).save(path)


def annotation(number=1, image=7, category=5, bbox=(4, 6, 10, 8), **more):
    return {"id": number, "image_id": image, "category_id": category, "bbox": list(bbox), **more}


def coco(root, annotations, *, images=None, categories=None, name="train.json", folder="train"):
    entries = images or [{"id": 7, "file_name": "a.png", "width": 40, "height": 30}, {"id": 3, "file_name": "b.png"}]
    for entry in entries:
        draw(root / folder / entry["file_name"])
    categories = categories or [{"id": 9, "name": "dent"}, {"id": 5, "name": "scratch"}]
    (root / "annotations").mkdir(exist_ok=True)
    content = {"images": entries, "annotations": annotations, "categories": categories}
    (root / "annotations" / name).write_text(json.dumps(content))
    return CocoDetection(root, "TRAIN")


def grouped(root, rows, **metainfo):
    (root / "annotations").mkdir(exist_ok=True)
    for row in rows:
        draw(root / row["img_path"])
    content = {"metainfo": {"classes": ["good", "bad"], **metainfo}, "data_list": rows}
    (root / "annotations/train.json").write_text(json.dumps(content))
    return GroupedJSON(root, "TRAIN")


def voc(root, objects, *, names="a", size=SIZE, **options):
    draw(root / "JPEGImages/a.jpg")
    for folder in ("Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "ImageSets/Main/train.txt").write_text(names)
    text = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin>"
        f"<xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"
        for name, difficult, box in objects
    )
    shape = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    (root / "Annotations/a.xml").write_text(f"<annotation>{shape}{text}</annotation>")
    return VOCDetection(root, "TRAIN", **options)


def yolo(root, text, *, names="data.yaml"):
    draw(root / "images/train/a.png")
    draw(root / "images/train/b.png")
    (root / "labels/train").mkdir(parents=True, exist_ok=True)
    if text is not None:
        (root / "labels/train/a.txt").write_text(text)
    (root / names).write_text("names: {0: scratch, 1: dent}" if names.endswith("yaml") else "scratch\ndent\n")
    return YOLODetection(root, "TRAIN")


def test_coco(tmp_path):
    dataset = coco(tmp_path, [annotation(), annotation(2, category=9, bbox=(0, 0, 40, 30), iscrowd=1)])
    assert isinstance(dataset, BoxSource)
    assert (dataset.box_classes, dataset.category_ids, dataset.image_ids) == (("scratch", "dent"), (5, 9), (7, 3))
    boxes, labels = dataset.get_boxes(0)
    assert (boxes.dtype, labels.dtype) == (np.float32, np.int64)
    assert boxes.tolist() == [[4, 6, 14, 14], [0, 0, 40, 30]]
    assert (labels.tolist(), dataset.get_crowd(0).tolist()) == ([0, 1], [False, True])
    assert dataset.get_box_labels(0).tolist() == [0]
    assert [part.shape for part in dataset.get_boxes(1)] == [(0, 4), (0,)]
    assert dataset.get_image_path(1) == tmp_path / "train/b.png"


@pytest.mark.parametrize(("name", "folder"), [("instances_train2017.json", "train2017"), ("train.json", ".")])
def test_coco_layouts(tmp_path, name, folder):
    assert coco(tmp_path, [annotation()], name=name, folder=folder).get_image(1).size == SIZE
    dataset = make_dataset(dataset_str=f"CocoDetection:split=train:root={tmp_path}:annotations={name}")
    assert dataset.get_boxes(0)[0].tolist() == [[4, 6, 14, 14]]


def test_real_boxes_are_the_same_in_both_layouts(neu):
    rows, entries = GroupedJSON(neu, "VAL"), CocoDetection(neu, "VAL", "coco_val.json")
    assert (rows.box_classes, len(rows)) == (entries.box_classes, len(entries))
    places = {path: index for index, path in enumerate(rows.get_image_paths())}
    for index in range(0, len(entries), 10):
        row = places[entries.get_image_paths()[index]]
        for ours, theirs in zip(rows.get_boxes(row), entries.get_boxes(index), strict=True):
            assert np.array_equal(ours, theirs)


def test_real_boards_name_their_templates(repository):
    root = repository.parent / "shared/data/deep_pcb"
    if not root.exists():
        pytest.skip("the board set is absent")
    dataset = CocoDetection(root, "VAL")
    assert sum(len(dataset.get_box_labels(index)) for index in range(len(dataset))) == 1399
    assert References(dataset).read(7).size == dataset.get_image(7).size == (640, 640)


@pytest.mark.parametrize(
    "segmentation",
    [
        [[4, 6, 14, 6, 14, 10], [5, 14, 6, 9, 7, 9]],
        {"size": [30, 40], "counts": [4 * 30 + 6, 8, *[22, 8] * 9, 26 * 30 + 16]},
    ],
)
def test_a_segmentation_without_a_box_has_one(tmp_path, segmentation):
    entry = annotation(segmentation=segmentation)
    del entry["bbox"]
    assert coco(tmp_path, [entry]).get_boxes(0)[0].tolist() == [[4, 6, 14, 14]]


def test_a_compressed_rle_without_a_box_has_one(tmp_path):
    pixels = np.zeros((30, 40), dtype=np.uint8, order="F")
    pixels[6:14, 4:14] = 1
    encoded = pycocotools.mask.encode(pixels)
    entry = annotation(segmentation={**encoded, "counts": encoded["counts"].decode()}, bbox=())
    entry["bbox"] = None
    assert coco(tmp_path, [entry]).get_boxes(0)[0].tolist() == [[4, 6, 14, 14]]


def test_boxes_are_clipped_or_left_out_and_counted(tmp_path, caplog):
    caplog.set_level(logging.INFO, "dinov2")
    faulty = [(-5, 6, 10, 8), (30, 20, 20, 20), (50, 2, 5, 5), (-9, 3, 4, 4), (4, 4, 0, 5)]
    dataset = coco(tmp_path, [annotation(number, bbox=box) for number, box in enumerate(faulty)])
    assert dataset.get_boxes(0)[0].tolist() == [[0, 6, 5, 14], [30, 20, 40, 30]]
    levels = [record.levelno for record in caplog.records]
    assert levels == [logging.INFO, logging.WARNING, logging.WARNING]
    assert "2 of 5 boxes reach beyond their image and are clipped to it, such as annotation 0 (image 7)" in caplog.text
    assert "2 of 5 boxes lie wholly outside their image and are left out, such as annotation 2" in caplog.text
    assert "1 of 5 boxes have no area and are left out, such as annotation 4" in caplog.text
    caplog.clear()
    # The file does not say how large the image is: that is seen when it is read, in any process.
    dataset = coco(tmp_path, [annotation(image=3, bbox=(30, 2, 20, 5)), annotation(2, image=3, bbox=(50, 2, 5, 5))])
    assert (dataset.get_boxes(1)[0].tolist(), dataset.get_crowd(1).tolist()) == ([[30, 2, 40, 7]], [False])
    assert "b.png: 1 of its boxes lie wholly outside of it and are left out" in caplog.text


def test_repeated_annotations(tmp_path, caplog):
    dataset = coco(tmp_path, [annotation(), annotation(), annotation(bbox=(1, 1, 2, 2))])
    assert dataset.get_boxes(0)[0].tolist() == [[4, 6, 14, 14], [1, 1, 3, 3]]
    assert "2 annotations have the id of another one, such as 1; 1 are the same" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"annotations": [annotation(bbox=(1, 2, float("nan"), 3))]}, r"annotation 1 \(image 7\): .* no finite number"),
        ({"annotations": [annotation(bbox=(1, 2, -3, 3))]}, r"annotation 1 \(image 7\): .* before its left or upper"),
        ({"annotations": [annotation(bbox=(1, 2, 3))]}, r"annotation 1 \(image 7\): 'bbox' must be the numbers"),
        ({"annotations": [annotation(category=4)]}, r"annotation 1 \(image 7\): category_id 4 is none of .* 5, 9"),
        ({"annotations": [annotation(image=8)]}, "annotation 1: image_id 8 is none of the images"),
        ({"annotations": [{"id": 1, "image_id": 7, "category_id": 5, "segmentation": [[1]]}]}, "1 .*neither polygons"),
        ({"images": [{"id": 7, "file_name": "a.png"}] * 2}, "images: the id 7 is given twice, to 'a.png'"),
        ({"images": [{"id": n, "file_name": "a.png"} for n in (7, 8)]}, "images 7 and 8 have the same file_name"),
        ({"images": [{"id": 7, "file_name": "../a.png"}]}, r"image 7: file_name '\.\./a\.png' leaves"),
        ({"images": []}, "'images' is empty"),
        ({"categories": [{"id": 5, "name": "a"}, {"id": 6, "name": "a"}]}, "categories 5, 6 are all called 'a'"),
        ({"categories": [{"id": 5, "name": "a"}, {"id": 5, "name": "b"}]}, "categories: the id 5 is given twice"),
        ({"annotations": None}, "must be an object with the lists"),
        ({"data_list": []}, "open it by GroupedJSON"),
    ],
)
def test_faults_of_coco_files(tmp_path, change, message):
    coco(tmp_path, [])
    path = tmp_path / "annotations/train.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=rf"annotations/train\.json: .*{message}"):
        CocoDetection(tmp_path, "TRAIN")


def test_files_that_are_not_there(tmp_path):
    coco(tmp_path, [])
    with pytest.raises(FileNotFoundError, match=r"no val\.json or instances_val2017\.json .*; it has train\.json"):
        CocoDetection(tmp_path, "VAL")
    (tmp_path / "train/a.png").unlink()
    with pytest.raises(OSError, match=r"a\.png: no such file"):
        CocoDetection(tmp_path, "TRAIN").get_boxes(0)
    (tmp_path / "train/b.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"none of 2 images, such as 'a\.png', lies in "):
        CocoDetection(tmp_path, "TRAIN")


def test_an_image_of_another_size_than_its_boxes_is_refused(tmp_path):
    dataset = coco(tmp_path, [annotation()])
    draw(tmp_path / "train/a.png", SIZE[::-1])
    with pytest.raises(BadTargetError, match=r"a\.png: has 30x40 pixels .* drawn on 40x30; it is turned"):
        dataset.get_boxes(0)


def test_voc(tmp_path, caplog):
    caplog.set_level(logging.INFO, "dinov2")
    objects = [("zz", 0, (1, 1, 40, 30)), ("aa", 1, (0, 5, 10, 9.5))]
    dataset = voc(tmp_path, objects)
    assert dataset.box_classes == ("aa", "zz")
    assert dataset.get_boxes(0)[0].tolist() == [[0, 0, 40, 30], [0, 4, 10, 9.5]]
    assert (dataset.get_boxes(0)[1].tolist(), dataset.get_crowd(0).tolist()) == ([1, 0], [False, True])
    assert "1 of 2 objects are marked as difficult" in caplog.text
    kept = voc(tmp_path, objects, one_based=False, keep_difficult=True)
    assert kept.get_boxes(0)[0].tolist() == [[1, 1, 40, 30], [0, 5, 10, 9.5]]
    assert not kept.get_crowd(0).any()
    assert len(voc(tmp_path, [("dog", 0, (1, 1, 9, 9))]).box_classes) == 20
    (tmp_path / "classes.txt").write_text("cat\n")
    with pytest.raises(ValueError, match=r"a\.xml: the class 'dog' is not in .*classes\.txt: cat"):
        VOCDetection(tmp_path, "train")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"objects": [("a", 0, ("x", 1, 2, 3))]}, ValueError, r"a\.xml: the box of a a must be four .*xmin='x'"),
        ({"objects": [("", 0, (1, 1, 2, 3))]}, ValueError, r"a\.xml: an object has no name"),
        ({"objects": [("a", 0, (9, 1, 2, 3))]}, ValueError, r"train\.txt: a\.xml, a a: .* before its left"),
        ({"objects": [], "names": "a\nb"}, FileNotFoundError, r"b\.xml is missing, .*1 of 2"),
        ({"objects": [], "names": "a\na"}, ValueError, r"train\.txt, line 2: 'a' is already in line 1"),
        ({"objects": [("<a", 0, (1, 1, 2, 3))]}, ValueError, r"a\.xml: is no annotation of Pascal VOC"),
    ],
)
def test_faults_of_voc_files(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        voc(tmp_path, **arguments)


@pytest.mark.parametrize("names", ["data.yaml", "classes.txt"])
def test_yolo(tmp_path, names):
    dataset = yolo(tmp_path, "1 0.5 0.5 0.25 0.2\n\n0 0 0 0.5 0 0.5 0.2\n", names=names)
    assert dataset.box_classes == ("scratch", "dent")
    boxes, labels = dataset.get_boxes(0)
    np.testing.assert_allclose(boxes, [[15, 12, 25, 18], [0, 0, 20, 6]], rtol=1e-6)
    assert (labels.tolist(), len(dataset.get_boxes(1)[0])) == ([1, 0], 0)
    (tmp_path / "train").mkdir()
    for name in ("images", "labels"):
        (tmp_path / name / "train").rename(tmp_path / "train" / name)
        (tmp_path / name).rmdir()
    assert YOLODetection(tmp_path, "train").get_boxes(0)[1].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 0.5 0.5 0.1", r"a\.txt, line 1: must be 'class cx cy w h'"),
        ("0 0.5 0.5 0.1 x", r"a\.txt, line 1: must be"),
        ("0 20 15 4 4", r"a\.txt, line 1: numbers must be shares .* are they pixels"),
        ("0 0.5 0.5 0.1 0.1\n2 0.5 0.5 0.1 0.1", r"a\.txt, line 2: class 2 is outside the 2 classes of .*data\.yaml"),
        ("0 0.5 0.5 nan 0.1", r"a\.txt, line 1: .* no finite number"),
        (None, r"has a \.txt for none of the 2 images"),
    ],
)
def test_faults_of_yolo_files(tmp_path, text, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        yolo(tmp_path, text)


def test_boxes_of_grouped_sets(tmp_path):
    rows = [
        {"img_path": "a.png", "group_id": "p", "gt_label": 1, "boxes": [{"bbox": [1, 2, 3, 50], "label": 1}]},
        {"img_path": "b.png", "group_id": "p", "gt_label": 1, "boxes": [[1, 2, 3, 4.5]], "box_labels": [0]},
        {"img_path": "c.png", "group_id": "p", "gt_label": 1},
        {"img_path": "d.png", "group_id": "q", "gt_label": 0},
        {"img_path": "e.png", "group_id": "q", "boxes": []},
    ]
    dataset = grouped(tmp_path, rows)
    assert dataset.box_classes == ("good", "bad")
    assert [dataset.get_boxes(i)[0].tolist() for i in range(5)] == [[[1, 2, 3, 30]], [[1, 2, 3, 4.5]], [], [], []]
    assert [dataset.get_box_labels(i).tolist() for i in range(5)] == [[1], [0], [], [], []]
    assert [dataset.knows_boxes(i) for i in range(5)] == [True, True, False, True, True]
    assert [dataset.get_annotation(i) for i in range(5)] == rows
    assert grouped(tmp_path, rows, box_classes=["scratch", "dent"]).box_classes == ("scratch", "dent")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"boxes": [{"bbox": [1, 2, 3, 4], "label": 2}]}, r"'boxes'\[0\] has the label 2; metainfo.classes has 2"),
        ({"boxes": [{"bbox": [1, 2, 3, 4]}]}, r"'boxes'\[0\] must be .* or 'box_labels'"),
        ({"boxes": [[1, 2, 3]], "box_labels": [0]}, r"'boxes'\[0\] must be the numbers \[x1, y1, x2, y2\]"),
        ({"boxes": [[1, 2, 3, 4]], "box_labels": []}, "has 1 'boxes' and 0 'box_labels'"),
        ({"boxes": 3}, "'boxes' and 'box_labels' must be lists"),
        ({"boxes": [[1, 2, 3, float("inf")]], "box_labels": [0]}, r"'boxes'\[0\]: .* no finite number"),
    ],
)
def test_faults_of_boxes_in_grouped_sets(tmp_path, more, message):
    dataset = grouped(tmp_path, [{"img_path": "a.png", "group_id": "p", **more}])
    with pytest.raises(ValueError, match=rf"train\.json: data_list\[0\]: {message}"):
        dataset.get_boxes(0)


def test_boxes_from_masks(tmp_path):
    mask = np.zeros((30, 40), dtype=np.uint8)
    mask[2:5, 3:9] = mask[5, 9] = mask[20:, 30:] = 1  # a corner connects
    mask[10, 10], mask[0, 0] = 2, 255
    boxes, labels = boxes_of_mask(mask)
    assert boxes.tolist() == [[3, 2, 10, 6], [30, 20, 40, 30], [10, 10, 11, 11]]
    assert labels.tolist() == [0, 0, 1]
    (tmp_path / "m").mkdir()
    Image.fromarray(mask).save(tmp_path / "m/a.png")
    rows = [
        {"img_path": "a.png", "group_id": "p", "gt_label": 1, "mask_path": "m/a.png"},
        {"img_path": "b.png", "group_id": "p", "gt_label": 0},
        {"img_path": "c.png", "group_id": "p", "gt_label": 1},
    ]
    dataset = grouped(tmp_path, rows, mask_classes=["background", "scratch", "dent"])
    assert dataset.box_classes == ("scratch", "dent")
    assert np.array_equal(dataset.get_boxes(0)[0], boxes)
    assert [dataset.knows_boxes(index) for index in range(3)] == [True, True, False]
    with pytest.raises(ValueError, match=r"no row has 'boxes', nor 'mask_path'"):
        _ = grouped(tmp_path, rows[1:]).box_classes


def test_samples_hold_boxes_without_crowds(tmp_path):
    many = [annotation(number, bbox=(number % 30, number % 20, 5, 5)) for number in range(500)]
    dataset = coco(tmp_path, [*many, annotation(500, iscrowd=1)])
    images = TaskDataset(dataset, box_targets(dataset, 2), make_eval_transform((15, 20), "stretch"))
    batch = collate_task([images[0], images[1]])
    assert [tuple(boxes.shape) for boxes in batch["boxes"]] == [(500, 4), (0, 4)]
    assert [tuple(labels.shape) for labels in batch["box_labels"]] == [(500,), (0,)]
    expected = torch.from_numpy(dataset.get_boxes(0)[0][:500] / 2)
    torch.testing.assert_close(torch.as_tensor(batch["boxes"][0]), expected, check_dtype=False)
    assert (batch["boxes"][1].dtype, batch["box_labels"][1].dtype) == (torch.float32, torch.int64)
    with pytest.raises(ValueError, match="have 2 classes, the task 1"):
        box_targets(dataset, 1)
    with pytest.raises(ValueError, match="ImageFolder has no boxes"):
        box_targets(ImageFolder(tmp_path / "train", labels="none"), 2)


class TestReferences:
    def test_they_are_named_by_the_item(self, tmp_path):
        draw(tmp_path / "template/a.png", level=200)
        images = [{"id": 7, "file_name": "a.png", "reference": "template/a.png"}]
        dataset = coco(tmp_path, [annotation()], images=images)
        samples = TaskDataset(
            dataset, reference_targets(dataset, box_targets(dataset, 2)), make_eval_transform((15, 20), "stretch")
        )
        batch = collate_task([samples[0]])
        assert batch["reference"].shape == batch["image"].shape
        assert batch["reference"].min() > batch["image"].max()
        draw(tmp_path / "template/a.png", (20, 15))
        with pytest.raises(BadTargetError, match=r"a\.png: its reference has 15 x 20 pixels .* the image 30 x 40"):
            samples[0]
        (tmp_path / "template/a.png").write_bytes(b"no image")
        with pytest.raises(BadTargetError, match=r"train/a\.png: its reference: cannot read image .*template/a\.png"):
            samples[0]
        (tmp_path / "template/a.png").unlink()
        with pytest.raises(
            FileNotFoundError, match=r"\(image 0 of the set\): its reference .*/a\.png does not exist \(1 of"
        ):
            reference_targets(dataset, box_targets(dataset, 2))

    def test_they_are_good_images_of_the_part_where_the_item_names_none(self, tmp_path):
        rows = [
            {"img_path": f"{name}.png", "group_id": group, "gt_label": label}
            for name, group, label in (("a", "p", 1), ("b", "p", 0), ("c", "p", 0), ("d", "q", 1), ("e", "q", 0))
        ]
        rows[4]["reference"] = "a.png"
        dataset = grouped(tmp_path, rows)
        for level, row in enumerate(rows):
            draw(tmp_path / row["img_path"], level=level)
        references = References(dataset)
        assert [references.read(index).getpixel((0, 0))[0] for index in range(5)] == [1, 2, 1, 4, 0]
        del rows[4]["reference"]
        with pytest.raises(
            ValueError, match=r"e\.png .*has nothing to be compared with: .* no other good .*1 of the 5"
        ):
            References(grouped(tmp_path, rows))
        rows[4]["reference"] = "/a.png"
        with pytest.raises(ValueError, match=r"data_list\[4\]: 'reference' '/a\.png' is absolute"):
            References(grouped(tmp_path, rows))
