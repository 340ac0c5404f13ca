"""Which steps lie in a run's folder, and whether all files of a step are there and undamaged."""

import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dinov2.checkpoint.sharding import RankFiles, load_file, rank_file
from dinov2.utils.files import MISSING, checksum_fault, sidecar

CHECKSUMS_SINCE = 2  # the format_version of files that always had a checksum

_RANK_FILE = re.compile(r"(?P<name>.*_(?P<step>\d+))\.rank_(?P<rank>\d+)\.pth")
_TAG = re.compile(r"last_checkpoint\.rank_\d+")


class DamagedCheckpointError(ValueError):
    """A checkpoint has a file that is damaged or missing; the message names it."""


@dataclass(frozen=True)
class Step:
    """The files of one step, as far as they are there.

    Attributes:
        folder: of the run.
        name: such as ``model_0001249``.
        number: the iteration that was finished, from 0.
        ranks: whose files are there, ascending.
    """

    folder: Path
    name: str
    number: int
    ranks: tuple[int, ...]

    @property
    def pattern(self) -> str:
        """Path with ``{rank}`` in place of the number."""
        return str(self.folder / f"{self.name}.rank_{{rank}}.pth")

    def path(self, rank: int) -> Path:
        """One process's file."""
        return Path(rank_file(self.pattern, rank))


def find_steps(folder: str | Path) -> list[Step]:
    """Steps of which any file is there, newest first."""
    ranks: dict[tuple[int, str], list[int]] = {}
    folder = Path(folder)
    for path in folder.glob("*.rank_*.pth"):
        match = _RANK_FILE.fullmatch(path.name)
        if match and not path.name.startswith("."):
            ranks.setdefault((int(match["step"]), match["name"]), []).append(int(match["rank"]))
    return [Step(folder, name, number, tuple(sorted(found))) for (number, name), found in sorted(ranks.items())[::-1]]


def parse_rank_file(name: str) -> tuple[str, int] | None:
    """Name and number of the step that a rank file's name belongs to; None for any other name."""
    match = _RANK_FILE.fullmatch(name)
    return (match["name"], int(match["step"])) if match else None


def tags(folder: str | Path) -> list[Path]:
    """The ``last_checkpoint`` files, by rank."""
    return [path for path in sorted(Path(folder).glob("last_checkpoint.rank_*")) if _TAG.fullmatch(path.name)]


def tagged_name(folder: str | Path) -> str:
    """What the ``last_checkpoint`` files name, the newest if they differ; empty without any.

    All files of a step exist before any process names it, so that the newest name counts.
    """
    names = [tag.read_text(encoding="utf-8", errors="replace").strip() or "(nothing)" for tag in tags(folder)]
    return max(names, key=lambda name: (parse_rank_file(name) or ("", -1))[1], default="")


def is_before_checksums(folder: str | Path) -> bool:
    """Whether no file of the folder has a checksum: all were written by a version that made none."""
    return not any(sidecar(step.path(rank)).exists() for step in find_steps(folder) for rank in step.ranks)


def file_fault(path: Path, *, before_checksums: bool = False) -> str:
    """What is wrong with one rank file, in a few words; empty when it is good.

    Args:
        path: the file.
        before_checksums: whether a file without checksum is one of an older version; then the sums that the file format
            itself holds are checked.
    """
    if not before_checksums or sidecar(path).exists():
        return checksum_fault(path)
    try:
        if load_file(path).get("format_version", 1) >= CHECKSUMS_SINCE:
            return checksum_fault(path)
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        return f"cannot be read: {error}"
    return f"is damaged in {broken}" if broken else ""


def step_fault(step: Step, faults: Mapping[int, str]) -> str:
    """Why a step cannot be used; empty when it can.

    Args:
        step: the step.
        faults: of the files that are there, by rank, empty for a good file. Only then is a file opened.
    """
    try:
        if first := _name_fault(step, faults, [0]):
            return first
        world_size = int(load_file(step.path(0))["world_size"])
        if other := _name_fault(step, faults, range(1, world_size)):
            return other
        RankFiles(step.pattern)
    except (OSError, ValueError, TypeError) as error:
        return str(error)
    return ""


def _name_fault(step: Step, faults: Mapping[int, str], ranks: Iterable[int]) -> str:
    for rank in ranks:
        if fault := faults.get(rank, MISSING):
            return f"{step.path(rank).name} {fault}"
    return ""
