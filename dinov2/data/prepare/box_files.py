"""Predicted boxes as files of other tools, so that a person corrects boxes instead of drawing them."""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from dinov2.data.datasets.base import ImageDataset
from dinov2.data.datasets.boxes import Boxes, four_numbers
from dinov2.data.datasets.coco_detection import CocoDetection
from dinov2.data.decoding import read_image_size
from dinov2.data.reading import read_image_bytes
from dinov2.utils.files import write_text_atomically

logger = logging.getLogger("dinov2")


@dataclass(frozen=True, kw_only=True, eq=False)
class BoxedImage:
    """The boxes of one image.

    Attributes:
        name: of the image, as the files should call it, with ``/`` between folders.
        number: its id in COCO files.
        size: height and width.
        boxes: corners x1 y1 x2 y2 in pixels, ``[n, 4]``.
        labels: class of each box, by name.
        scores: of each box, 0..1.
    """

    name: str
    number: int
    size: tuple[int, int]
    boxes: Boxes
    labels: Sequence[str]
    scores: Sequence[float]


def export_boxes(
    predictions: Path, output: Path, *, images: Path, dataset: ImageDataset | None = None, url: str = ""
) -> None:
    """Writes the boxes of a table of predictions as files that COCO's tools, Label Studio and CVAT read.

    ``coco_results.json`` has the predictions in COCO's format for scoring, ``coco.json`` the same as a whole set with
    images and categories (`CocoDetection` opens it), ``label_studio.json`` tasks with predictions beside
    ``label_studio_config.xml``, the labels to set up there, and ``cvat.xml`` annotations in the format "CVAT 1.1".

    Args:
        predictions: ``predictions.jsonl``, a line per image.
        output: folder for the files.
        images: folder that names of images in the files are relative to.
        dataset: the set that the images are of; of a `CocoDetection`, its ids of images and categories are written, of
            others the order of classes. Without it, classes are those that were found, in alphabetical order.
        url: what Label Studio puts before names, such as ``/data/local-files/?d=parts/``.

    Raises:
        FileNotFoundError, UnreadableImageError: the table or an image cannot be read.
        ValueError: the table has no boxes, or an image or a class that the set does not know; the line is named.
    """
    found = _read_predictions(predictions, images, dataset)
    classes = list(
        getattr(dataset, "box_classes", None) or sorted({label for image in found for label in image.labels})
    )
    unknown = next((label for image in found for label in image.labels if label not in classes), None)
    if unknown is not None:
        raise ValueError(f"{predictions}: the class {unknown!r} is none of the set: {', '.join(classes)}")
    numbers = dataset.category_ids if isinstance(dataset, CocoDetection) else range(1, len(classes) + 1)
    categories = dict(zip(classes, numbers, strict=True))
    files = {
        "coco_results.json": _to_json(coco_results(found, categories)),
        "coco.json": _to_json(coco_set(found, categories)),
        "label_studio.json": _to_json(label_studio_tasks(found, url)),
        "label_studio_config.xml": label_studio_config(classes),
        "cvat.xml": cvat_annotations(found, classes),
    }
    output.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_text_atomically(output / name, text)
    logger.info("%s: %d boxes in %d images", output, sum(len(image.labels) for image in found), len(found))


def coco_results(images: Sequence[BoxedImage], categories: Mapping[str, int]) -> list[dict[str, Any]]:
    """Predictions as COCO scores them.

    Args:
        images: with their boxes.
        categories: id of every class.
    """
    return [
        {
            "image_id": image.number,
            "category_id": categories[label],
            "bbox": _left_top_width_height(box),
            "score": score,
        }
        for image in images
        for box, label, score in zip(image.boxes.tolist(), image.labels, image.scores, strict=True)
    ]


def coco_set(images: Sequence[BoxedImage], categories: Mapping[str, int]) -> dict[str, Any]:
    """A whole COCO set, its annotations with a ``score``; arguments are those of `coco_results`."""
    annotations = [
        {"id": number, **result, "area": result["bbox"][2] * result["bbox"][3], "iscrowd": 0}
        for number, result in enumerate(coco_results(images, categories), start=1)
    ]
    return {
        "images": [
            {"id": image.number, "file_name": image.name, "height": image.size[0], "width": image.size[1]}
            for image in images
        ],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for name, number in categories.items()],
    }


def label_studio_tasks(images: Sequence[BoxedImage], url: str = "") -> list[dict[str, Any]]:
    """Tasks of Label Studio with predictions to correct, for the labels of `label_studio_config`.

    Args:
        images: with their boxes.
        url: put before the names of images.
    """
    return [
        {
            "data": {"image": url + image.name},
            "predictions": [
                {
                    "model_version": "dinov2",
                    "score": min(image.scores, default=0.0),  # images to look at first can be sorted to the front
                    "result": [_label_studio_box(image, place) for place in range(len(image.labels))],
                }
            ],
        }
        for image in images
    ]


