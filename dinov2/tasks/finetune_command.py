"""The command ``finetune``: from a config to a trained inspector."""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from dinov2.config import load_task_config
from dinov2.config.command_line import option, parse
from dinov2.distributed import distributed_session, get_rank, get_world_size, is_main_process
from dinov2.logging import logging_to
from dinov2.logging.run_folder import prepare_run_folder
from dinov2.tasks.fine_tune import fine_tune
from dinov2.tasks.overfit import overfit
from dinov2.utils.interruption import until_signal

logger = logging.getLogger("dinov2")


@dataclass(frozen=True)
class FinetuneCommand:
    """Options of the command; everything about the run itself is in the config."""

    load_options: ClassVar = staticmethod(load_task_config)

    overrides: tuple[str, ...] = option((), help="options of the config as key=value pairs", positional=True)
    config: Path | None = option(None, help="YAML file with the run's options", aliases=("--config-file",))
    output_dir: str = option("", help="folder of the run; the same as train.output_dir=…")
    resume: bool = option(True, help="go on from the newest checkpoint of the run's folder, if there is one")
    overfit: int = option(
        0, help="debugging: learn this many training images by heart, say whether that works, and keep nothing"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the words after its name; returns the exit code."""
    command = parse(
        FinetuneCommand,
        argv,
        description="Trains a head for classification, segmentation or depth on a pretrained backbone.",
        example="python run/train/finetune.py --config configs/task/demo_parts_depth.yaml",
    )
    if command.overfit < 0:
        raise ValueError(f"--overfit takes a number of images, at least 1; found {command.overfit}")
    pairs = [*command.overrides, *([f"train.output_dir={command.output_dir}"] if command.output_dir else [])]
    config = load_task_config(command.config, pairs)
    with distributed_session(config.train.device, timeout_minutes=config.train.process_group_timeout_minutes) as device:
        if command.overfit:
            logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
            return overfit(config, command.overfit, device)
        output_dir = prepare_run_folder(config.train.output_dir)
        with logging_to(output_dir, get_rank()):
            logger.info("%d process(es) on %s; the run's folder is %s", get_world_size(), device, output_dir)
            code = until_signal(lambda: fine_tune(config, output_dir=output_dir, device=device, resume=command.resume))
            if code == 0 and is_main_process():
                logger.info("done: %s", output_dir)
            return code
