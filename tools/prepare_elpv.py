"""Door: writes the ELPV solar cells as a grouped set."""

from dataclasses import dataclass
from pathlib import Path

from dinov2.config.command_line import option, parse
from dinov2.data.prepare.elpv import prepare_elpv
from dinov2.data.prepare.grouped_json_writer import describe_grouped_set
from dinov2.run.launch import exit_with


@dataclass(frozen=True)
class ElpvOptions:
    """Options of the command."""

    output: Path = option(help="new or empty folder to write")
    root: Path | None = option(None, help="folder with labels.csv and images/ (default: the package elpv-dataset)")
    seed: int = option(0, help="draws the splits")
    fractions: tuple[float, ...] = option((0.6, 0.2, 0.2), help="shares of train, val and test")
    link: bool = option(False, help="link to the images instead of copying them")


def main() -> int:
    """Writes the set and shows its counts."""
    options = parse(
        ElpvOptions,
        description="Writes the ELPV solar cells (pip install elpv-dataset) as a grouped set with splits.",
        example="python tools/prepare_elpv.py --output data/elpv",
    )
    prepare_elpv(options.output, options.seed, options.fractions, root=options.root, link=options.link)
    print(describe_grouped_set(options.output))
    return 0


if __name__ == "__main__":
    exit_with(main)
