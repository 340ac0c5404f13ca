"""Kills a small pretraining run at random instants, again and again, and looks whether it ends as if nothing happened.

The command is the real one. To spend no time on importing torch, every life of a run is a fork of this process, which
imports everything once and computes nothing before the end.
"""

import math
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dinov2.data.prepare.demo_parts import make_demo_parts
from dinov2.train.run_equality import run_differences
from dinov2.train.stress_life import Life, StressFault, named_step, unfinished_saves

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
MOST_LET_THROUGH = 3  # saves before the one that is hit
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
        verdict = "every run ended bit for bit as the undisturbed one" if not self.faults else "FAULTS:"
        return "\n".join([*(f"{name:<40}{value:>8}" for name, value in rows), verdict, *self.faults])


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
        saves = self._random.randint(1, 1 + MOST_LET_THROUGH)
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