def _label_studio_box(image: BoxedImage, place: int) -> dict[str, Any]:
    height, width = image.size
    left, top, columns, rows = _left_top_width_height(image.boxes[place].tolist())
    percent = {"x": left / width, "y": top / height, "width": columns / width, "height": rows / height}
    return {
        "id": f"box{place + 1}",
        "type": "rectanglelabels",
        "from_name": "label",
        "to_name": "image",
        "original_width": width,
        "original_height": height,
        "image_rotation": 0,
        "score": image.scores[place],
        "value": {
            **{key: 100 * value for key, value in percent.items()},
            "rotation": 0,
            "rectanglelabels": [image.labels[place]],
        },
    }


def label_studio_config(classes: Sequence[str]) -> str:
    """The labelling interface that `label_studio_tasks` is for, to be pasted into a project's settings."""
    view = ElementTree.Element("View")
    ElementTree.SubElement(view, "Image", name="image", value="$image", zoom="true")
    labels = ElementTree.SubElement(view, "RectangleLabels", name="label", toName="image")
    for name in classes:
        ElementTree.SubElement(labels, "Label", value=name)
    return _to_xml(view)


def cvat_annotations(images: Sequence[BoxedImage], classes: Sequence[str]) -> str:
    """Annotations in the format "CVAT 1.1" for images; CVAT finds the images of its task by their names.

    Args:
        images: with their boxes.
        classes: the labels that the task must have.
    """
    root = ElementTree.Element("annotations")
    ElementTree.SubElement(root, "version").text = "1.1"
    labels = ElementTree.SubElement(ElementTree.SubElement(ElementTree.SubElement(root, "meta"), "task"), "labels")
    for name in classes:
        ElementTree.SubElement(ElementTree.SubElement(labels, "label"), "name").text = name
    for number, image in enumerate(images):
        height, width = map(str, image.size)
        entry = ElementTree.SubElement(root, "image", id=str(number), name=image.name, width=width, height=height)
        for box, label in zip(image.boxes.tolist(), image.labels, strict=True):
            corners = {key: f"{value:.2f}" for key, value in zip(("xtl", "ytl", "xbr", "ybr"), box, strict=True)}
            flags = {"source": "auto", "occluded": "0", "z_order": "0"}
            ElementTree.SubElement(entry, "box", {"label": label, **flags, **corners})
    return _to_xml(root)


def _read_predictions(path: Path, folder: Path, dataset: ImageDataset | None) -> list[BoxedImage]:
    """The images of a table of predictions; those that could not be predicted are left out and counted."""
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no table of predictions at {path}; run/infer/image.py writes predictions.jsonl"
        )
    known = {} if dataset is None else {name: place for place, name in enumerate(dataset.get_image_paths())}
    found: list[BoxedImage] = []
    failed = 0
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        where = f"{path}, line {number}"
        try:
            line = json.loads(text)
            image, objects = Path(line["image"]), line.get("objects", ())
            failed += "error" in line
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{where}: must be an object with the path of an image, found {text!r:.80}") from None
        if "error" in line:
            continue
        if "objects" not in line:
            raise ValueError(f"{where}: has no objects; only the predictions of detection have boxes")
        boxes = [entry["box"] for entry in objects]
        if not all(map(four_numbers, boxes)):
            raise ValueError(f"{where}: a box must be four numbers, found {boxes!r:.80}")
        file = os.path.abspath(image if image.is_file() else folder / image)
        if dataset is not None and file not in known:
            raise ValueError(f"{where}: {file} is no image of the set")
        place = known.get(file, len(found))
        found.append(
            BoxedImage(
                name=Path(os.path.relpath(file, folder)).as_posix(),
                number=dataset.image_ids[place] if isinstance(dataset, CocoDetection) else place + 1,
                size=read_image_size(read_image_bytes(file), file),
                boxes=np.asarray(boxes, dtype=np.float32).reshape(-1, 4),
                labels=[entry["label"] for entry in objects],
                scores=[entry["score"] for entry in objects],
            )
        )
    if failed:
        logger.warning("%s: %d images could not be predicted and are left out", path, failed)
    if not found:
        raise ValueError(f"{path}: has the prediction of no image")
    return found


def _left_top_width_height(box: Sequence[float]) -> list[float]:
    left, top, right, bottom = box
    return [round(number, 3) for number in (left, top, right - left, bottom - top)]


def _to_json(content: object) -> str:
    return json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def _to_xml(root: ElementTree.Element) -> str:
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=False) + "\n"
