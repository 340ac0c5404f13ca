"""A table of labels, as spreadsheets write it, as a grouped set: ``dinov2 prepare_csv``."""

import csv
import difflib
import io
import logging
import os
import re
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath

from dinov2.config.command_line import option, parse, run_as
from dinov2.data.datasets.annotation_file import ROW_KEYS
from dinov2.data.datasets.base import DEFAULT_FRACTIONS, Split, check_fractions, split_groups
from dinov2.data.datasets.grouped_json import GroupedJSON
from dinov2.data.decoding import readable_endings
from dinov2.data.prepare.grouped_json_writer import GroupedItem, describe_grouped_set, is_prepared, write_grouped_set
from dinov2.data.reading import find_file
from dinov2.data.shared_images import warn_of_shared_images

logger = logging.getLogger("dinov2")

_TOOL = "prepare_csv"
_DELIMITERS = (",", ";", "\t", "|")
_NO_LABEL = frozenset(("", "nan", "n/a", "#n/a", "null"))  # how spreadsheets and pandas write an empty cell
_GOOD = frozenset(
    ("good", "ok", "okay", "io", "i.o.", "pass", "passed", "normal", "negative", "functional", "free", "fine", "0",
     "no", "false", "non-defective", "nondefective", "no defect", "none", "gut")
)  # fmt: skip
_TOLD_EVERY = 5.0  # seconds between lines of progress
_SHOWN = 3  # examples in a message


@dataclass(frozen=True)
class Table:
    """The cells of a table of text.

    Attributes:
        path: of the file.
        columns: names of the columns.
        rows: cells as text, stripped, one list per row.
        lines: line of the file that each row begins in.
    """

    path: Path
    columns: tuple[str, ...]
    rows: list[list[str]]
    lines: list[int]


@dataclass(frozen=True)
class _Row:
    """One image of the table, checked."""

    line: int
    path: Path
    part: str
    label: str
    extras: dict[str, str]


def read_table(path: str | Path, wanted: Sequence[str]) -> Table:
    """Reads a CSV file: divided by commas, semicolons, tabs or bars, with or without a byte-order mark, quoted or not.

    The divider is the one by which the first line holds the wanted columns.

    Args:
        path: of the file, UTF-8 or UTF-16.
        wanted: names of columns that it must have.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is no such table, naming the line; or lacks a column, naming those that it has.
    """
    path = Path(path)
    text = _decode(path)
    first, rest = text.partition("\n")[::2]
    said = re.fullmatch(r"sep=(.)\r?", first)  # Excel's way to say how a table is divided
    if said:
        text, offset = rest, 1
    else:
        offset = 0
    head = next((line for line in text.splitlines() if line.strip()), "")
    if not head:
        raise ValueError(f"{path} is empty; its first line must name the columns")
    candidates = [said[1]] if said else list(_DELIMITERS)
    headers = {divider: _clean(next(csv.reader([head], delimiter=divider))) for divider in candidates}
    divider = max(candidates, key=lambda divider: (len({*wanted} & {*headers[divider]}), len(headers[divider])))
    columns = headers[divider]
    for name in wanted:
        if name not in columns:
            near = difflib.get_close_matches(name.lower(), [column.lower() for column in columns], n=2, cutoff=0.5)
            meant = [repr(column) for column in columns if column.lower() in near]
            hint = f"; did you mean {' or '.join(meant)}?" if meant else ""
            raise ValueError(f"{path} has no column {name!r}{hint} (its columns are {', '.join(map(repr, columns))})")
        if columns.count(name) > 1:
            raise ValueError(f"{path} has {columns.count(name)} columns {name!r}; give each a name of its own")
    rows, lines = [], []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=divider, strict=True)
    last = 0
    try:
        for cells in reader:
            line, last = last + 1, reader.line_num
            cells = _clean(cells)
            if not any(cells):
                continue
            while len(cells) > len(columns) and not cells[-1]:
                cells.pop()
            if len(cells) != len(columns):
                raise ValueError(
                    f"{path}, line {line + offset}: has {len(cells)} cells, the first line names {len(columns)} "
                    f'columns; put cells that hold {divider!r} into quotation marks ("), and close them'
                )
            rows.append(cells)
            lines.append(line + offset)
    except csv.Error as error:
        raise ValueError(f"{path}, line {last + 1 + offset}: not a table of text ({error})") from None
    return Table(path, tuple(columns), rows[1:], lines[1:])


