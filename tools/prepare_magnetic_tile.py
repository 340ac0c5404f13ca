"""Door: writes a checkout of the Magnetic-Tile-Defect set as a grouped set."""

from dinov2.data.prepare.grouped_json_writer import prepare_by_command
from dinov2.data.prepare.magnetic_tile import prepare_magnetic_tile
from dinov2.run.launch import exit_with


def main() -> int:
    """Writes the set and shows its counts."""
    return prepare_by_command(
        prepare_magnetic_tile,
        description=(
            "Writes the Magnetic-Tile-Defect set as a grouped set: one group per tile, with masks and splits. "
            "The source is a checkout of github.com/abin24/Magnetic-tile-defect-datasets. (holds MT_Blowhole, ...)."
        ),
        example="python tools/prepare_magnetic_tile.py --source Magnetic-tile-defect-datasets. --output data/tiles",
    )


if __name__ == "__main__":
    exit_with(main)
