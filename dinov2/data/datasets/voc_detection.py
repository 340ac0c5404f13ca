"""Boxes as Pascal VOC describes them: one XML file per image."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Unpack
from xml.etree import ElementTree

from dinov2.data.datasets.base import Transforms
from dinov2.data.datasets.boxes import BoxTable, ListedBoxes
from dinov2.data.datasets.scan import find_text_list, read_text_list, shorten_paths
from dinov2.data.datasets.voc_segmentation import CLASSES, find_year, with_endings

logger = logging.getLogger("dinov2")

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


class VOCDetection(ListedBoxes):
    """Images with boxes, ``Annotations/<name>.xml``, for the names that ``ImageSets/Main/<split>.txt`` lists.

    Images are ``JPEGImages/<name>.jpg``; where a file has another ending, it is found by its name. The classes are the
    lines of ``classes.txt`` in the same folder; without it, the twenty of VOC where the set names no others, or else
    all names in ``Annotations``, sorted.

    Attributes:
        root: folder that holds ``Annotations``.
        list_path: the file that lists the split.

    Reference: Everingham et al., The Pascal visual object classes (VOC) challenge, IJCV 88 (2010).
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        year: int = 2012,
        one_based: bool = True,
        keep_difficult: bool = False,
        **transforms: Unpack[Transforms],
    ) -> None:
        """Reads the list of a split and its annotations; images are not opened.

        Args:
            root: folder that holds ``Annotations``, or ``VOCdevkit``, or ``VOC2012`` in it.
            split: ``TRAIN``, ``VAL``, ``TRAINVAL`` or ``TEST``, in any case.
            year: of the challenge, where there are folders of several.
            one_based: whether the first pixel is 1 and the last is in the box, as in VOC; not so in the files of some
                tools.
            keep_difficult: whether objects marked as difficult are ordinary ones; by default they are ignored, as
                crowds of COCO are.
            **transforms: see `ImageDataset`.

        Raises:
            FileNotFoundError: when the set, the list or an annotation is not there.
            ValueError: for what is wrong in the list or in an annotation, naming the file.
        """
        self.root = find_year(Path(root), f"VOC{year}", "Annotations")
        self.split = split.strip().lower()
        self.list_path = find_text_list(self.root / "ImageSets" / "Main", f"{self.split}.txt")
        names, numbers = read_text_list(self.list_path)
        for position, reason in shorten_paths(names):
            raise ValueError(f"{self.list_path}, line {numbers[position]}: name {names[position]!r} {reason}")
        first: dict[str, int] = {}
        for name, number in zip(names, numbers, strict=True):
            if first.setdefault(name, number) != number:
                raise ValueError(f"{self.list_path}, line {number}: {name!r} is already in line {first[name]}")
        files = [self.root / "Annotations" / f"{name}.xml" for name in names]
        missing = [path for path in files if not path.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{missing[0]} is missing, though {self.list_path} lists it ({len(missing)} of {len(files)} are); an "
                "image without objects has an annotation without <object>"
            )
        roots = [_read_xml(path) for path in files]
        found = [(place, entry) for place, root in enumerate(roots) for entry in root.iter("object")]
        class_names = [_name_of(entry, files[place]) for place, entry in found]
        classes = self._find_classes(set(class_names))
        difficult = [entry.findtext("difficult", "0").strip() == "1" for _, entry in found]
        if any(difficult) and not keep_difficult:
            logger.info(
                "%s: %d of %d objects are marked as difficult and ignored (keep_difficult=true takes them)",
                self.list_path, sum(difficult), len(difficult),
            )  # fmt: skip
        table = BoxTable.build(
            [_read_box(entry, files[place], one_based) for place, entry in found],
            [self._label_of(name, classes, files[place]) for name, (place, _) in zip(class_names, found, strict=True)],
            [place for place, _ in found],
            len(files),
            source=self.list_path,
            where=lambda position: f"{files[found[position][0]].name}, a {class_names[position]}",
            crowd=None if keep_difficult else difficult,
            sizes=[_size_of(root) for root in roots],
        )
        images = with_endings(self.root / "JPEGImages", names, ".jpg")
        super().__init__(self.root / "JPEGImages", images, classes, table, **transforms)

    def _find_classes(self, found: set[str]) -> tuple[str, ...]:
        path = self.root / "classes.txt"
        if path.is_file():
            return tuple(dict.fromkeys(read_text_list(path)[0]))
        usual = CLASSES[1:]
        if found <= set(usual):
            return usual
        return tuple(sorted(found.union(_all_names(self.root / "Annotations"))))

    def _label_of(self, name: str, classes: tuple[str, ...], path: Path) -> int:
        if name not in classes:
            raise ValueError(f"{path}: the class {name!r} is not in {self.root / 'classes.txt'}: {', '.join(classes)}")
        return classes.index(name)


class _NoDocumentType(ElementTree.TreeBuilder):
    """Refuses a document type, and with it entities, which could name other files or grow without bound."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("it declares a document type, which these annotations have no use for")


def parse_xml(data: bytes) -> ElementTree.Element:
    """The root of an annotation.

    Raises:
        ElementTree.ParseError, LookupError: it is no XML, or of an unknown encoding.
        ValueError: it declares a document type.
    """
    return ElementTree.fromstring(data, ElementTree.XMLParser(target=_NoDocumentType()))


def _read_xml(path: Path) -> ElementTree.Element:
    try:
        return parse_xml(path.read_bytes())
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise ValueError(f"{path}: is no annotation of Pascal VOC ({error})") from None


def _name_of(entry: ElementTree.Element, path: Path) -> str:
    name = entry.findtext("name", "").strip()
    if not name:
        raise ValueError(f"{path}: an object has no name")
    return name


def _all_names(folder: Path) -> Iterator[str]:
    """Classes in all annotations, so that every split of a set knows the same."""
    for path in sorted(folder.glob("*.xml")):
        for entry in _read_xml(path).iter("object"):
            yield _name_of(entry, path)


def _read_box(entry: ElementTree.Element, path: Path, one_based: bool) -> list[float]:
    texts = {corner: entry.findtext(f"bndbox/{corner}", "").strip() for corner in _CORNERS}
    try:
        left, top, right, bottom = map(float, texts.values())
    except ValueError:
        found = ", ".join(f"{corner}={text!r}" for corner, text in texts.items())
        raise ValueError(f"{path}: the box of a {_name_of(entry, path)} must be four numbers, found {found}") from None
    # Tools that count from 0 write 0 where VOC begins with 1.
    return [max(left - 1, 0.0), max(top - 1, 0.0), right, bottom] if one_based else [left, top, right, bottom]


def _size_of(root: ElementTree.Element) -> tuple[int, int]:
    """Height and width; 0 where the annotation does not say."""
    height, width = (root.findtext(f"size/{side}", "").strip() for side in ("height", "width"))
    return (int(height), int(width)) if height.isdecimal() and width.isdecimal() else (0, 0)
