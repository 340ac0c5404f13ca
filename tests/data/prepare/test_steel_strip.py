"""NEU and X-SDD as grouped sets, from made-up sources in their form."""

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2.data.datasets import GroupedJSON
from dinov2.data.prepare.steel_strip import NEU_CLASSES, X_SDD_CLASSES, prepare_neu, prepare_x_sdd

SPLITS = ("train", "val", "test")
OBJECT = (
    "\t<object>\n\t\t<name>{}</name>\n\t\t<pose>Unspecified</pose>\n\t\t<truncated>1</truncated>\n"
    "\t\t<difficult>0</difficult>\n\t\t<bndbox>\n\t\t\t<xmin>{}</xmin>\n\t\t\t<ymin>{}</ymin>\n"
    "\t\t\t<xmax>{}</xmax>\n\t\t\t<ymax>{}</ymax>\n\t\t</bndbox>\n\t</object>\n"
)
BOX = OBJECT.format("patches", 1, 0, 16, 12)
ONE = "ANNOTATIONS/crazing_1.xml"
BOMB = '<!DOCTYPE a [<!ENTITY b "bbbb"><!ENTITY c "&b;&b;">]>'


def annotation(objects: str, head: str = "") -> str:
    size = "<size>\n\t\t<width>16</width>\n\t\t<height>12</height>\n\t\t<depth>1</depth>\n\t</size>"
    return (
        f"{head}<annotation>\n\t<folder>cr</folder>\n\t<filename>crazing_1.jpg</filename>\n\t<source>\n"
        f"\t\t<database>NEU-DET</database>\n\t</source>\n\t{size}\n\t<segmented>0</segmented>\n{objects}</annotation>\n"
    )


def draw(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 16), dtype=np.uint8)).save(path)


@pytest.fixture
def neu(tmp_path: Path) -> Path:
    """Five images of each class; the first has a box of its own class and one of another."""
    root = tmp_path / "NEU-DET"
    (root / "ANNOTATIONS").mkdir(parents=True)
    for label, name in enumerate(NEU_CLASSES):
        for number in range(1, 6):
            draw(root / "IMAGES" / f"{name}_{number}.jpg", 10 * label + number)
            box = OBJECT.format(name, 2, 3, 9, 11)
            text = annotation(box + BOX * (number == 1))
            (root / "ANNOTATIONS" / f"{name}_{number}.xml").write_text(text, encoding="utf-8")
    return root


@pytest.fixture
def x_sdd(tmp_path: Path) -> Path:
    """Five images of each class, in folders that are named as people do."""
    root = tmp_path / "X-SDD"
    for label, name in enumerate(X_SDD_CLASSES):
        folder = name.replace("_", " ").capitalize() if label % 2 else name
        for number in range(5):
            draw(root / folder / f"{number}{'.jpg' if number % 2 else '.png'}", 10 * label + number)
        (root / folder / "Thumbs.db").touch()
    return root


def rows_of(root: Path) -> dict[str, list[dict[str, object]]]:
    sets = {split: GroupedJSON(root, split) for split in SPLITS}
    return {split: [found.get_annotation(row) for row in range(len(found))] for split, found in sets.items()}


def test_neu_has_boxes_and_every_split_its_share_of_each_class(neu: Path, tmp_path: Path) -> None:
    prepare_neu(neu, tmp_path / "set")
    rows = rows_of(tmp_path / "set")
    for split, share in zip(SPLITS, (3, 1, 1), strict=True):
        assert Counter(row["gt_label"] for row in rows[split]) == dict.fromkeys(range(6), share)
        assert GroupedJSON(tmp_path / "set", split).classes == NEU_CLASSES
        for row in rows[split]:
            name, number = str(row["group_id"]).rsplit("_", 1)
            assert row["img_path"] == f"{split}/{name}_{number}.jpg"
            assert NEU_CLASSES[row["gt_label"]] == name
            boxes = [{"bbox": [2, 3, 9, 11], "label": row["gt_label"]}, {"bbox": [1, 0, 16, 12], "label": 2}]
            assert row["boxes"] == boxes[: 2 if number == "1" else 1]
            source = neu / "IMAGES" / f"{name}_{number}.jpg"
            assert (tmp_path / "set" / row["img_path"]).read_bytes() == source.read_bytes()


