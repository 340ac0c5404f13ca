"""Defects of hot-rolled steel strip as grouped sets: NEU with boxes, X-SDD by folders."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from xml.etree import ElementTree

from dinov2.data.datasets.base import DEFAULT_FRACTIONS, Split, check_fractions, split_groups
from dinov2.data.datasets.voc_detection import parse_xml
from dinov2.data.decoding import readable_endings
from dinov2.data.prepare.grouped_json_writer import GroupedItem, write_grouped_set

NEU_CLASSES = ("crazing", "inclusion", "patches", "pitted_surface", "rolled-in_scale", "scratches")
X_SDD_CLASSES = (
    "finishing_roll_printing",
    "iron_sheet_ash",
    "oxide_scale_of_plate_system",
    "oxide_scale_of_temperature_system",
    "red_iron",
    "slag_inclusion",
    "surface_scratch",
)

_NEU_NAME = re.compile(r"(.+)_\d+")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True)
class _Found:
    """An image of the source: its path below a split, its name, its class, and further keys of its row."""

    path: Path
    target: str
    name: str
    label: int
    extras: dict[str, list[dict[str, object]]]


def prepare_neu(
    source: str | Path, output: str | Path, seed: int = 0, fractions: Sequence[float] = DEFAULT_FRACTIONS
) -> None:
    """Writes the NEU surface defects as ``output/<split>/crazing_1.jpg`` with annotations.

    Every image is a group of its own, but files of equal content are one. Rows hold ``boxes``: corners ``[x1, y1, x2,
    y2]`` in pixels as the files have them, and the class of each, which may differ from the image's. Doing it again
    changes nothing.

    Args:
        source: folder that holds ``IMAGES/crazing_1.jpg`` and ``ANNOTATIONS/crazing_1.xml`` (as of Pascal VOC).
        output: new or empty folder.
        seed: draws the splits, which hold equal shares of each class.
        fractions: shares of train, val and test.

    Raises:
        FileNotFoundError: when a folder or an annotation is missing.
        ValueError: for an unknown class, a broken annotation, bad fractions, or an ``output`` that holds anything else.

    Reference:
        Song, Yan, A noise robust method based on completed local binary patterns for hot-rolled steel strip surface
        defects, Applied Surface Science 285 (2013); He, Song, Meng, Yan, An end-to-end steel surface defect detection
        approach, IEEE Transactions on Instrumentation and Measurement 69 (2020).
    """
    _write(output, _find_neu(Path(source)), NEU_CLASSES, "prepare_neu", seed, fractions)


def prepare_x_sdd(
    source: str | Path, output: str | Path, seed: int = 0, fractions: Sequence[float] = DEFAULT_FRACTIONS
) -> None:
    """Writes X-SDD as ``output/<split>/red_iron/1.jpg`` with annotations.

    Every image is a group of its own, but files of equal content are one. Doing it again changes nothing.

    Args:
        source: folder that holds one folder of images per class; words in their names may be divided by spaces, hyphens
            or underscores.
        output: new or empty folder.
        seed: draws the splits, which hold equal shares of each class.
        fractions: shares of train, val and test.

    Raises:
        FileNotFoundError: when a folder is missing.
        ValueError: for a folder of an unknown class or without images, bad fractions, or an ``output`` that holds
            anything else.

    Reference:
        Feng, Gao, Luo, X-SDD: a new benchmark for hot rolled steel strip surface defects detection, Symmetry 13 (2021).
    """
    _write(output, _find_x_sdd(Path(source)), X_SDD_CLASSES, "prepare_x_sdd", seed, fractions)


def _write(
    output: str | Path,
    images: Sequence[_Found],
    classes: Sequence[str],
    tool: str,
    seed: int,
    fractions: Sequence[float],
) -> None:
    fractions = check_fractions(fractions)
    first: dict[bytes, str] = {}  # one picture under two names must not lie in two splits
    groups = [first.setdefault(sha256(image.path.read_bytes()).digest(), image.name) for image in images]
    splits = split_groups(groups, [classes[image.label] for image in images], fractions, seed).tolist()

    def items() -> Iterator[tuple[Split, GroupedItem]]:
        for image, group, number in zip(images, groups, splits, strict=True):
            split = list(Split)[number]
            target = f"{split}/{image.target}"
            row = {"img_path": target, "gt_label": image.label, "group_id": group, **image.extras}
            yield split, GroupedItem(row, {target: image.path})

    settings = {"seed": seed, "fractions": fractions}
    write_grouped_set(output, items(), metainfo={"classes": list(classes)}, tool=tool, settings=settings)


def _find_neu(source: Path) -> list[_Found]:
    folders = source / "IMAGES", source / "ANNOTATIONS"
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is missing; {source} must be the NEU set, with IMAGES/ and ANNOTATIONS/")
    found = []
    for path in _images_of(folders[0]):
        match = _NEU_NAME.fullmatch(path.stem)
        if match is None or match[1] not in NEU_CLASSES:
            raise ValueError(f"{path}: is not named class_number.jpg with one of the classes {', '.join(NEU_CLASSES)}")
        boxes = _read_boxes(folders[1] / f"{path.stem}.xml", path)
        found.append(_Found(path, path.name, path.stem, NEU_CLASSES.index(match[1]), {"boxes": boxes}))
    return found


def _find_x_sdd(source: Path) -> list[_Found]:
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not a folder")
    folders: dict[str, Path] = {}
    for folder in sorted(path for path in source.iterdir() if path.is_dir() and not path.name.startswith(".")):
        name = re.sub(r"[\s_-]+", "_", folder.name.casefold())
        if name not in X_SDD_CLASSES:
            raise ValueError(f"{folder}: is not named by one of the classes {', '.join(X_SDD_CLASSES)}")
        if name in folders:
            raise ValueError(f"{folder} and {folders[name]} are the same class")
        folders[name] = folder
    if missing := [name for name in X_SDD_CLASSES if name not in folders]:
        raise FileNotFoundError(f"{source / missing[0]} is missing; {source} must hold a folder of images per class")
    return [
        _Found(path, f"{name}/{path.name}", f"{name}-{path.stem}", label, {})
        for label, name in enumerate(X_SDD_CLASSES)
        for path in _images_of(folders[name])
    ]


def _images_of(folder: Path) -> list[Path]:
    """The images in a folder, in an order that does not depend on the disk.

    Raises:
        ValueError: when there are none.
    """
    images = [path for path in folder.iterdir() if path.suffix.lower() in readable_endings()]
    images = sorted(path for path in images if not path.name.startswith("."))
    if not images:
        raise ValueError(f"{folder} holds no images")
    return images


def _read_boxes(path: Path, image: Path) -> list[dict[str, object]]:
    """Corners and classes of the defects in an annotation of Pascal VOC."""
    if not path.is_file():
        raise FileNotFoundError(f"{image} has no annotation {path}; take the image out to do without it")
    try:
        root = parse_xml(path.read_bytes())
        width, height = (_number(root, f"size/{side}") for side in ("width", "height"))
        return [_read_box(entry, width, height) for entry in root.iter("object")]
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise ValueError(f"{path}: is no annotation of NEU ({error})") from None


def _read_box(entry: ElementTree.Element, width: int, height: int) -> dict[str, object]:
    name = entry.findtext("name", "").strip()
    if name not in NEU_CLASSES:
        raise ValueError(f"unknown class {name!r}; the classes are {', '.join(NEU_CLASSES)}")
    x1, y1, x2, y2 = corners = [_number(entry, f"bndbox/{corner}") for corner in _CORNERS]
    if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
        raise ValueError(f"the box {corners} does not lie in the image of {width}x{height} pixels")
    return {"bbox": corners, "label": NEU_CLASSES.index(name)}


def _number(element: ElementTree.Element, path: str) -> int:
    text = element.findtext(path, "").strip()
    if not text.isdecimal():
        raise ValueError(f"its {element.tag} has no whole number {path}")
    return int(text)
