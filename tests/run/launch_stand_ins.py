"""Commands that jobs of the tests run: importable by their module's name, as `dinov2.run.job` demands."""

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dinov2.config.command_line import option
from dinov2.distributed import all_gather_objects, distributed_session, get_rank


@dataclass(frozen=True)
class StandInOptions:
    """Options of the commands below, as launching expects them."""

    overrides: tuple[str, ...] = option((), help="pairs", positional=True)
    config: Path | None = option(None, help="YAML file", aliases=("--config-file",))
    output_dir: str = option("", help="folder")
    resume: bool = option(True, help="go on")
    train_dataset: str | None = option(None, help="as an evaluator names its data")
    dry_run: bool = option(False, help="only say what would be done")


def meet(words: Sequence[str]) -> int:
    """Every process tells every other who it is, and the first writes it down."""
    folder = Path(words[-1])
    with distributed_session("cpu"):
        torch.distributed.barrier()
        met = all_gather_objects((get_rank(), int(os.environ["LOCAL_RANK"]), os.getpid()))
        if get_rank() == 0:
            (folder / "met.json").write_text(json.dumps(met))
    return 0


def fail(words: Sequence[str]) -> int:
    """Fails as a command does on wrong data."""
    raise ValueError("the data is wrong")


def stop_once(words: Sequence[str]) -> int:
    """Saves and stops when it is asked to for the first time; when it comes back, its work is done."""
    folder, rank = Path(words[-1]), os.environ["SUBMITIT_LOCAL_GLOBALID"]
    saved = folder / f"saved.{rank}"
    if saved.exists():
        return 0
    asked: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    (folder / f"pid.{rank}").write_text(str(os.getpid()))
    deadline = time.monotonic() + 60
    while not asked and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)  # an iteration ends
    saved.write_text("")
    signal.signal(signal.SIGTERM, before)
    sys.stderr.write("saved\n")
    return 75
