"""Choosing the step to go on from: the newest that every process finds undamaged. All processes call and agree."""

import logging
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from dinov2.checkpoint.integrity import (
    DamagedCheckpointError,
    Step,
    file_fault,
    find_steps,
    is_before_checksums,
    parse_rank_file,
    step_fault,
    tagged_name,
)
from dinov2.checkpoint.sharding import RankFiles
from dinov2.distributed import all_gather_objects, get_rank, get_world_size
from dinov2.utils.files import MISSING, NO_CHECKSUM, shown_fault, sidecar

logger = logging.getLogger("dinov2")


def newest_good_step(folder: str | Path) -> str:
    """Path, with ``{rank}``, of the newest usable step; empty when the folder never held a finished one.

    The step that ``last_checkpoint`` names comes first. If a file of it is damaged or missing, a warning says which and
    why, and the next older step is tried.

    Raises:
        DamagedCheckpointError: a step was finished, and none is good; every step and its fault are named.
    """
    folder = Path(folder)
    # The main process looks, so that all judge the same list even while the folder changes.
    tagged, steps, before_checksums = all_gather_objects(
        (tagged_name(folder), find_steps(folder), is_before_checksums(folder))
    )[0]
    if not tagged and not steps:
        return ""
    if before_checksums and steps:
        logger.warning("the checkpoints in %s are from before checksums: damage may go unnoticed", folder)
    faults: list[str] = []
    for step in candidates(folder, tagged, steps):
        fault = _agreed_fault(step, before_checksums=before_checksums)
        if not fault:
            if faults:
                logger.warning("going on from the older step %s: what was done after it is done again", step.name)
            elif not tagged:
                logger.warning("no last_checkpoint file: going on from %s, which is complete and undamaged", step.name)
            return step.pattern
        logger.error("checkpoint %s is not used: %s", step.name, fault)
        faults.append(f"  {step.name}: {fault}")
    if not tagged:
        logger.warning("%s holds no step that was ever finished: the run begins anew", folder)
        return ""
    raise DamagedCheckpointError(
        f"no checkpoint in {folder} can be used; to begin anew, give another folder or --no-resume:\n"
        + "\n".join(faults)
    )


def candidates(folder: Path, tagged: str, steps: list[Step]) -> list[Step]:
    """The steps to try in turn: the tagged one, then older ones. Newer ones were never finished by all processes.

    Args:
        folder: of the run.
        tagged: what `tagged_name` says.
        steps: what `find_steps` found.
    """
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


def _agreed_fault(step: Step, *, before_checksums: bool) -> str:
    """Why any process cannot use a step. Each verifies a share of the files, and opens all."""
    mine = step.ranks[get_rank() :: get_world_size()]
    faults: dict[int, str] = {}
    for part in all_gather_objects(
        {rank: file_fault(step.path(rank), before_checksums=before_checksums) for rank in mine}
    ):
        faults |= part
    return next(filter(None, all_gather_objects(step_fault(step, faults))), "")


GOOD = "good"
TEACHER_FILES = "eval/*/teacher_checkpoint.pth"


@dataclass(frozen=True)
class Verdict:
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
    steps: tuple[Verdict, ...]
    teachers: tuple[Verdict, ...]
    tagged: str
    resumed: str

    @property
    def good(self) -> bool:
        """Whether the step that ``last_checkpoint`` names is good."""
        return bool(self.tagged) and any(step.good and step.name == self.tagged for step in self.steps)

    def __str__(self) -> str:
        rows = [("step", "ranks", "MiB", "state")]
        rows += [
            (
                verdict.name,
                str(verdict.ranks or ""),
                f"{verdict.nbytes / 2**20:.1f}",
                verdict.state + (f" ({verdict.reason})" if verdict.reason else ""),
            )
            for verdict in (*self.steps, *self.teachers)
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [
            f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}".rstrip() for row in rows
        ]
        newest = next((step.name for step in self.steps if step.good), "none")
        lines.append("")
        lines.append(f"last_checkpoint names: {_shown(self.tagged)}{'' if self.good else ' (NOT GOOD)'}")
        lines.append(f"newest and good:       {newest}")
        lines.append(f"a run goes on from:    {self.resumed or 'nothing'}")
        return "\n".join(lines)


def check_run(folder: str | Path) -> RunCheck:
    """Reads every checkpoint of a run, and every teacher's file, and compares them with their checksums.

    Needs no process group, and memory for one piece of a file. Nothing is changed.

    Raises:
        FileNotFoundError: when the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    steps = find_steps(folder)
    before_checksums = is_before_checksums(folder)
    verdicts = {step.name: _check_step(step, before_checksums=before_checksums) for step in steps}
    tagged = tagged_name(folder)
    tried = candidates(folder, tagged, steps) if tagged or steps else []
    resumed = next((step.name for step in tried if step.name in verdicts and verdicts[step.name].good), "")
    return RunCheck(
        folder,
        tuple(verdicts.values()),
        tuple(_check_teacher(folder, path) for path in sorted(folder.glob(TEACHER_FILES))),
        tagged.partition(".rank_")[0],
        resumed,
    )


def _check_step(step: Step, *, before_checksums: bool) -> Verdict:
    faults = {rank: file_fault(step.path(rank), before_checksums=before_checksums) for rank in step.ranks}
    fault = step_fault(step, faults)
    nbytes = sum(step.path(rank).stat().st_size for rank in step.ranks)
    if not fault:
        return Verdict(step.name, len(step.ranks), nbytes, f"{GOOD} (no checksum)" if before_checksums else GOOD)
    state = "incomplete" if MISSING in fault or NO_CHECKSUM in fault else "damaged"
    return Verdict(step.name, len(step.ranks), nbytes, state, fault)


def _check_teacher(folder: Path, path: Path) -> Verdict:
    name, nbytes = path.relative_to(folder).as_posix(), path.stat().st_size
    if sidecar(path).exists():
        fault = shown_fault(path)
        return Verdict(name, 0, nbytes, "damaged" if fault else GOOD, fault)
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        return Verdict(name, 0, nbytes, "damaged", f"cannot be read: {error}")
    return Verdict(name, 0, nbytes, *(("damaged", f"in {broken}") if broken else (f"{GOOD} (no checksum)", "")))


def _shown(name: str) -> str:
    """A name read from a file that may be damaged, without what would steer a terminal."""
    return name if name.isprintable() and name else repr(name) if name else "nothing"
