"""Kills a small pretraining run at random instants, again and again, and compares its end with an undisturbed run.

The command is the real one. To spend no time on importing torch, every life of a run is a fork of this process, which
imports everything once and computes nothing before the end.
"""

import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from dinov2.checkpoint.integrity import find_steps, parse_rank_file, tagged_name, tags
from dinov2.config.command_line import option, parse
from dinov2.data.prepare.demo_parts import make_demo_parts
from dinov2.models import build
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.run.launch import exit_with
from dinov2.train import command, train

CLOCK = ("progress/seconds",)
"""Entries of a checkpoint that the machine's speed decides."""
LENGTHS = ("metrics_bytes",)
"""Lengths of files that hold times, written with as many digits as they need."""
TEACHER_OPTIONS = ("config",)
"""Options beside a teacher, which name the run's folder."""


def run_differences(ours: Path, expected: Path) -> list[str]:
    """Where the last checkpoint, the teacher files and ``metrics.jsonl`` of two run folders differ.

    What depends on the machine's speed (``timing`` in the metrics, `CLOCK` and `LENGTHS` in a checkpoint) is left out,
    and so are `TEACHER_OPTIONS`.

    Returns:
        One line for each difference; empty when the runs ended alike.
    """
    steps = [find_steps(folder)[:1] for folder in (ours, expected)]
    found = [(step.name, step.ranks) for newest in steps for step in newest]
    if len(found) != 2 or found[0] != found[1]:
        return [f"the newest checkpoints are {found}"]
    files = [path.relative_to(expected) for path in sorted(expected.rglob("teacher_checkpoint.pth"))]
    files += [steps[1][0].path(rank).relative_to(expected) for rank in steps[1][0].ranks]
    lines = []
    for file in files:
        if not (ours / file).is_file():
            lines.append(f"{file} is missing")
            continue
        contents = [torch.load(folder / file, map_location="cpu", weights_only=True) for folder in (ours, expected)]
        lines += [f"{file}: {where}" for where in content_differences(*contents)]
    return lines + record_differences(ours / "metrics.jsonl", expected / "metrics.jsonl")


def content_differences(ours: Any, expected: Any, where: str = "") -> Iterator[str]:
    """Places, such as ``model/student.backbone.norm.weight``, where two nested values are not the same bit for bit."""
    if where in CLOCK + LENGTHS + TEACHER_OPTIONS:
        return
    if type(ours) is not type(expected):
        yield f"{where} is a {type(ours).__name__}, expected a {type(expected).__name__}"
    elif isinstance(expected, Mapping):
        if ours.keys() != expected.keys():
            yield f"{where or 'top level'} holds {sorted(map(str, ours.keys() ^ expected.keys()))} on one side only"
        for key in expected.keys() & ours.keys():
            yield from content_differences(ours[key], expected[key], f"{where}/{key}" if where else str(key))
    elif isinstance(expected, Tensor):
        if (ours.dtype, ours.shape) != (expected.dtype, expected.shape) or _bytes(ours) != _bytes(expected):
            yield f"{where} differs"
    elif isinstance(expected, list | tuple):
        if len(ours) != len(expected):
            yield f"{where} has {len(ours)} entries, expected {len(expected)}"
        else:
            for number, pair in enumerate(zip(ours, expected, strict=True)):
                yield from content_differences(*pair, f"{where}/{number}")
    elif ours != expected:
        yield f"{where} is {ours!r}, expected {expected!r}"


def record_differences(ours: Path, expected: Path) -> list[str]:
    """Lines in which two metrics files differ outside ``timing``, at most the first; missing lines count."""
    lines = [path.read_text(encoding="utf-8").splitlines() if path.is_file() else [] for path in (ours, expected)]
    for number, pair in enumerate(zip(*lines, strict=False), start=1):
        if _without_timing(pair[0]) != _without_timing(pair[1]):
            return [f"{ours.name} line {number}: {pair[0]}, expected {pair[1]}"]
    if len(lines[0]) != len(lines[1]):
        return [f"{ours.name} has {len(lines[0])} lines, expected {len(lines[1])}"]
    return []


def _without_timing(line: str) -> str:
    record = json.loads(line)
    record.pop("timing", None)
    return json.dumps(record)


