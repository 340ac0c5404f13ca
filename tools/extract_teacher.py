"""Door: the teacher's backbone alone, under the names of released weights."""

from dataclasses import dataclass
from pathlib import Path

from dinov2.checkpoint.merge import extract_teacher
from dinov2.config.command_line import option, parse
from dinov2.run.launch import exit_with


@dataclass(frozen=True)
class ExtractOptions:
    """Options of the command."""

    source: Path = option(help="folder of a run, a rank file of a step, or a teacher_checkpoint.pth", positional=True)
    output: Path = option(help="new file, .pth or .safetensors", positional=True)


def main() -> int:
    """Extracts and says what was written."""
    options = parse(
        ExtractOptions,
        description="Writes the teacher's backbone, without heads, as a plain state dict.",
        example="python tools/extract_teacher.py outputs/vits14 backbone.pth",
    )
    print(extract_teacher(options.source, options.output))
    return 0


if __name__ == "__main__":
    exit_with(main)