def prepare_csv(
    table: str | Path,
    output: str | Path,
    *,
    image: str,
    part: str | None = None,
    label: str | None = None,
    fractions: Sequence[float] = DEFAULT_FRACTIONS,
    seed: int = 0,
    root: str | Path | None = None,
    classes: Sequence[str] = (),
    hard_link: bool = False,
    skip_missing: bool = False,
) -> None:
    """Writes the images that a table lists as a grouped set: ``output/annotations/*.json``, ``output/images/...``.

    Parts are divided at random, each whole, so that every split gets its share of each label. Further columns are kept
    as text in the rows. Doing it again changes nothing.

    Args:
        table: CSV file (see `read_table`), one image per row.
        output: new or empty folder, or one that the same call has filled, which is left as it is.
        image: column of the images' paths, absolute (``~`` too) or relative to ``root``.
        part: column of the part that an image shows; without it, each image is a part of its own.
        label: column of the labels; without it, nothing is labelled. Empty cells leave an image without a label.
        fractions: shares of train, val and test.
        seed: draws the splits.
        root: what relative paths start from; by default the table's folder.
        classes: all labels in the order of their numbers; by default sorted, the one that means *good* first of two.
        hard_link: link to the images, on the same disk, instead of copying them.
        skip_missing: leave out rows whose image does not exist.

    Raises:
        FileNotFoundError: when the table, or an image of it, is missing.
        ValueError: naming the line of the table that is wrong, or for an ``output`` that holds anything else.
    """
    fractions = check_fractions(fractions)
    (image,) = _clean([image])
    part, label = (None if name is None else _clean([name])[0] for name in (part, label))
    wanted = [name for name in (image, part, label) if name is not None]
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"image, part and label must be columns of their own, found {', '.join(map(repr, wanted))}")
    content = read_table(table, wanted)
    settings = {
        "table": sha256(content.path.read_bytes()).hexdigest()[:16],
        "image": image,
        "part": part,
        "label": label,
        "fractions": list(fractions),
        "seed": seed,
        "classes": list(classes),
        "root": None if root is None else str(Path(root).absolute()),
    }
    if is_prepared(output, _TOOL, settings):
        return
    rows = _check_rows(content, image, part, label, Path(root).expanduser() if root is not None else None, skip_missing)
    names = _order_classes(rows, classes, content.path)
    splits = split_groups([row.part for row in rows], [row.label for row in rows], fractions, seed).tolist()
    _warn(rows, splits, names, fractions, with_parts=part is not None)
    base = Path(os.path.commonpath([row.path.parent for row in rows]))
    numbers = {name: number for number, name in enumerate(names)}

    def items() -> Iterator[tuple[Split, GroupedItem]]:
        told = time.monotonic()
        for count, (row, number) in enumerate(zip(rows, splits, strict=True)):
            if time.monotonic() - told > _TOLD_EVERY:
                told = time.monotonic()
                sys.stderr.write(f"{count} of {len(rows)} images written\n")
            name = f"images/{PurePosixPath(row.path.relative_to(base)).as_posix()}"
            labels = {"gt_label": numbers[row.label]} if row.label else {}
            content = {"img_path": name, "group_id": row.part, **labels, **row.extras}
            yield list(Split)[number], GroupedItem(content, {name: row.path})

    write_grouped_set(
        output, items(), metainfo={"classes": list(names)}, tool=_TOOL, settings=settings, hard_link=hard_link
    )
    written = {split.value: GroupedJSON(output, split) for number, split in enumerate(Split) if number in splits}
    warn_of_shared_images(written)  # one picture under two names, in two parts


def _decode(path: Path) -> str:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the table, a CSV file")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"no table at {path}") from None
    if data.startswith((b"PK\3\4", b"\xd0\xcf\x11\xe0")):
        raise ValueError(f"{path} is a workbook; save the sheet as 'CSV UTF-8'")
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: is not UTF-8; save the table as 'CSV UTF-8', or convert it: "
            f"iconv -f WINDOWS-1252 -t UTF-8 {path.name}"
        ) from None
    if "\0" in text:
        raise ValueError(f"{path} is no table of text: it holds a null character")
    return text


def _clean(cells: Sequence[str]) -> list[str]:
    return [unicodedata.normalize("NFC", cell.strip()) for cell in cells]


def _fold(text: str) -> str:
    """What two spellings of one label or part have in common: 1 and 1.0, Good and good."""
    number = re.fullmatch(r"0*(\d+)(\.0*)?", text)
    return number[1] if number else " ".join(text.casefold().split())


