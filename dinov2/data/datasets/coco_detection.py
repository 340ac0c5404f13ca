"""Boxes as COCO describes them: one JSON file per split with images, annotations and categories."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Unpack

import numpy as np

from dinov2.data.datasets.annotation_file import Fail, read_json
from dinov2.data.datasets.base import Split, Transforms
from dinov2.data.datasets.boxes import BoxTable, ListedBoxes, four_numbers
from dinov2.data.datasets.references import ReferenceSource
from dinov2.data.datasets.scan import CompactStrings, shorten_paths
from dinov2.data.reading import find_file

logger = logging.getLogger("dinov2")

_FILES = ("{split}.json", "instances_{split}2017.json", "instances_{split}.json")
_FOLDERS = ("{split}", "{split}2017", "images/{split}", "images/{split}2017", "images", "")
_LOOKED_FOR = 20  # images, to find out which folder they lie in


class CocoDetection(ListedBoxes, ReferenceSource):
    """Images with boxes, from ``root/annotations/{train,val,test}.json`` or ``instances_{train,val}2017.json``.

    Categories may be any; in the order of their ids they are the classes. Images lie below ``root``, ``root/<split>``
    or ``root/<split>2017`` (or in ``images`` there), wherever their ``file_name`` leads to a file. An annotation
    without ``bbox`` gets the box of its ``segmentation``, polygons or RLE. Images may have a ``group_id``, the part
    that they show, and a ``reference``, the path of an image to compare with, relative to ``root`` or to the images.

    Attributes:
        category_ids: of the classes, in the file.
        image_ids: of the images, in the file.
        reference_paths: as in the file, empty text where an image has none; None where no image has one.

    Reference: Lin et al., Microsoft COCO: Common objects in context, ECCV 2014, and its data format.
    """

    def __init__(
        self, root: str | Path, split: str, annotations: str | None = None, **transforms: Unpack[Transforms]
    ) -> None:
        """Reads and checks the annotation file; images are not opened.

        Args:
            root: folder of the set.
            split: ``TRAIN``, ``VAL`` or ``TEST``, in any case.
            annotations: name of the file in ``root/annotations`` where it has another one.
            **transforms: see `ImageDataset`.

        Raises:
            FileNotFoundError: when the file, or every image that was looked for, is missing.
            ValueError: for what is wrong in the file, naming the file and the id.
        """
        self.root = find_file(Path(root))
        self.split = Split.parse(split)
        self.annotation_path = _find_annotations(self.root, self.split, annotations)

        def fail(text: str) -> NoReturn:
            raise ValueError(f"{self.annotation_path}: {text}")

        content = read_json(self.annotation_path)
        images, entries, categories = _sections(content, fail)
        names = _by_id(categories, "categories", "name", str, fail)
        self.category_ids = tuple(sorted(names))
        classes = [names[number] for number in self.category_ids]
        if len(set(classes)) < len(classes):
            name = next(name for name in classes if classes.count(name) > 1)
            same = [number for number in self.category_ids if names[number] == name]
            fail(f"categories {', '.join(map(str, same))} are all called {name!r}; give each a name of its own")
        files = _by_id(images, "images", "file_name", str, fail)
        self.image_ids = tuple(files)
        paths = list(files.values())
        for position, reason in shorten_paths(paths):
            fail(f"image {self.image_ids[position]}: file_name {paths[position]!r} {reason}")
        first: dict[str, int] = {}
        for number, path in zip(self.image_ids, paths, strict=True):
            if first.setdefault(path, number) != number:
                fail(f"images {first[path]} and {number} have the same file_name {path!r}; keep one")
        self.reference_paths = _reference_paths(images, fail)
        self._groups = CompactStrings([str(image.get("group_id", "")) for image in images])
        entries = _without_repeats(entries, self.annotation_path)
        places = {number: place for place, number in enumerate(self.image_ids)}
        labels = {number: label for label, number in enumerate(self.category_ids)}
        for entry in entries:
            if entry.get("image_id") not in places:
                fail(f"annotation {_id_of(entry)}: image_id {entry.get('image_id')!r} is none of the images")
            if entry.get("category_id") not in labels:
                fail(
                    f"annotation {_id_of(entry)} (image {entry['image_id']}): category_id {entry.get('category_id')!r} "
                    f"is none of the categories; there are {', '.join(map(str, self.category_ids[:20]))}"
                )
        table = BoxTable.build(
            [_read_box(entry, fail) for entry in entries],
            [labels[entry["category_id"]] for entry in entries],
            [places[entry["image_id"]] for entry in entries],
            len(images),
            source=self.annotation_path,
            where=lambda position: f"annotation {_id_of(entries[position])} (image {entries[position]['image_id']})",
            crowd=[bool(entry.get("iscrowd", 0)) for entry in entries],
            sizes=[_size_of(image, fail) for image in images],
        )
        super().__init__(_find_images(self.root, self.split, paths), paths, classes, table, **transforms)

    def get_group_ids(self) -> list[str]:
        """``group_id`` of every image; the path of the image where it has none."""
        return [group or path for group, path in zip(self._groups, self.get_image_paths(), strict=True)]

    def get_reference_path(self, index: int) -> Path | None:
        """Path of the image to compare with, as ``reference`` names it; None where the image has none."""
        path = "" if self.reference_paths is None else self.reference_paths[index]
        if not path:
            return None
        folders = self.root, self.image_folder
        return next((file for folder in folders if (file := find_file(folder / path)).is_file()), self.root / path)


def _find_annotations(root: Path, split: Split, name: str | None) -> Path:
    folder = root / "annotations"
    if not folder.is_dir():
        raise FileNotFoundError(f"{root} has no folder annotations/ with {_FILES[0].format(split=split)}")
    names = [pattern.format(split=split) for pattern in _FILES] if name is None else [name]
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        found = ", ".join(sorted(other.name for other in folder.glob("*.json"))[:10]) or "no .json"
        raise FileNotFoundError(
            f"{folder} has no {' or '.join(names)}; it has {found} (another name goes into annotations=)"
        )
    return path


def _find_images(root: Path, split: Split, paths: Sequence[str]) -> Path:
    """The folder in which most of some images lie."""
    folders = [root / pattern.format(split=split) for pattern in _FOLDERS]
    places = np.unique(np.linspace(0, len(paths) - 1, min(len(paths), _LOOKED_FOR)).astype(int)).tolist()
    found: Counter[Path] = Counter()
    for folder in filter(Path.is_dir, folders):
        found[folder] = sum(find_file(folder / paths[place]).is_file() for place in places)
    if not found or not max(found.values()):
        raise FileNotFoundError(
            f"none of {len(places)} images, such as {paths[0]!r}, lies in {', '.join(map(str, found)) or root}"
        )
    return found.most_common(1)[0][0]


def _sections(content: Any, fail: Fail) -> tuple[list[dict[str, Any]], ...]:
    """Images, annotations and categories, all of them objects."""
    if isinstance(content, dict) and "data_list" in content:
        fail("has the rows of a grouped set (data_list); open it by GroupedJSON")
    keys = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in keys):
        fail("must be an object with the lists images, annotations and categories")
    for key in keys:
        for place, entry in enumerate(content[key]):
            if not isinstance(entry, dict):
                fail(f"{key}[{place}] must be an object, found {entry!r:.80}")
        if not content[key] and key != "annotations":
            fail(f"{key!r} is empty")
    return tuple(content[key] for key in keys)


def _by_id(entries: list[dict[str, Any]], section: str, key: str, kind: type, fail: Fail) -> dict[int, Any]:
    """Values of a key by the id of their entry."""
    found: dict[int, Any] = {}
    for place, entry in enumerate(entries):
        number, value = entry.get("id"), entry.get(key)
        if not isinstance(number, int) or isinstance(number, bool):
            fail(f"{section}[{place}]: 'id' must be a whole number, found {number!r:.80}")
        if not isinstance(value, kind) or not value:
            fail(f"{section}[{place}] (id {number}): {key!r} must be text, found {value!r:.80}")
        if number in found:
            fail(f"{section}: the id {number} is given twice, to {found[number]!r} and {value!r}")
        found[number] = value
    return found


def _without_repeats(entries: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """Annotations, those that are repeated word by word once; ids alone may be repeated."""
    first: dict[object, dict[str, Any]] = {}
    kept, again = [], []
    for entry in entries:
        number = entry.get("id")
        if number is None or (other := first.setdefault(number, entry)) is entry:
            kept.append(entry)
            continue
        again.append(number)
        if other != entry:
            kept.append(entry)
    if again:
        logger.warning(
            "%s: %d annotations have the id of another one, such as %s; %d are the same word by word and count once, "
            "the others count as boxes of their own",
            path, len(again), again[0], len(entries) - len(kept),
        )  # fmt: skip
    return kept


def _reference_paths(images: list[dict[str, Any]], fail: Fail) -> CompactStrings | None:
    paths = [image.get("reference") or "" for image in images]
    if not any(paths):
        return None
    for image, path in zip(images, paths, strict=True):
        if not isinstance(path, str):
            fail(f"image {image['id']}: 'reference' must be text, found {path!r:.80}")
    given = [place for place, path in enumerate(paths) if path]
    shortened = [paths[place] for place in given]
    for position, reason in shorten_paths(shortened):
        fail(f"image {images[given[position]]['id']}: reference {shortened[position]!r} {reason}")
    for place, path in zip(given, shortened, strict=True):
        paths[place] = path
    return CompactStrings(paths)


def _size_of(image: Mapping[str, Any], fail: Fail) -> tuple[int, int]:
    """Height and width; 0 where the file does not say."""
    size = tuple(image.get(key) or 0 for key in ("height", "width"))
    if not all(isinstance(side, int | float) and side >= 0 and side == int(side) for side in size):
        fail(f"image {image['id']}: width and height must be whole numbers, found {size[1]!r:.40} and {size[0]!r:.40}")
    return int(size[0]), int(size[1])


def _read_box(entry: Mapping[str, Any], fail: Fail) -> tuple[float, float, float, float]:
    """Corners of the box of an annotation, from its segmentation where it has none."""
    where = f"annotation {_id_of(entry)} (image {entry['image_id']})"
    box: Any = entry.get("bbox")
    segmentation = entry.get("segmentation")
    if box is None and segmentation:
        try:
            box = _box_of_segmentation(segmentation)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            fail(f"{where}: has no bbox, and its segmentation is neither polygons nor RLE ({error})")
    if not four_numbers(box):
        fail(f"{where}: 'bbox' must be the numbers [x, y, width, height], found {box!r:.80}")
    left, top, width, height = box
    return left, top, left + width, top + height


def _box_of_segmentation(segmentation: Any) -> list[float]:
    """Left, top, width and height of polygons ``[[x, y, x, y, …], …]`` or of an RLE, compressed or not."""
    if isinstance(segmentation, list):
        points = np.concatenate([np.asarray(polygon, dtype=np.float64).reshape(-1, 2) for polygon in segmentation])
        low, high = points.min(axis=0), points.max(axis=0)
        return [*low.tolist(), *(high - low).tolist()]
    from faster_coco_eval.core import mask as coco_mask  # only sets with RLE and no boxes need it

    height, width = segmentation["size"]
    if isinstance(segmentation["counts"], list):
        segmentation = coco_mask.frPyObjects(segmentation, height, width)
    box: list[float] = coco_mask.toBbox(segmentation).tolist()
    return box


def _id_of(entry: Mapping[str, Any]) -> object:
    return entry.get("id", "without an id")
