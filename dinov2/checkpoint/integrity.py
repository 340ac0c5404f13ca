"""Steps in a run's folder: whether their files are all there and undamaged, and which one a run goes on from."""

import logging
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dinov2.checkpoint.sharding import RankFiles, load_file, rank_file
from dinov2.distributed import all_gather_objects, get_rank, get_world_size
from dinov2.utils.files import MISSING, NO_CHECKSUM, checksum_fault, sidecar

logger = logging.getLogger("dinov2")

CHECKSUMS_SINCE = 2  # the format_version of files that always had a checksum
GOOD = "good"
TEACHER_FILES = "eval/*/teacher_checkpoint.pth"

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
    """Rank file that the ``last_checkpoint`` files name, of the newest step if they differ; empty without any.

    All files of a step exist before any process names it, so that the newest name counts.
    """
    names = []
    for tag in tags(folder):
        try:
            names.append(tag.read_text(encoding="utf-8", errors="replace").strip() or "(nothing)")
        except OSError as error:  # such as a folder in its place
            names.append(f"({tag.name} cannot be read: {error.strerror})")
    return max(names, key=lambda name: (parse_rank_file(name) or ("", -1))[1], default="")


def is_before_checksums(folder: str | Path) -> bool:
    """Whether no file of the folder has a checksum: all were written by a version that made none."""
    return not any(sidecar(step.path(rank)).exists() for step in find_steps(folder) for rank in step.ranks)


def _file_fault(path: Path, *, before_checksums: bool = False) -> str:
    """What is wrong with one rank file; before checksums, what the sums inside the archive show. Empty when good."""
    if not before_checksums or sidecar(path).exists():
        return checksum_fault(path)
    try:
        if load_file(path).get("format_version", 1) >= CHECKSUMS_SINCE:
            return checksum_fault(path)
    except (OSError, ValueError) as error:
        return f"cannot be read: {error}"
    return _archive_fault(path)


