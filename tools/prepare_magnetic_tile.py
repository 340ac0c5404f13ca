"""Door: writes a checkout of the Magnetic-Tile-Defect set as a grouped set."""

from dataclasses import dataclass
from pathlib import Path

from dinov2.config.command_line import option, parse
from dinov2.data.prepare.grouped_json_writer import describe_grouped_set
from dinov2.data.prepare.magnetic_tile import prepare_magnetic_tile
from dinov2.run.launch import exit_with


@dataclass(frozen=True)
class MagneticTileOptions:
    """Options of the command."""

    source: Path = option(help="checkout of github.com/abin24/Magnetic-tile-defect-datasets. (holds MT_Blowhole, ...)")
    output: Path = option(help="new or empty folder to write")
    seed: int = option(0, help="draws the splits")
    fractions: tuple[float, ...] = option((0.6, 0.2, 0.2), help="shares of train, val and test")


def main() -> int:
    """Writes the set and shows its counts."""
    options = parse(
        MagneticTileOptions,
        description="Writes the Magnetic-Tile-Defect set as a grouped set: one group per tile, with masks and splits.",
        example="python tools/prepare_magnetic_tile.py --source Magnetic-tile-defect-datasets. --output data/tiles",
    )
    prepare_magnetic_tile(options.source, options.output, options.seed, options.fractions)
    print(describe_grouped_set(options.output))
    return 0


if __name__ == "__main__":
    exit_with(main)
