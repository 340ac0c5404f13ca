"""One life of a run under stress: the real command in forked processes, watched from outside and killed."""

import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from dinov2.checkpoint.integrity import find_steps, parse_rank_file, tagged_name, tags
from dinov2.models import build
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.train import command, train

PATIENCE_SECONDS = 120.0
LINES_SHOWN = 12
_RESUMED = re.compile(r"resumed from \S+ \(iteration (\d+)\)")
_PROGRESS = re.compile(r" iteration (\d+)/\d+ \(epoch")
_SAVING = ("model_", "last_checkpoint")


class StressFault(Exception):
    """Something happened that must not happen."""


class Life:
    """The processes of one start of the command; each leads a process group of its own, as under a launcher.

    This process must not have computed anything with torch: it is forked.

    Args:
        number: of this life.
        words: of the command.
        output: folder of the run.
        scratch: folder for what processes print, and for how they find each other.
        processes: how many.
    """

    def __init__(self, number: int, words: Sequence[str], output: Path, scratch: Path, processes: int) -> None:
        self.number = number
        self.output = output
        self._log = output / "log" / "log.txt"
        self._log_start = self._log.stat().st_size if self._log.exists() else 0
        self._printed = scratch / f"printed_{number}.txt"
        self._printed.touch()
        self._codes: dict[int, int] = {}
        sys.stdout.flush()
        sys.stderr.flush()
        self._ids = [self._fork(words, rank, processes, scratch / f"store_{number}") for rank in range(processes)]

    def _fork(self, words: Sequence[str], rank: int, processes: int, store: Path) -> int:
        child = os.fork()
        if child == 0:
            _live(words, rank, processes, store, self._printed)
        return child

    @property
    def told(self) -> str:
        """What this life has written to the log so far."""
        if not self._log.exists():
            return ""
        with self._log.open("rb") as file:
            file.seek(self._log_start)
            return file.read().decode("utf-8", errors="replace")

    @property
    def first_iteration(self) -> int | None:
        """Where training began: after a checkpoint, or at 0; None if it had not come so far."""
        told = self.told
        if resumed := _RESUMED.search(told):
            return int(resumed.group(1)) + 1
        return 0 if _PROGRESS.search(told) else None

    @property
    def last_iteration(self) -> int:
        """The last iteration that was finished; -1 for none."""
        return max((int(done) - 1 for done in _PROGRESS.findall(self.told)), default=-1)

    def ended(self) -> bool:
        """Whether every process has ended well.

        Raises:
            StressFault: when one has ended with an error, or was killed by something else.
        """
        for rank, child in enumerate(self._ids):
            if rank not in self._codes:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    self._codes[rank] = os.waitstatus_to_exitcode(status)
        for rank, code in self._codes.items():
            if code:
                lines = self._printed.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES_SHOWN:]
                raise StressFault("\n".join([f"life {self.number}: rank {rank} ended with code {code}:", *lines]))
        return len(self._codes) == len(self._ids)

    def wait(self, seconds: float) -> bool:
        """Lets it go on for so long, at most to its end; whether it has ended."""
        limit = time.monotonic() + seconds
        while not (over := self.ended()) and (left := limit - time.monotonic()) > 0:
            time.sleep(min(left, 0.005))
        return over

    def wait_for_iterations(self) -> bool:
        """Waits until training begins; whether the life has ended before."""
        limit = time.monotonic() + PATIENCE_SECONDS
        while not (over := self.ended()) and self.first_iteration is None:
            self._check(limit)
            time.sleep(0.005)
        return over

    def wait_for_save(self) -> bool:
        """Waits until a file of a checkpoint begins to be written; whether the life has ended before."""
        limit = time.monotonic() + PATIENCE_SECONDS
        before = unnamed_files(self.output)
        while not (over := self.ended()) and unnamed_files(self.output) <= before:
            self._check(limit)
            time.sleep(0.0005)
        return over

    def wait_for_end(self) -> None:
        """Lets it live.

        Raises:
            StressFault: when it does not end well, or not at all.
        """
        if not self.wait(PATIENCE_SECONDS):
            raise StressFault(f"life {self.number} did not end in {PATIENCE_SECONDS:.0f} s")

    def kill(self, order: Sequence[int] = (), lag: float = 0.0) -> None:
        """Kills every process with all its children.

        Args:
            order: ranks, the first to die first.
            lag: seconds between two deaths.
        """
        for place, rank in enumerate(order or range(len(self._ids))):
            if place:
                time.sleep(lag)
            if rank not in self._codes:
                os.killpg(self._ids[rank], signal.SIGKILL)
                self._codes[rank] = os.waitstatus_to_exitcode(os.waitpid(self._ids[rank], 0)[1])

    def _check(self, limit: float) -> None:
        if time.monotonic() > limit:
            raise StressFault(f"life {self.number} stands still:\n{self.told}")


def _live(words: Sequence[str], rank: int, processes: int, store: Path, printed: Path) -> NoReturn:
    """What a forked process does instead of going on."""
    code = 1
    try:
        os.setpgid(0, 0)
        with printed.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        torch.set_num_threads(1)
        _leave_out_what_is_slow()
        if processes > 1:
            meeting = dist.FileStore(str(store), processes)  # type: ignore[attr-defined]
            dist.init_process_group("gloo", store=meeting, rank=rank, world_size=processes)
        code = command.main(words)
        if processes > 1:
            dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _leave_out_what_is_slow() -> None:
    """In this process, which becomes a life, ``vit_tiny`` names a still smaller network, and no plots are drawn."""
    small: Mapping[str, Any] = {"vit_tiny": partial(DinoVisionTransformer, embed_dim=24, depth=2, num_heads=2)}
    build.ARCHITECTURES = small
    train.plot_training = lambda metrics_path, output_dir: []  # type: ignore[attr-defined]


def named_step(output: Path) -> int:
    """The newest step that a process has named as finished; -1 for none."""
    parsed = parse_rank_file(tagged_name(output))
    return parsed[1] if parsed else -1


def unnamed_files(output: Path) -> set[str]:
    """Files of checkpoints that are being written, or that a killed process has left."""
    if not output.is_dir():
        return set()
    return {name for name in os.listdir(output) if name.endswith(".tmp") and name[1:].startswith(_SAVING)}


def unfinished_saves(output: Path) -> set[tuple[str, int]]:
    """What tells that a save was cut off: files without their name, steps that are not named, tags that differ."""
    found = {(name, 0) for name in unnamed_files(output)}
    named = named_step(output)
    for step in find_steps(output):
        if step.number > named:
            found |= {(step.path(rank).name, step.path(rank).stat().st_mtime_ns) for rank in step.ranks}
    said = {parse_rank_file(tag.read_text(encoding="utf-8").strip()) for tag in tags(output)}
    return found | ({("tags that name different steps", named)} if len(said) > 1 else set())
