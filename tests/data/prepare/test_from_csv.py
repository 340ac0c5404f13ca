"""Tables of labels as people and spreadsheets write them become grouped sets, or are refused with the line."""

import errno
import json
import logging
import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dinov2.data.datasets import GroupedJSON
from dinov2.data.prepare.from_csv import main, prepare_csv, read_table

HEAD = "file,serial,result"


def add(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 3), number).save(folder / name)


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "labels.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def prepare(folder: Path, text: str | bytes, **options: Any) -> Path:
    options = {"image": "file", "part": "serial", "label": "result"} | options
    prepare_csv(write(folder, text), folder / "out", **options)
    return folder / "out"


def rows_of(root: Path, split: str = "train") -> list[dict[str, Any]]:
    content = json.loads((root / "annotations" / f"{split}.json").read_text(encoding="utf-8"))
    return sorted(content["data_list"], key=lambda row: row["img_path"])


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Twenty parts of three images, every fourth part defective in one of them."""
    add(tmp_path, *(f"photos/{part}_{view}.png" for part in range(20) for view in range(3)))
    lines = [
        f"photos/{part}_{view}.png,p{part},{'scratch' if part % 4 == 0 and view == 1 else 'ok'}"
        for part in range(20)
        for view in range(3)
    ]
    write(tmp_path, "\n".join([HEAD, *lines]))
    return tmp_path


def test_parts_stay_together_and_labels_are_spread(many: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = (many / "labels.csv").read_bytes()
    root = prepare(many, text)
    sets = {split: GroupedJSON(root, split) for split in ("train", "val", "test")}
    assert {split: len(found) for split, found in sets.items()} == {"train": 36, "val": 12, "test": 12}
    assert [int(found.get_targets().sum()) for found in sets.values()] == [3, 1, 1]
    assert all(found.classes == ("ok", "scratch") for found in sets.values())
    groups = [set(found.get_group_ids()) for found in sets.values()]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 20
    assert "5 of 20 parts have images of different labels" in caplog.text
    assert sets["train"].missing_files(sample=None) == []
    written = (root / "annotations" / "val.json").read_bytes()
    assert prepare(many, text) == root  # again: nothing changes
    prepare_csv(many / "labels.csv", many / "other", image="file", part="serial", label="result", seed=1)
    assert (root / "annotations" / "val.json").read_bytes() == written
    assert (many / "other" / "annotations" / "val.json").read_bytes() != written
    with pytest.raises(ValueError, match="give another folder, or delete this one"):
        prepare(many, text, seed=1)


def test_the_command(many: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(many / "labels.csv"), "--image", "file", "--part", "serial", "--label", "result", "--split", "80/20"]
    assert main([*words, "--output", str(many / "out"), "--seed", "3", "--hard-link"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split() for line in printed[:3]] == [
        ["split", "images", "groups", "ok", "scratch"],
        ["train", "48", "16", "44", "4"],
        ["val", "12", "4", "11", "1"],
    ]
    assert printed[-2] == "of the two classes, scratch counts as the defect (--classes gives another order)"
    assert printed[-1] == f"open it as GroupedJSON:split=TRAIN:root={many / 'out'}"
    image = GroupedJSON(many / "out", "val").get_image_path(0)
    assert os.path.samefile(image, many / "photos" / image.name)
    for split in ("60/20/10", "a/b", "100", "120/-20", "25/25/25/25"):
        with pytest.raises(ValueError, match="--split takes shares of train, val and test that add up to 100"):
            main([*words[:-1], split, "--output", str(many / "other")])


@pytest.mark.parametrize(
    "text",
    [
        "file;serial;result\r\na, b.png;p1;ok\r\nc.png;p2;bad\r\n;;\r\n",  # Excel in most of Europe
        '\ufefffile,serial,result\r\n"a, b.png",p1,ok\r\nc.png,p2,bad\r\n',
        "sep=;\r\nfile;serial;result;\r\na, b.png;p1;ok;\r\nc.png;p2;bad;\r\n",
        "file\tserial\tresult\n\na, b.png\tp1\tok\n  c.png \t p2 \t bad \n",
        'note,result,serial,file\n"two\nlines, quoted",ok,p1,"a, b.png"\n,bad,p2,./c.png',
        "file;serial;result\na, b.png;p1;ok\nc.png;p2;bad\n".encode("utf-16"),
        "file|serial|result\ra, b.png|p1|ok\rc.png|p2|bad",
    ],
)
def test_tables_as_programs_write_them(tmp_path: Path, text: str | bytes) -> None:
    add(tmp_path, "a, b.png", "c.png")
    root = prepare(tmp_path, text, fractions=(1, 0, 0))
    assert [(row["img_path"], row["group_id"], row["gt_label"]) for row in rows_of(root)] == [
        ("images/a, b.png", "p1", 0),
        ("images/c.png", "p2", 1),
    ]
    assert not (root / "annotations" / "val.json").exists()


def test_paths_are_absolute_or_relative_or_from_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    decomposed = unicodedata.normalize("NFD", "gr\u00f6\u00dfe.png")
    add(tmp_path, "home/a/1.png", "home/b/1.png", f"home/b/{decomposed}", "home/c.JPG")
    table = tmp_path / "home" / "b" / "labels.csv"
    table.write_text(
        f"file,result,mask_path,camera\n{tmp_path}/home/a/1.png,1,x,\n1.png,0,,left\ngr\u00f6\u00dfe.png,,,\n~/c.JPG,1,,\n"
        ".\\..\\a\\1.png,1,,\n",
        encoding="utf-8",
    )
    prepare_csv(table, tmp_path / "out", image="file", label="result", fractions=(1, 0, 0))
    rows = rows_of(tmp_path / "out")
    assert [row["img_path"] for row in rows] == [
        f"images/{name}" for name in ("a/1.png", "b/1.png", f"b/{decomposed}", "c.JPG")
    ]
    assert [row.get("gt_label") for row in rows] == [1, 0, None, 1]
    assert [row.get("camera") for row in rows] == [None, "left", None, None]
    assert not any("mask_path" in row for row in rows)
    for told in (
        "1 rows name an image that a row above names too",
        "1 of 4 images have no label",
        "no --part was given",
    ):
        assert told in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; its first line must name the columns"),
        ("Image,Serial,Result\na.png,p,ok", r"no column 'file' \(its columns are 'Image', 'Serial', 'Result'\)"),
        ("fiel,serial,result\na.png,p,ok", r"has no column 'file'; did you mean 'fiel'\?"),
        ("File;serial;result\na.png;p;ok", r"has no column 'file'; did you mean 'File'\?"),
        ("file,file,serial,result\na.png,b.png,p,ok", "has 2 columns 'file'"),
        (f"{HEAD}\n", "has no rows below its first line"),
        (f"{HEAD}\na.png,p,ok\nb,c.png,p,ok", "line 3: has 4 cells, the first line names 3 columns; put cells"),
        (f"{HEAD}\na.png,p", "line 2: has 2 cells"),
        (f'{HEAD}\n"a.png,p,ok\nb.png,p,ok', "line 2: not a table of text"),
        (f"{HEAD}\n,p,ok\n,p,ok", r"line 2: column 'file' is empty \(2 such rows in all\)"),
        (f"{HEAD}\n\na.png,,ok", "line 3: column 'serial' is empty"),
        (f"{HEAD}\na.png,p,Good\nb.png,q,good", "line 3: result 'good' is written 'Good' in line 2; write both alike"),
        (f"{HEAD}\na.png,p,1\nb.png,q,1.0", "result '1.0' is written '1' in line 2"),
        (f"{HEAD}\na.png,007,1\nb.png,7,1", "serial '7' is written '007' in line 2"),
        (f"{HEAD}\na.png,p,ok\n./a.png,p,bad", r"line 3: .*a\.png is already in line 2, with another part or label"),
        (f"{HEAD}\na.png,p,ok\na.png,q,ok", "line 3: .* with another part or label"),
        (f"{HEAD}\nnotes.txt,p,ok", r"notes\.txt is no image that can be read"),
        (b"file,serial,result\na.png,p,gr\xfcn", "line 2: is not UTF-8; save the table as 'CSV UTF-8'"),
        (b"PK\3\4....", "is a workbook; save the sheet as"),
        (b"file\0", "null character"),
    ],
)  # fmt: skip
def test_wrong_tables_name_the_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    add(tmp_path, "a.png", "b.png")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path, text)
    assert not (tmp_path / "out").exists()


def test_missing_images_are_named_or_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    add(tmp_path, "a.png", "b.JPG")
    text = f"{HEAD}\na.png,p,ok\nb.jpg,q,bad\nz/c.png,r,bad"
    message = r"line 3: no image at .*b\.jpg \(the folder has b\.JPG\) \(2 such rows in all\); relative paths"
    with pytest.raises(FileNotFoundError, match=message):
        prepare(tmp_path, text)
    root = prepare(tmp_path, text, fractions=(1, 0, 0), skip_missing=True)
    assert [row["img_path"] for row in rows_of(root)] == ["images/a.png"]
    assert "2 rows are left out, as their images do not exist" in caplog.text
    with pytest.raises(FileNotFoundError, match="no table at"):
        read_table(tmp_path / "labels.txt", [])
    with pytest.raises(FileNotFoundError, match=r"elsewhere is no folder\)"):
        prepare_csv(
            tmp_path / "labels.csv", tmp_path / "other", image="file", root=tmp_path / "elsewhere", skip_missing=True
        )


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [
        (("bad", "good"), (), ("good", "bad")),
        (("NOK", "OK"), (), ("OK", "NOK")),
        (("10", "9"), (), ("9", "10")),
        (("dent", "crack"), (), ("crack", "dent")),
        (("a", "b"), ("b", "c", "a"), ("b", "c", "a")),
    ],
)
def test_classes_are_in_an_order_that_can_be_foretold(
    tmp_path: Path, labels: tuple[str, str], classes: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    add(tmp_path, "a.png", "b.png")
    text = f"{HEAD}\na.png,p,{labels[0]}\nb.png,q,{labels[1]}"
    root = prepare(tmp_path, text, classes=classes, fractions=(1, 0, 0))
    assert GroupedJSON(root, "train").classes == expected
    (tmp_path / "out").rename(tmp_path / "done")
    with pytest.raises(ValueError, match=r"has the label .*, which is none of the classes x"):
        prepare(tmp_path, text, classes=["x"])


def test_splits_that_lack_a_class_or_everything_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    add(tmp_path, *"abcd".replace("", ".png ").split()[1:]) if False else add(
        tmp_path, *(f"{name}.png" for name in "abcd")
    )
    rows = "".join(f"{name}.png,{name},{'bad' if name == 'a' else 'ok'}\n" for name in "abcd")
    with caplog.at_level(logging.WARNING):
        prepare(tmp_path, f"{HEAD}\n{rows}")
    assert "has no image of class 'bad', which 1 parts have in all: another --split or --seed may help" in caplog.text


def test_files_that_cannot_be_linked_are_copied_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*paths: object) -> None:
        raise OSError(errno.EXDEV, "another disk")

    add(tmp_path, "a.png")
    monkeypatch.setattr(os, "link", refuse)
    root = prepare(tmp_path, f"{HEAD}\na.png,p,ok", hard_link=True, fractions=(1, 0, 0))
    assert "1 files are copied: they cannot be linked to" in caplog.text
    assert (root / "images" / "a.png").read_bytes() == (tmp_path / "a.png").read_bytes()
    with pytest.raises(ValueError, match="is a folder; give the table"):
        read_table(tmp_path, [])
