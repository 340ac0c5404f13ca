"""Door: writes the NEU surface defects of steel strip as a grouped set."""

from dinov2.data.prepare.grouped_json_writer import prepare_by_command
from dinov2.data.prepare.steel_strip import prepare_neu
from dinov2.run.launch import exit_with


def main() -> int:
    """Writes the set and shows its counts."""
    return prepare_by_command(
        prepare_neu,
        description=(
            "Writes the NEU surface defects (steel strip, six classes) as a grouped set with boxes and splits. "
            "The source holds IMAGES/crazing_1.jpg and ANNOTATIONS/crazing_1.xml, and so on."
        ),
        example="python tools/prepare_neu.py --source NEU-DET --output data/neu",
    )


if __name__ == "__main__":
    exit_with(main)
