"""Door: how fast training is, and what share of it saving costs."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from dinov2.config import load_config
from dinov2.config.command_line import option, parse
from dinov2.distributed import distributed_session, is_main_process
from dinov2.run.launch import exit_with
from dinov2.train.benchmark_train import benchmark_train


@dataclass(frozen=True)
class BenchmarkOptions:
    """Options of the command."""

    overrides: tuple[str, ...] = option((), help="options of the config as key=value pairs", positional=True)
    config: Path = option(
        Path("configs/train/demo_parts_cpu.yaml"), help="YAML file of a run", aliases=("--config-file",)
    )
    save_every: int = option(50, help="iterations per save")
    rounds: int = option(3, help="blocks of that length of each kind: not saving, waiting for a save, saving beside")
    folder: Path | None = option(
        None, help="where the checkpoints go, to measure that disk; by default a temporary folder"
    )


def main() -> int:
    """Measures and prints."""
    options = parse(
        BenchmarkOptions,
        description="Measures images per second of training, and the share that saving takes, synchronously and in "
        "the background.",
        example="python tools/benchmark_train.py --config configs/train/elpv_quickstart.yaml --rounds 5",
    )
    config = load_config(options.config, options.overrides)
    with distributed_session(config.train.device) as device, tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        speed = benchmark_train(config, device, folder, save_every=options.save_every, rounds=options.rounds)
        if is_main_process():
            print(speed)
    return 0


if __name__ == "__main__":
    exit_with(main)