def _bytes(tensor: Tensor) -> bytes:
    """All bits: unlike numbers, zeros of both signs differ and NaNs may be equal."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


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
            meeting = dist.FileStore(str(store), processes)
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
    train.plot_training = lambda *args, **options: []


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
    named_by_tags = {parse_rank_file(tag.read_text(encoding="utf-8").strip()) for tag in tags(output)}
    return found | ({("tags that name different steps", named)} if len(named_by_tags) > 1 else set())


# Masks, crops and drop path are on.
OPTIONS = (
    *(
        f"{head}.{option}"
        for head in ("dino", "ibot")
        for option in ("head_n_prototypes=64", "head_hidden_dim=32", "head_bottleneck_dim=16")
    ),
    "student.arch=vit_tiny",
    "student.patch_size=8",
    "student.drop_path_rate=0.2",
    "student.layerscale=0.1",
    "crops.global_crops_size=32",
    "crops.local_crops_size=16",
    "crops.local_crops_number=2",
    "optim.warmup_epochs=1",
    "train.batch_size_per_gpu=4",
    "train.saveckp_freq=1",
    "train.keep_last=2",
    "train.log_period=1",
    "train.device=cpu",
    "evaluation.probe_images=8",
    "evaluation.image_size=32",
)
LIFE_SHARE = 0.4  # of an undisturbed run's time from its first iteration: a run dies several times
AIMED_SHARE = 0.4  # of the kills wait for a save and fall into it
AIMED_SECONDS = 0.03  # after the save has begun
MAX_SAVES_BEFORE = 3  # saves before the one that is hit
LAG_SECONDS = 0.1  # between the deaths of the processes of one life


@dataclass(frozen=True)
class StressPlan:
    """What is to be done.

    Attributes:
        kills: how often runs are killed, over as many runs as it takes.
        processes: of each run.
        save_every: iterations between two checkpoints.
        iterations: of each run; a multiple of ``save_every``.
        workers: data-loading processes of each process.
        seed: draws the instants; what they hit depends on the machine's speed.
        seconds: after which nothing is killed any more, however many kills are missing; 0 for no limit.

    Raises:
        ValueError: for numbers that make no sense.
    """

    kills: int = 200
    processes: int = 1
    save_every: int = 2
    iterations: int = 40
    workers: int = 0
    seed: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        for name in ("kills", "processes", "save_every", "iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.iterations % self.save_every:
            raise ValueError(f"iterations ({self.iterations}) must be a multiple of save_every ({self.save_every})")


@dataclass
class StressReport:
    """What happened.

    Attributes:
        kills: lives that were ended by SIGKILL.
        in_saves: of these, those that left a save unfinished: a file without its name, or a step that is not named yet.
        aimed: of the kills, those that waited for a save to begin.
        restarts: lives that went on from a checkpoint.
        fresh: lives after a kill that began anew, as no checkpoint had been named.
        lost: iterations that were done again because of a kill.
        runs: runs that were killed, came to their end, and were compared with the undisturbed one.
        seconds: all together.
        faults: what must not happen; empty if all is well.
    """

    kills: int = 0
    in_saves: int = 0
    aimed: int = 0
    restarts: int = 0
    fresh: int = 0
    lost: int = 0
    runs: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        rows = (
            ("kills", f"{self.kills}"),
            ("  that cut off a save", f"{self.in_saves}"),
            ("  that waited for a save to begin", f"{self.aimed}"),
            ("restarts from a checkpoint", f"{self.restarts}"),
            ("restarts before the first checkpoint", f"{self.fresh}"),
            ("iterations done twice", f"{self.lost} ({self.lost / max(self.kills, 1):.1f} per kill)"),
            ("runs compared with the undisturbed one", f"{self.runs}"),
            ("faults", f"{len(self.faults)}"),
            ("seconds", f"{self.seconds:.0f}"),
        )
        summary = "every run ended bit for bit as the undisturbed one" if not self.faults else "FAULTS:"
        return "\n".join([*(f"{name:<40}{value:>8}" for name, value in rows), summary, *self.faults])


def stress_resume(plan: StressPlan, folder: Path | None = None) -> StressReport:
    """Kills and restarts runs until ``plan.kills`` is reached, and lets the last one come to its end.

    This process must not have computed anything with torch before: it forks.

    Args:
        plan: what is to be done.
        folder: where to work, new or empty; by default a temporary one, deleted when all is well.
    """
    began = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="stress_")) if folder is None else folder
    make_demo_parts(work / "parts", parts=12, photos=2, image_size=48)
    stress = _Stress(plan, work)
    try:
        stress.run()
    except StressFault as fault:
        stress.report.faults.append(str(fault))
    if stress.report.faults:
        stress.report.faults.append(f"all files are kept in {work}")
    elif folder is None:
        shutil.rmtree(work)
    stress.report.seconds = time.monotonic() - began
    return stress.report


class _Stress:
    def __init__(self, plan: StressPlan, work: Path) -> None:
        self.plan = plan
        self.report = StressReport()
        self._work = work
        self._random = random.Random(plan.seed)
        self._lives = 0
        self._limit = time.monotonic() + plan.seconds if plan.seconds else math.inf
        self._whole_seconds = 0.0  # of an undisturbed run, from its first iteration

    def run(self) -> None:
        """All runs. What differs at their ends is noted; anything else that is wrong raises."""
        whole = self._work / "undisturbed"
        with self._life(whole) as life:
            life.wait_for_iterations()
            began = time.monotonic()
            life.wait_for_end()
            self._whole_seconds = time.monotonic() - began
        outputs: list[Path] = []
        while self._goes_on():
            if len(outputs) > self.report.kills + 2:
                raise StressFault("runs come to their end before they are killed: take more iterations")
            outputs.append(self._work / f"killed_{len(outputs)}")
            self._kill_until_done(outputs[-1])
        for output in outputs:  # torch computes only now that nothing is forked any more
            self.report.faults += [f"{output.name}: {line}" for line in run_differences(output, whole)]
            self.report.runs += 1

    def _goes_on(self) -> bool:
        return self.report.kills < self.plan.kills and time.monotonic() < self._limit

    def _kill_until_done(self, output: Path) -> None:
        """One run, from its birth to its end."""
        done, killed = -1, False
        while True:
            saved, signs = named_step(output), unfinished_saves(output)
            with self._life(output) as life:
                was_killed = self._goes_on() and self._until_killed(life)
                if not was_killed:
                    life.wait_for_end()
                first = life.first_iteration
                if first is not None:
                    if first <= saved:
                        raise StressFault(f"life {life.number} began at {first}, though {saved} was saved")
                    if killed:
                        self.report.restarts += first > 0
                        self.report.fresh += first == 0
                        self.report.lost += max(0, done + 1 - first)
                    done = max(first - 1, life.last_iteration)
            if not was_killed:
                return
            killed = True
            self.report.kills += 1
            self.report.in_saves += not unfinished_saves(output) <= signs

    def _until_killed(self, life: Life) -> bool:
        """Whether the life was killed, and did not come to its end before."""
        aimed = self._random.random() < AIMED_SHARE
        seconds = self._random.uniform(0, AIMED_SECONDS if aimed else LIFE_SHARE * self._whole_seconds)
        saves = self._random.randint(1, 1 + MAX_SAVES_BEFORE)
        ranks = self._random.sample(range(self.plan.processes), self.plan.processes)
        lag = self._random.choice((0.0, self._random.uniform(0, LAG_SECONDS)))
        if life.wait_for_iterations():
            return False
        for _ in range(saves if aimed else 0):
            if life.wait_for_save():
                return False
        if life.wait(seconds):
            return False
        life.kill(ranks, lag)
        self.report.aimed += aimed
        return True

    @contextmanager
    def _life(self, output: Path) -> Iterator[Life]:
        """A life that is over at the end of the block."""
        plan = self.plan
        words = (
            f"train.dataset_path=GroupedJSON:split=TRAIN:root={self._work / 'parts'}",
            f"train.output_dir={output}",
            f"train.OFFICIAL_EPOCH_LENGTH={plan.save_every}",
            f"optim.epochs={plan.iterations // plan.save_every}",
            f"evaluation.eval_period_iterations={plan.iterations // 2}",
            f"train.num_workers={plan.workers}",
            f"train.seed={plan.seed}",
            *OPTIONS,
        )
        self._lives += 1
        life = Life(self._lives, words, output, self._work, plan.processes)
        try:
            yield life
        finally:
            life.kill()


@dataclass(frozen=True)
class StressOptions:
    """Options of the command."""

    kills: int = option(200, help="how often to kill, over as many runs as it takes")
    processes: int = option(1, help="training processes of a run")
    save_every: int = option(2, help="iterations between checkpoints")
    iterations: int = option(40, help="iterations of a run")
    workers: int = option(0, help="data-loading processes of each process")
    seed: int = option(0, help="draws the instants")
    seconds: float = option(0.0, help="kill nothing after this time, however many kills are missing; 0: no limit")
    folder: Path | None = option(None, help="new folder to work in; by default a temporary one")


def main() -> int:
    """Kills, prints what happened; 0 if every run ended like the undisturbed one."""
    options = parse(
        StressOptions,
        description="Kills a small pretraining run with SIGKILL at random instants and inside saves, restarts it, and "
        "compares its end with an undisturbed run, bit for bit.",
        example="python tools/stress_resume.py --kills 200 --processes 2",
    )
    given = dataclasses.asdict(options)
    folder = given.pop("folder")
    report = stress_resume(StressPlan(**given), folder)
    print(report)
    return 1 if report.faults else 0


if __name__ == "__main__":
    exit_with(main)
