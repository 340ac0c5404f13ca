"""Boxes as YOLO describes them: one text file per image, in shares of its size."""

import logging
from pathlib import Path
from typing import Any, Unpack

import yaml

from dinov2.data.datasets.base import Transforms
from dinov2.data.datasets.boxes import BoxTable, ListedBoxes
from dinov2.data.datasets.scan import find_split_folder, read_text_list, require_images, stem_of
from dinov2.data.reading import find_file

logger = logging.getLogger("dinov2")

_YAML_FILES = ("data.yaml", "data.yml", "dataset.yaml")
_TEXT_FILES = ("classes.txt", "labels/classes.txt")
_MOST = 2.0  # a share beyond this is a number of pixels


class YOLODetection(ListedBoxes):
    """Images ``root/images/<split>/a.jpg`` with boxes in ``root/labels/<split>/a.txt``, as Ultralytics lays them out.

    ``root/<split>/images`` and ``root/<split>/labels`` are read too. A line is ``class cx cy w h``, middle and size as
    shares of the image's width and height, or ``class x y x y x y …``, a polygon, whose box is taken. An image without
    a file, or with an empty one, shows nothing. Classes are the ``names`` of ``data.yaml`` or the lines of
    ``classes.txt``. Images in folders of their own (``images/<split>/part_1/…``) form groups named by them.

    Attributes:
        label_folder: folder of the split's text files.
    """

    def __init__(self, root: str | Path, split: str, **transforms: Unpack[Transforms]) -> None:
        """Lists the images and reads all boxes; images are not opened.

        Args:
            root: folder of the set.
            split: name of a folder (``TRAIN``, ``VAL``, ``valid``), in any case.
            **transforms: see `ImageDataset`.

        Raises:
            FileNotFoundError: when a folder, the names of classes, or every text file is missing.
            ValueError: for what is wrong in a file, naming it and the line.
        """
        self.root = find_file(Path(root))
        image_folder, self.label_folder = _find_folders(self.root, split)
        classes, named_by = _read_classes(self.root)
        paths = require_images(image_folder)
        boxes, labels, images, lines = [], [], [], []
        missing = []
        for place, path in enumerate(paths):
            file = find_file(self.label_folder / f"{stem_of(path)}.txt")
            if not file.is_file():
                missing.append(path)
                continue
            for number, line in enumerate(_read_lines(file), start=1):
                if not (words := line.split()):
                    continue
                label, box = _read_line(words, f"{file}, line {number}")
                if label >= len(classes):
                    raise ValueError(
                        f"{file}, line {number}: class {label} is outside the {len(classes)} classes of {named_by}"
                    )
                boxes.append(box)
                labels.append(label)
                images.append(place)
                lines.append(number)
        if len(missing) == len(paths):
            raise FileNotFoundError(
                f"{self.label_folder} has a .txt for none of the {len(paths)} images, such as {paths[0]}"
            )
        if missing:
            logger.info(
                "%s: %d of %d images have no .txt and count as images without objects, such as %s",
                self.label_folder, len(missing), len(paths), missing[0],
            )  # fmt: skip
        table = BoxTable.build(
            boxes,
            labels,
            images,
            len(paths),
            source=self.label_folder,
            where=lambda position: f"{stem_of(paths[images[position]])}.txt, line {lines[position]}",
            are_shares=True,
        )
        super().__init__(image_folder, paths, classes, table, **transforms)

    def get_group_ids(self) -> list[str]:
        """The folder of each image, or its own path where it lies right in the split's folder."""
        return [path.rpartition("/")[0] or path for path in self._paths]


def _find_folders(root: Path, split: str) -> tuple[Path, Path]:
    """Folders of images and of text files."""
    if (root / "images").is_dir():
        images = find_split_folder(root / "images", split)
        return images, root / "labels" / images.name
    if not root.is_dir():
        raise FileNotFoundError(f"root {str(root)!r} is not a folder; give the folder that holds images/ and labels/")
    folder = find_split_folder(root, split)
    if not (folder / "images").is_dir():
        raise FileNotFoundError(f"{root} holds neither images/{folder.name} nor {folder.name}/images")
    return folder / "images", folder / "labels"


def _read_classes(root: Path) -> tuple[tuple[str, ...], Path]:
    """Names of the classes and the file that gives them."""
    for path in (root / name for name in _YAML_FILES if (root / name).is_file()):
        try:
            content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: is no YAML ({error})") from None
        names = content.get("names") if isinstance(content, dict) else None
        if isinstance(names, dict):
            if sorted(names) != list(range(len(names))):
                raise ValueError(f"{path}: names must count from 0 without a gap, found {sorted(names)[:20]}")
            names = [names[number] for number in range(len(names))]
        if not isinstance(names, list) or not names:
            raise ValueError(f"{path}: names must list the classes, found {names!r:.80}")
        return _distinct([str(name) for name in names], path), path
    for path in (root / name for name in _TEXT_FILES if (root / name).is_file()):
        return _distinct(read_text_list(path)[0], path), path
    raise FileNotFoundError(f"{root} has no data.yaml (with names) or classes.txt that names the classes")


def _distinct(names: list[str], path: Path) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: names {next(name for name in names if names.count(name) > 1)!r} twice")
    return tuple(names)


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at position {error.start}") from None


def _read_line(words: list[str], where: str) -> tuple[int, tuple[float, float, float, float]]:
    """Class and corners, as shares."""
    try:
        label, numbers = int(words[0]), [float(word) for word in words[1:]]
    except ValueError:
        label, numbers = -1, []
    if label < 0 or not (len(numbers) == 4 or (len(numbers) >= 6 and len(numbers) % 2 == 0)):
        raise ValueError(f"{where}: must be 'class cx cy w h', or a class and a polygon, found {' '.join(words)!r:.80}")
    if max(map(abs, numbers)) > _MOST:
        raise ValueError(
            f"{where}: numbers must be shares of the image's width and height, found {max(numbers, key=abs):g}: are "
            "they pixels?"
        )
    if len(numbers) == 4:
        x, y, width, height = numbers
        return label, (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    return label, (min(numbers[::2]), min(numbers[1::2]), max(numbers[::2]), max(numbers[1::2]))
