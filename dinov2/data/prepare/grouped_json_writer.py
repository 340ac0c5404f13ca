"""Writing a grouped set: image files, and one annotation file per split; and the command that writes a public set."""

import errno
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from dinov2.config.command_line import option, parse
from dinov2.data.datasets.base import DEFAULT_FRACTIONS, Split
from dinov2.data.datasets.grouped_json import GroupedJSON
from dinov2.utils.files import write_text_atomically

logger = logging.getLogger("dinov2")

_MARKER = "prepared.json"
_PARTIAL = ".dinov2_partial"


@dataclass(frozen=True)
class GroupedItem:
    """One image of a set that is about to be written.

    Attributes:
        row: its row of the annotation file: ``img_path``, ``group_id``, ``gt_label`` and any further keys.
        files: what to write, by path relative to the set's root: a file to copy, or the content itself.
    """

    row: Mapping[str, Any]
    files: Mapping[str, Path | bytes] = field(default_factory=dict)


def write_grouped_set(
    output: str | Path,
    items: Iterable[tuple[Split, GroupedItem]],
    *,
    metainfo: Mapping[str, Any],
    tool: str,
    settings: Mapping[str, Any],
    link: bool = False,
    hard_link: bool = False,
) -> None:
    """Writes a grouped set so that ``output`` holds all of it or nothing.

    The set is built in a hidden folder inside ``output``, read back with all checks of `GroupedJSON`, and moved into
    place. A set that the same tool wrote with the same settings is left as it is (see `is_prepared`).

    Args:
        output: root of the set; a new or empty folder.
        items: the images with their splits; a split without images gets no annotation file.
        metainfo: ``metainfo`` of the annotation files, with ``classes``.
        tool: name of what makes the set, kept beside it.
        settings: what the set depends on, as JSON values; kept beside it.
        link: link to the source files instead of copying them.
        hard_link: give the source files a second name instead of copying them, where they are on the same disk.

    Raises:
        ValueError: when ``output`` holds anything else, two items write one file, or the set fails a check.
        OSError: when a file cannot be read or written.
    """
    output = Path(output)
    if is_prepared(output, tool, settings):
        return
    output.mkdir(parents=True, exist_ok=True)
    partial = output / _PARTIAL
    if partial.exists():  # left by a run that was interrupted
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        _write_content(partial, items, metainfo, link, hard_link)
        for name in sorted(os.listdir(partial), key="annotations".__eq__):  # annotations last
            os.replace(partial / name, output / name)
    finally:
        shutil.rmtree(partial)
    write_text_atomically(output / _MARKER, json.dumps({"tool": tool, "settings": dict(settings)}, indent=2) + "\n")


def is_prepared(output: str | Path, tool: str, settings: Mapping[str, Any]) -> bool:
    """Whether ``output`` already holds the set that ``tool`` makes with ``settings``.

    Raises:
        ValueError: when it holds anything else, or files of the set are missing.
    """
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; give a folder")
    found = sorted({path.name for path in output.iterdir()} - {_PARTIAL}) if output.is_dir() else []
    if not found:
        return False
    try:
        marker = json.loads((output / _MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        marker = None
    if not isinstance(marker, dict) or marker.get("tool") != tool:
        shown = ", ".join(found[:5])
        raise ValueError(f"{output} is not empty (it holds {shown}) and was not made by {tool}; give another folder")
    if marker.get("settings") != dict(settings):
        raise ValueError(
            f"{output} was made with {marker.get('settings')}, now asked for {dict(settings)}; "
            "give another folder, or delete this one"
        )
    for split in _splits(output):
        missing = GroupedJSON(output, split).missing_files(sample=None)
        if missing:
            raise ValueError(f"{output} lacks {len(missing)} of its images, such as {missing[0]}; delete it and retry")
    return True


def describe_grouped_set(root: str | Path) -> str:
    """A table of a grouped set: images, groups and images per class of each split."""
    root = Path(root)
    lines: list[tuple[str, ...]] = []
    for split in _splits(root):
        dataset = GroupedJSON(root, split)
        targets = dataset.get_targets()
        counts = [int((targets == label).sum()) for label in range(len(dataset.classes))]
        if not lines:
            lines.append(("split", "images", "groups", *dataset.classes))
        lines.append((split.value, *map(str, (len(dataset), len(set(dataset.get_group_ids())), *counts))))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


@dataclass(frozen=True)
class PrepareOptions:
    """Options of the commands that write a public set."""

    source: Path = option(help="folder that holds the set as it was published, see above")
    output: Path = option(help="new or empty folder to write")
    seed: int = option(0, help="draws the splits")
    fractions: tuple[float, ...] = option(DEFAULT_FRACTIONS, help="shares of train, val and test")


def prepare_by_command(
    prepare: Callable[[Path, Path, int, Sequence[float]], None], *, description: str, example: str
) -> int:
    """Writes a set by the command line and shows its counts; returns the exit code.

    Args:
        prepare: takes source, output, seed and fractions.
        description: what the command writes, and what the source holds.
        example: a command line that works.
    """
    options = parse(PrepareOptions, description=description, example=example)
    prepare(options.source, options.output, options.seed, options.fractions)
    sys.stdout.write(f"{describe_grouped_set(options.output)}\n")
    return 0


def _write_content(
    folder: Path, items: Iterable[tuple[Split, GroupedItem]], metainfo: Mapping[str, Any], link: bool, hard_link: bool
) -> None:
    rows: dict[Split, list[str]] = {}
    written: set[str] = set()
    copied = 0
    for split, item in items:
        for name, source in item.files.items():
            if name in written:
                raise ValueError(f"two images of the set are written to {name}")
            written.add(name)
            target = folder / PurePosixPath(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(source, bytes):
                target.write_bytes(source)
            elif link:
                target.symlink_to(source.resolve(strict=True))
            elif not (hard_link and _second_name(source, target)):
                shutil.copyfile(source, target)
                copied += 1
        rows.setdefault(split, []).append(json.dumps(dict(item.row), ensure_ascii=False))
    if not rows:
        raise ValueError("the set has no images")
    if hard_link and copied:
        logger.warning("%d files are copied: they cannot be linked to, as from another disk", copied)
    (folder / "annotations").mkdir(exist_ok=True)
    for split, lines in rows.items():
        head = json.dumps(dict(metainfo), ensure_ascii=False)
        text = f'{{"metainfo": {head}, "data_list": [\n' + ",\n".join(lines) + "\n]}\n"
        write_text_atomically(folder / "annotations" / f"{split}.json", text)
    for split in rows:
        missing = GroupedJSON(folder, split).missing_files(sample=None)
        if missing:
            raise ValueError(f"the annotations name {missing[0].relative_to(folder)}, which no item writes")


def _second_name(source: Path, target: Path) -> bool:
    """Links ``target`` to the file of ``source``; False where the file system cannot."""
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK):
            return False
        raise
    return True


def _splits(root: Path) -> list[Split]:
    return [split for split in Split if (root / "annotations" / f"{split}.json").is_file()]
