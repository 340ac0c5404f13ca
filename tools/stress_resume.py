"""Door: kills a small run many times and looks whether it ends as one that was left alone."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from dinov2.config.command_line import option, parse
from dinov2.run.launch import exit_with
from dinov2.train.stress import StressPlan, stress_resume


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
