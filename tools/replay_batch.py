"""Door: looks at a batch that gave NaN or infinity during a run."""

from dataclasses import dataclass
from pathlib import Path

from dinov2.config.command_line import option, parse
from dinov2.run.launch import exit_with
from dinov2.train.replay import replay_batch


@dataclass(frozen=True)
class ReplayOptions:
    """Options of the command."""

    output_dir: Path = option(help="folder of the run, which holds bad_batches/", positional=True)
    iteration: int | None = option(None, help="of the batch; by default the newest")
    rank: int | None = option(None, help="process whose batch it was; by default the first that wrote one")
    weights: str = option("", help="rank files to use, with {rank}; by default the newest step before the batch")
    device: str = option("auto", help="where to compute: auto, cpu, cuda, mps")


def main() -> int:
    """Prints what forward and backward give; 0 when all is finite now, else 1."""
    options = parse(
        ReplayOptions,
        description="Runs forward and backward on a batch that a run has skipped, and names the first module and "
        "operation whose result is not finite; exit code 0 when all is finite with these weights, else 1.",
        example="python tools/replay_batch.py outputs/vits14 --iteration 1234",
    )
    found = replay_batch(
        options.output_dir, options.iteration, rank=options.rank, weights=options.weights, device=options.device
    )
    print(found)
    return 0 if found.is_finite else 1


if __name__ == "__main__":
    exit_with(main)