def _archive_fault(path: Path) -> str:
    """What the sums inside a file of ``torch.save`` show to be wrong with it; empty when it is good."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        return f"cannot be read: {error}"
    return f"is damaged in {broken}" if broken else ""


def _step_fault(step: Step, faults: Mapping[int, str]) -> str:
    """Why a step cannot be used, by the faults of its files by rank (empty for a good one); empty when it can."""

    def first_fault(ranks: Iterable[int]) -> str:
        found = ((rank, faults.get(rank, MISSING)) for rank in ranks)
        return next((f"{step.path(rank).name} {fault}" for rank, fault in found if fault), "")

    try:
        if fault := first_fault([0]):
            return fault
        world_size = int(load_file(step.path(0))["world_size"])
        if fault := first_fault(range(1, world_size)):
            return fault
        RankFiles(step.pattern)
    except (OSError, ValueError, TypeError) as error:
        return str(error)
    return ""


def newest_good_step(folder: str | Path) -> RankFiles | None:
    """Opens the newest usable step; None when the folder never held a finished one. All processes call it and agree.

    The step that ``last_checkpoint`` names comes first. If a file of it is damaged or missing, a warning says which and
    why, and the next older step is tried.

    Raises:
        DamagedCheckpointError: a step was finished, and none is good; every step and its fault are named.
    """
    folder = Path(folder)
    # The main process looks, so that all try the same list even while the folder changes.
    tagged, steps, before_checksums = all_gather_objects(
        (tagged_name(folder), find_steps(folder), is_before_checksums(folder))
    )[0]
    if not tagged and not steps:
        return None
    if before_checksums and steps:
        logger.warning("the checkpoints in %s are from before checksums: damage may go unnoticed", folder)
    faults: list[str] = []
    for step in _candidates(folder, tagged, steps):
        fault = _agreed_fault(step, before_checksums=before_checksums)
        if not fault:
            if faults:
                logger.warning("going on from the older step %s: what was done after it is done again", step.name)
            elif not tagged:
                logger.warning("no last_checkpoint file: going on from %s, which is complete and undamaged", step.name)
            return RankFiles(step.pattern)
        logger.error("checkpoint %s is not used: %s", step.name, fault)
        faults.append(f"  {step.name}: {fault}")
    if not tagged:
        logger.warning("%s holds no step that was ever finished: the run begins anew", folder)
        return None
    raise DamagedCheckpointError(
        f"no checkpoint in {folder} can be used; to begin anew, give another folder or --no-resume:\n"
        + "\n".join(faults)
    )


def open_verified(pattern: str) -> RankFiles:
    """Opens all files of a step that was named explicitly, after every process has found its share undamaged.

    Raises:
        FileNotFoundError: when a file is missing, by name.
        ValueError: when a file is damaged, or is not a checkpoint, in this process or in any other.
    """
    opened: RankFiles | None = None
    error: OSError | ValueError | None = None
    try:
        opened = RankFiles(pattern)
    except (OSError, ValueError) as caught:
        error = caught
    errors = all_gather_objects(str(error or ""))
    if error is not None:
        raise error
    assert opened is not None
    if any(errors):
        raise ValueError(next(filter(None, errors)))
    path = Path(pattern)
    step = Step(path.parent, path.name.removesuffix(".rank_{rank}.pth"), -1, tuple(range(opened.world_size)))
    before_checksums = all_gather_objects(is_before_checksums(path.parent))[0]
    if before_checksums:
        logger.warning("%s is from before checksums: damage may go unnoticed", pattern)
    if fault := _agreed_fault(step, before_checksums=before_checksums):
        raise DamagedCheckpointError(f"{path.parent}: {fault}")
    return opened


def _candidates(folder: Path, tagged: str, steps: list[Step]) -> list[Step]:
    """The steps to try in turn: the tagged one, then older ones. Newer ones were never finished by all processes."""
    parsed = parse_rank_file(tagged)
    if parsed is None:
        if tagged:
            logger.error("last_checkpoint in %s is damaged: it says %.60r; trying every step", folder, tagged)
        return steps
    name, number = parsed
    newer = [step.name for step in steps if step.number > number]
    if newer:
        logger.warning(
            "not used, because newer than the step %s that last_checkpoint names: %s", name, ", ".join(newer)
        )
    chosen = [step for step in steps if step.name == name] or [Step(folder, name, number, ())]
    return chosen + [step for step in steps if step.number <= number and step.name != name]


def _agreed_fault(step: Step, *, before_checksums: bool) -> str:
    """Why any process cannot use a step. Each verifies a share of the files, and opens all."""
    mine = step.ranks[get_rank() :: get_world_size()]
    faults: dict[int, str] = {}
    for share in all_gather_objects(
        {rank: _file_fault(step.path(rank), before_checksums=before_checksums) for rank in mine}
    ):
        faults |= share
    return next(filter(None, all_gather_objects(_step_fault(step, faults))), "")


@dataclass(frozen=True)
class CheckedFiles:
    """What was found out about a step or a teacher's file.

    Attributes:
        name: of the step, or path in the folder.
        ranks: how many rank files are there; 0 for a teacher's file.
        nbytes: size of the files.
        state: ``good``, ``damaged`` or ``incomplete``; what has no checksum is ``good (no checksum)`` at best.
        reason: why it is not good, else empty.
    """

    name: str
    ranks: int
    nbytes: int
    state: str
    reason: str = ""

    @property
    def good(self) -> bool:
        """Whether it can be used."""
        return self.state.startswith(GOOD)


@dataclass(frozen=True)
class RunCheck:
    """The state of a run's folder.

    Attributes:
        folder: of the run.
        steps: newest first.
        teachers: files of teachers alone.
        tagged: name of the step that ``last_checkpoint`` names; empty without one.
        resumed: name of the step that a run would go on from; empty when there is none.
    """

    folder: Path
    steps: tuple[CheckedFiles, ...]
    teachers: tuple[CheckedFiles, ...]
    tagged: str
    resumed: str

    @property
    def good(self) -> bool:
        """Whether the step that ``last_checkpoint`` names is good."""
        return bool(self.tagged) and any(step.good and step.name == self.tagged for step in self.steps)

    def __str__(self) -> str:
        rows = [("step", "ranks", "MiB", "state")]
        for found in (*self.steps, *self.teachers):
            reason = f" ({found.reason})" if found.reason else ""
            rows.append((found.name, str(found.ranks or ""), f"{found.nbytes / 2**20:.1f}", found.state + reason))
        name, ranks, size = (max(len(row[column]) for row in rows) for column in range(3))
        lines = [f"{row[0]:<{name}}  {row[1]:>{ranks}}  {row[2]:>{size}}  {row[3]}".rstrip() for row in rows]
        # The name comes from a file that may be damaged: without what would steer a terminal.
        tagged = (self.tagged if self.tagged.isprintable() else repr(self.tagged)) or "nothing"
        return "\n".join(
            [
                *lines,
                "",
                f"last_checkpoint names: {tagged}{'' if self.good else ' (NOT GOOD)'}",
                f"newest and good:       {next((step.name for step in self.steps if step.good), 'none')}",
                f"a run goes on from:    {self.resumed or 'nothing'}",
            ]
        )


def check_run(folder: str | Path) -> RunCheck:
    """Reads every checkpoint of a run, and every teacher's file, and compares them with their checksums.

    Needs no process group, and memory for one piece of a file. Nothing is changed.

    Raises:
        FileNotFoundError: when the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    steps, before_checksums = find_steps(folder), is_before_checksums(folder)
    checked: dict[str, CheckedFiles] = {}
    for step in steps:
        fault = _step_fault(
            step, {rank: _file_fault(step.path(rank), before_checksums=before_checksums) for rank in step.ranks}
        )
        state = f"{GOOD} (no checksum)" if before_checksums else GOOD
        if fault:
            state = "incomplete" if MISSING in fault or NO_CHECKSUM in fault else "damaged"
        nbytes = sum(step.path(rank).stat().st_size for rank in step.ranks)
        checked[step.name] = CheckedFiles(step.name, len(step.ranks), nbytes, state, fault)
    teachers = []
    for path in sorted(folder.glob(TEACHER_FILES)):
        has_checksum = sidecar(path).exists()
        fault = checksum_fault(path) if has_checksum else _archive_fault(path)
        state = "damaged" if fault else GOOD if has_checksum else f"{GOOD} (no checksum)"
        teachers.append(CheckedFiles(path.relative_to(folder).as_posix(), 0, path.stat().st_size, state, fault))
    tagged = tagged_name(folder)
    tried = _candidates(folder, tagged, steps)
    resumed = next((step.name for step in tried if step.name in checked and checked[step.name].good), "")
    return RunCheck(folder, tuple(checked.values()), tuple(teachers), tagged.partition(".rank_")[0], resumed)
