"""Door: draws a small grouped set for trying every task without any data."""

from dataclasses import dataclass
from pathlib import Path

from dinov2.config.command_line import option, parse
from dinov2.data.prepare.demo_parts import make_demo_parts
from dinov2.data.prepare.grouped_json_writer import describe_grouped_set
from dinov2.run.launch import exit_with


@dataclass(frozen=True)
class DemoOptions:
    """Options of the command."""

    output: Path = option(help="new or empty folder to write")
    parts: int = option(60, help="number of parts; every third is defective")
    photos: int = option(4, help="photos of each part")
    seed: int = option(0, help="draws everything")
    image_size: int = option(256, help="side of an image in pixels")


def main() -> int:
    """Draws the set and shows its counts."""
    options = parse(
        DemoOptions,
        description="Draws metal plates, some defective, with labels, groups, masks, boxes and height maps.",
        example="python tools/make_demo_parts.py --output data/demo_parts",
    )
    make_demo_parts(options.output, options.parts, options.photos, options.seed, options.image_size)
    print(describe_grouped_set(options.output))
    return 0


if __name__ == "__main__":
    exit_with(main)
