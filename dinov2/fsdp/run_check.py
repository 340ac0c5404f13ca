"""Verifying every checkpoint of a run's folder: what is good, and what a run would go on from."""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from dinov2.fsdp.integrity import Step, file_fault, find_steps, is_before_checksums, step_fault, tagged_name
from dinov2.fsdp.restore import candidates
from dinov2.utils.checksums import MISSING, NO_CHECKSUM, shown_fault, sidecar

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
