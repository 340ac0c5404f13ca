"""Door: one file with whole tensors from the rank files of a run."""

from dataclasses import dataclass
from pathlib import Path

from dinov2.checkpoint.merge import WHATS, merge_checkpoint
from dinov2.config.command_line import option, parse
from dinov2.run.launch import exit_with


@dataclass(frozen=True)
class MergeOptions:
    """Options of the command."""

    source: Path = option(
        help="folder of a run, whose newest good step is taken, or a rank file of a step", positional=True
    )
    output: Path = option(help="new file, .pth or .safetensors", positional=True)
    what: str = option("teacher", help="which network", choices=WHATS)


def main() -> int:
    """Merges and says what was written."""
    options = parse(
        MergeOptions,
        description="Puts the rank files of a step together into one file, on one processor and in little memory.",
        example="python tools/merge_checkpoint.py outputs/vits14 teacher.pth",
    )
    print(merge_checkpoint(options.source, options.output, what=options.what))
    return 0


if __name__ == "__main__":
    exit_with(main)
