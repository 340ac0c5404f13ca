"""Door: draws the metrics of a run into pictures."""

from dataclasses import dataclass
from pathlib import Path

from dinov2.config.command_line import option, parse
from dinov2.logging.training_plots import plot_training
from dinov2.run.launch import exit_with


@dataclass(frozen=True)
class PlotOptions:
    """Options of the command."""

    output_dir: Path = option(help="folder of the run, which holds metrics.jsonl", positional=True)


def main() -> int:
    """Draws the run and names the pictures."""
    options = parse(
        PlotOptions,
        description="Draws losses, schedules, throughput and k-NN scores of a run into its folder plots/.",
        example="python tools/plot_run.py outputs/vits14",
    )
    for path in plot_training(options.output_dir / "metrics.jsonl", options.output_dir):
        print(path)
    return 0


if __name__ == "__main__":
    exit_with(main)