def _check_rows(
    table: Table, image: str, part: str | None, label: str | None, root: Path | None, skip_missing: bool
) -> list[_Row]:
    """All rows whose images exist, each image once."""

    def fail(row: int, text: str, others: int = 0) -> ValueError:
        more = f" ({others + 1} such rows in all)" if others else ""
        return ValueError(f"{table.path}, line {table.lines[row]}: {text}{more}")

    if not table.rows:
        raise ValueError(f"{table.path} has no rows below its first line, which names the columns")
    columns = {name: number for number, name in enumerate(table.columns)}
    cells: dict[str, list[str]] = {name: [row[number] for row in table.rows] for name, number in columns.items()}
    parts = cells[part] if part is not None else [""] * len(table.rows)
    labels = ["" if text.casefold() in _NO_LABEL else text for text in cells[label]] if label else [""] * len(parts)
    for name, values in ((image, cells[image]), (part, parts)):
        empty = [row for row, value in enumerate(values) if not value]
        if name is not None and empty:
            raise fail(empty[0], f"column {name!r} is empty", len(empty) - 1)
    for name, values in ((part, parts), (label, labels)):
        spellings: dict[str, int] = {}
        for row, value in enumerate(values):
            first = spellings.setdefault(_fold(value), row)
            if values[first] != value:
                raise fail(
                    row,
                    f"{name} {value!r} is written {values[first]!r} in line {table.lines[first]}; write both alike, or "
                    "give them names that differ in more than capitals, spaces or zeros",
                )
    folder = table.path.parent if root is None else root
    paths = [_image_path(text, folder) for text in cells[image]]
    others = [name for name in table.columns if name and name not in (image, part, label, *ROW_KEYS)]
    found: dict[Path, int] = {}
    missing, repeated = [], 0
    for row, path in enumerate(paths):
        if (first := found.setdefault(path, row)) != row:
            same = (parts[first], labels[first]) == (parts[row], labels[row])
            if not same:
                raise fail(row, f"{path} is already in line {table.lines[first]}, with another part or label")
            repeated += 1
        elif not path.is_file():
            missing.append(row)
    if missing and not (skip_missing and len(missing) < len(found)):
        path = paths[missing[0]]
        near = _near_file(path)
        raise FileNotFoundError(
            str(fail(missing[0], f"no image at {path}{near}", len(missing) - 1))
            + f"; relative paths start from {folder} (--root gives another folder, --skip-missing leaves such rows out)"
        )
    unreadable = [row for row in found.values() if paths[row].suffix.lower() not in readable_endings()]
    if unreadable:
        raise fail(unreadable[0], f"{paths[unreadable[0]]} is no image that can be read", len(unreadable) - 1)
    if repeated:
        logger.warning("%s: %d rows name an image that a row above names too; each counts once", table.path, repeated)
    if missing:
        logger.warning("%s: %d rows are left out, as their images do not exist", table.path, len(missing))
    left_out = set(missing)
    return [
        _Row(
            table.lines[row],
            path,
            parts[row] or str(path),
            labels[row],
            {name: value for name in others if (value := table.rows[row][columns[name]])},
        )
        for path, row in found.items()
        if row not in left_out
    ]


def _image_path(text: str, folder: Path) -> Path:
    path = folder / (Path(text).expanduser() if text.startswith("~/") else text)
    if "\\" in text and not path.is_file():
        path = folder / text.replace("\\", "/")
    return Path(os.path.abspath(find_file(path)))


def _near_file(path: Path) -> str:
    """Names a file of the same name, in capitals or not, with another ending or in the folder's neighbourhood."""
    if not path.parent.is_dir():
        return f" ({path.parent} is no folder)"
    with os.scandir(path.parent) as entries:
        names = sorted(entry.name for entry in entries if entry.is_file())
    alike = [name for name in names if Path(name).stem.casefold() == path.stem.casefold()]
    alike = alike or difflib.get_close_matches(path.name, names, n=1)
    return f" (the folder has {alike[0]})" if alike else ""


def _order_classes(rows: Sequence[_Row], asked: Sequence[str], table: Path) -> tuple[str, ...]:
    """All labels, by class number."""
    present = Counter(row.label for row in rows if row.label)
    asked = _clean(asked)
    if asked:
        unknown = sorted(present.keys() - set(asked))
        if unknown:
            raise ValueError(f"{table} has the label {unknown[0]!r}, which is none of the classes {', '.join(asked)}")
        if len(set(asked)) < len(asked):
            raise ValueError(f"a class is named twice: {', '.join(asked)}")
        return tuple(asked)
    try:
        names = sorted(present, key=float)
    except ValueError:
        names = sorted(present)
    if len(names) == 2 and (names[1].casefold() in _GOOD) > (names[0].casefold() in _GOOD):
        names.reverse()
    return tuple(names)


