"""Door: writes the X-SDD defects of steel strip as a grouped set."""

from dinov2.data.prepare.grouped_json_writer import prepare_by_command
from dinov2.data.prepare.steel_strip import prepare_x_sdd
from dinov2.run.launch import exit_with


def main() -> int:
    """Writes the set and shows its counts."""
    return prepare_by_command(
        prepare_x_sdd,
        description=(
            "Writes X-SDD (steel strip, seven classes) as a grouped set with splits. "
            "The source holds a folder of images per class, such as red_iron/."
        ),
        example="python tools/prepare_x_sdd.py --source X-SDD --output data/x_sdd",
    )


if __name__ == "__main__":
    exit_with(main)
