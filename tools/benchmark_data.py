"""Door: how fast images are decoded and cut into crops."""

from dataclasses import dataclass
from pathlib import Path

from dinov2.config import load_config
from dinov2.config.command_line import option, parse
from dinov2.run.launch import exit_with
from dinov2.train.benchmark_data import benchmark_data


@dataclass(frozen=True)
class BenchmarkOptions:
    """Options of the command."""

    overrides: tuple[str, ...] = option((), help="options of the config as key=value pairs", positional=True)
    config: Path | None = option(None, help="YAML file of a run", aliases=("--config-file",))
    num_images: int = option(200, help="images for the times of one image")
    seconds: float = option(10.0, help="how long the loader is run")


def main() -> int:
    """Measures and prints."""
    options = parse(
        BenchmarkOptions,
        description="Measures the data path of a run: decoding, crops, and the loader with its workers.",
        example="python tools/benchmark_data.py --config configs/train/demo_parts_cpu.yaml train.num_workers=2",
    )
    config = load_config(options.config, options.overrides)
    print(benchmark_data(config, num_images=options.num_images, seconds=options.seconds))
    return 0


if __name__ == "__main__":
    exit_with(main)