def _warn(
    rows: Sequence[_Row], splits: Sequence[int], classes: Sequence[str], fractions: Sequence[float], *, with_parts: bool
) -> None:
    """Tells what may be meant otherwise, and what a split lacks."""
    unlabelled = sum(not row.label for row in rows)
    if classes and unlabelled:
        logger.warning("%d of %d images have no label; training a head leaves them out", unlabelled, len(rows))
    if not with_parts:
        logger.warning("no --part was given: images of one part may lie in two splits, which makes scores too good")
    if len(classes) == 1:
        logger.warning("there is one label only, %r: nothing can be told apart", classes[0])
    labels: dict[str, set[str]] = {}
    for row in rows:
        labels.setdefault(row.part, set()).add(row.label)
    mixed = [name for name, found in labels.items() if len(found - {""}) > 1]
    if mixed:
        logger.warning(
            "%d of %d parts have images of different labels, such as %s",
            len(mixed), len(labels), ", ".join(map(repr, mixed[:_SHOWN])),
        )  # fmt: skip
    for number, (split, share) in enumerate(zip(Split, fractions, strict=True)):
        if share == 0:
            continue
        inside = {row.label for row, place in zip(rows, splits, strict=True) if place == number}
        if not inside:
            logger.warning("%s has no image: %d parts are too few for these shares", split.value, len(labels))
        for name in classes if inside else ():
            if name not in inside:
                holding = sum(name in found for found in labels.values())
                logger.warning(
                    "%s has no image of class %r, which %d parts have in all: another --split or --seed may help",
                    split.value, name, holding,
                )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PrepareCsvOptions:
    """Options of the command."""

    table: Path = option(
        help="CSV file with one image per row and the names of its columns in the first line", positional=True
    )
    image: str = option(help="column of the images' paths, absolute or relative to the table")
    part: str | None = option(None, help="column of the part that an image shows; images of one part stay together")
    label: str | None = option(None, help="column of the labels; without it, nothing is labelled")
    split: str = option("60/20/20", help="shares of train, val and test in per cent")
    output: Path = option(help="new or empty folder to write; one that the same table has filled is left as it is")
    seed: int = option(0, help="draws the splits")
    root: Path | None = option(None, help="folder that relative paths start from (default: that of the table)")
    classes: tuple[str, ...] = option((), help="all labels in the order of their numbers (of two, the defect second)")
    hard_link: bool = option(False, help="link to the images, on the same disk, instead of copying them")
    skip_missing: bool = option(False, help="leave out rows whose image does not exist")


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the set and shows its counts; returns the exit code."""
    options = parse(
        PrepareCsvOptions,
        argv,
        description=(
            "Writes the images that a table lists as a grouped set: FOLDER/annotations/{train,val,test}.json and "
            "FOLDER/images/..., split by part, with equal shares of each label."
        ),
        example=(
            "python tools/prepare_csv.py labels.csv --image file --part serial --label result --output data/parts"
        ),
    )
    prepare_csv(
        options.table,
        options.output,
        image=options.image,
        part=options.part,
        label=options.label,
        fractions=_parse_split(options.split),
        seed=options.seed,
        root=options.root,
        classes=options.classes,
        hard_link=options.hard_link,
        skip_missing=options.skip_missing,
    )
    classes = next(GroupedJSON(options.output, split).classes for split in Split if _has(options.output, split))
    sys.stdout.write(f"{describe_grouped_set(options.output)}\n")
    if len(classes) == 2:
        sys.stdout.write(f"of the two classes, {classes[1]} counts as the defect (--classes gives another order)\n")
    sys.stdout.write(f"open it as GroupedJSON:split=TRAIN:root={options.output}\n")
    return 0


def _has(root: Path, split: Split) -> bool:
    return (root / "annotations" / f"{split}.json").is_file()


def _parse_split(text: str) -> list[float]:
    """Shares of train, val and test from ``60/20/20``, or ``80/20`` without test.

    Raises:
        ValueError: for anything else.
    """
    try:
        shares = [float(word) / 100 for word in re.split(r"[/,:]", text)]
    except ValueError:
        shares = []
    if not 2 <= len(shares) <= len(Split) or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(
            f"--split takes shares of train, val and test that add up to 100, such as 60/20/20, found {text!r}"
        )
    return [*shares, 0.0][: len(Split)]


if __name__ == "__main__":
    run_as("prepare_csv")
