"""Door: applies a chain of preprocessing steps to a folder of images."""

from dataclasses import dataclass
from pathlib import Path

from dinov2.config.command_line import option, parse
from dinov2.data.preprocessing import Chain
from dinov2.data.preprocessing.folder import PREVIEW, draw_preview, preprocess_folder
from dinov2.data.value_range import ValueRange
from dinov2.run.launch import exit_with


@dataclass(frozen=True)
class PreprocessOptions:
    """Options of the command."""

    input: Path = option(help="folder with images; those in its subfolders too")
    output: Path = option(help="folder for the results; the same command goes on where it ended")
    preprocessing: Path = option(help="YAML file with the list of steps, see docs/preprocessing.md")
    range: str = option("", help="LO,HI: values of more than 8 bits that become black and white, such as 0,4095")
    num_workers: int = option(0, help="processes; 0 for one")
    preview: int = option(0, help="only draw so many images, before and after each step, as OUTPUT/preview.png")


def main() -> int:
    """Processes the folder, or draws the preview."""
    options = parse(
        PreprocessOptions,
        description="Applies preprocessing steps to every image of a folder, in parallel; interrupted, it goes on.",
        example="python tools/preprocess_images.py --input raw --output clean --preprocessing chain.yaml --preview 4",
    )
    if options.preview < 0 or options.num_workers < 0:
        raise ValueError("--preview and --num-workers must not be negative")
    chain = Chain.read(options.preprocessing)
    value_range = ValueRange.parse(options.range) if options.range else None
    if options.preview:
        path = options.output / PREVIEW
        draw_preview(options.input, path, chain, count=options.preview, value_range=value_range)
        print(path)
        return 0
    count = preprocess_folder(
        options.input, options.output, chain, value_range=value_range, num_workers=options.num_workers
    )
    print(f"{count} images processed, in {options.output}")
    return 0


if __name__ == "__main__":
    exit_with(main)
