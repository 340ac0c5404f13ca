"""Door: verifies every checkpoint of a run's folder, and says what a run would go on from."""

from dataclasses import dataclass
from pathlib import Path

from dinov2.checkpoint.integrity import check_run
from dinov2.config.command_line import option, parse
from dinov2.run.launch import exit_with


@dataclass(frozen=True)
class CheckOptions:
    """Options of the command."""

    output_dir: Path = option(help="folder of the run, which holds model_*.rank_*.pth", positional=True)


def main() -> int:
    """Prints a table; 0 when the step that last_checkpoint names is good, else 1."""
    options = parse(
        CheckOptions,
        description="Verifies the checksums of all checkpoints of a run; exit code 0 when the newest finished one is "
        "good, else 1.",
        example="python tools/check_run.py outputs/vits14",
    )
    found = check_run(options.output_dir)
    print(found)
    return 0 if found.good else 1


if __name__ == "__main__":
    exit_with(main)