def test_x_sdd_is_labelled_by_its_folders(x_sdd: Path, tmp_path: Path) -> None:
    prepare_x_sdd(x_sdd, tmp_path / "set")
    rows = rows_of(tmp_path / "set")
    for split, share in zip(SPLITS, (3, 1, 1), strict=True):
        assert Counter(row["gt_label"] for row in rows[split]) == dict.fromkeys(range(7), share)
        for row in rows[split]:
            name = X_SDD_CLASSES[row["gt_label"]]
            assert row["img_path"].startswith(f"{split}/{name}/")
            assert row["group_id"] == f"{name}-{Path(row['img_path']).stem}"


def test_the_seed_decides_and_equal_files_stay_together(neu: Path, tmp_path: Path) -> None:
    for number in range(1, 6):
        copy = neu / "IMAGES" / f"scratches_{number}.jpg"
        copy.write_bytes((neu / "IMAGES" / f"inclusion_{number}.jpg").read_bytes())
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare_neu(neu, tmp_path / name, seed)
    a, b, c = ((tmp_path / name / "annotations" / "train.json").read_bytes() for name in "abc")
    assert a == b != c
    places: dict[bytes, set[str]] = {}
    for split, rows in rows_of(tmp_path / "a").items():
        for row in rows:
            places.setdefault((tmp_path / "a" / row["img_path"]).read_bytes(), set()).add(split)
    assert len(places) == 25
    assert all(len(splits) == 1 for splits in places.values())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / ONE).unlink(), r"IMAGES/crazing_1\.jpg has no annotation .*/crazing_1\.xml; take"),
        (
            lambda root: draw(root / "IMAGES/rust_1.jpg", 0),
            r"rust_1\.jpg: is not named class_number\.jpg with .*crazing",
        ),
        (lambda root: draw(root / "IMAGES/crazing.png", 0), r"crazing\.png: is not named class_number\.jpg"),
        (
            annotation(BOX.replace("patches", "rust")),
            "crazing_1.xml: .*unknown class 'rust'; the classes are crazing,",
        ),
        (annotation(BOX)[:-20], r"crazing_1\.xml: is no annotation of NEU \(.*line \d+, column \d+\)"),
        (annotation(BOX.replace("16", "17")), r"the box \[1, 0, 17, 12\] does not lie in the image of 16x12 pixels"),
        (annotation(BOX.replace("<ymax>12</ymax>", "")), r"crazing_1\.xml: .*object has no whole number bndbox/ymax"),
        (annotation(BOX.replace("patches", "&c;"), BOMB), r"crazing_1\.xml: .*it declares a document type"),
        (
            annotation(BOX, '<!DOCTYPE annotation SYSTEM "file:///etc/hostname">'),
            r"crazing_1\.xml: .*it declares a document type",
        ),
        (lambda root: (root / "ANNOTATIONS").rename(root / "xml"), "ANNOTATIONS is missing; .* must be the NEU set"),
    ],
)
def test_what_is_wrong_with_neu_is_named(
    neu: Path, tmp_path: Path, damage: str | Callable[[Path], object], message: str
) -> None:
    if callable(damage):
        damage(neu)
    else:
        (neu / ONE).write_text(damage, encoding="utf-8")
    with pytest.raises((OSError, ValueError), match=message):
        prepare_neu(neu, tmp_path / "set")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: draw(root / "rust/1.jpg", 0), "X-SDD/rust: is not named by one of the classes finishing_roll"),
        (
            lambda root: (root / "red_iron").rename(root / ".red"),
            "red_iron is missing; .* a folder of images per class",
        ),
        (lambda root: draw(root / "Red-iron/1.jpg", 0), "are the same class"),
        (lambda root: [path.unlink() for path in (root / "red_iron").iterdir()], "red_iron holds no images"),
        (lambda root: root.rename(root.parent / "moved"), "X-SDD is not a folder"),
    ],
)
def test_what_is_wrong_with_x_sdd_is_named(
    x_sdd: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(x_sdd)
    with pytest.raises((OSError, ValueError), match=message):
        prepare_x_sdd(x_sdd, tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_the_doors_write_the_sets(neu: Path, x_sdd: Path, repository: Path) -> None:
    for name, source in (("neu", neu), ("x_sdd", x_sdd)):
        tool, output = repository / "tools" / f"prepare_{name}.py", source.parent / name
        words = [sys.executable, tool, "--source", source, "--output", output, "--fractions", "0.4", "0.4", "0.2"]
        result = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=True)
        assert result.stdout.split()[:4] == [
            "split",
            "images",
            "groups",
            (NEU_CLASSES if name == "neu" else X_SDD_CLASSES)[0],
        ]
        assert {path.stem for path in (output / "annotations").iterdir()} == set(SPLITS)
