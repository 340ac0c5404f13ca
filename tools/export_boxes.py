"""Door: writes predicted boxes as files that COCO's tools, Label Studio and CVAT read."""

from dataclasses import dataclass
from pathlib import Path

from dinov2.config.command_line import option, parse
from dinov2.data.loaders import make_dataset
from dinov2.data.prepare.box_files import export_boxes
from dinov2.run.launch import exit_with


@dataclass(frozen=True)
class ExportBoxesOptions:
    """Options of the command."""

    predictions: Path = option(help="predictions.jsonl that run/infer/image.py wrote")
    images: Path = option(help="folder that names of images in the files are relative to")
    output: Path = option(help="folder for the files")
    dataset: str = option("", help="dataset string of the images, whose classes and ids are kept; empty for none")
    url: str = option("", help="what Label Studio puts before names, such as /data/local-files/?d=parts/")


def main() -> int:
    """Writes the files."""
    options = parse(
        ExportBoxesOptions,
        description="Writes predicted boxes as COCO JSON and as files that Label Studio and CVAT import.",
        example="python tools/export_boxes.py --predictions out/predictions.jsonl --images data --output boxes",
    )
    dataset = make_dataset(dataset_str=options.dataset) if options.dataset else None
    export_boxes(options.predictions, options.output, images=options.images, dataset=dataset, url=options.url)
    return 0


if __name__ == "__main__":
    exit_with(main)
