"""The command that sets a model's thresholds anew from good parts, such as those of the line that it is to watch."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinov2.config.command_line import option, parse, run_as
from dinov2.data.datasets.base import ImageDataset, ImageSelection
from dinov2.data.datasets.image_folder import ImageFolder
from dinov2.data.loaders import make_dataset
from dinov2.distributed import choose_device
from dinov2.eval.anomaly.operating_point import OperatingPoint
from dinov2.logging import logging_to
from dinov2.models.task_model import TaskModel
from dinov2.predict.images import DEVICES
from dinov2.tasks.evaluation import predict_set, show_set
from dinov2.tasks.package import TaskPackage, load_task_package, rewrite_task_package

logger = logging.getLogger("dinov2")

_PROMISES = "."  # stands in the names of what a threshold promises


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions:
    """Options of the command."""

    model: Path = option(help="best.pth of run/train/finetune.py", positional=True)
    good: str = option(
        help="good parts that nothing was learnt from: a folder (folders in it are parts) or a dataset string"
    )
    add: str = option("", help="other good parts, which the memory learns before, likewise")
    output: Path | None = option(None, help="file to write instead of the model itself")
    false_alarm_rate: float | None = option(
        None, help="share of good parts that may be called anomalous; none: that of the model's training"
    )
    margin: float | None = option(None, help="raises the thresholds by this share of them; none likewise")
    device: str = option("auto", help="where to compute", choices=DEVICES)
    num_workers: int = option(0, help="image-decoding processes")

    def __post_init__(self) -> None:
        if self.false_alarm_rate is not None and not 0 < self.false_alarm_rate < 1:
            raise ValueError(f"--false-alarm-rate {self.false_alarm_rate} must be in (0, 1)")
        if self.margin is not None and not 0 <= self.margin < np.inf:
            raise ValueError(f"--margin {self.margin} must be at least 0")


def main(argv: Sequence[str] | None = None) -> int:
    """Calibrates; returns the exit code."""
    options = parse(
        CalibrateOptions,
        argv,
        description="Sets the thresholds of an anomaly model from good parts alone, and says what they promise.",
        example="dinov2 calibrate outputs/tiles/best.pth --good images/good --false-alarm-rate 0.01",
    )
    with logging_to(None):
        calibrate(options)
    return 0


def calibrate(options: CalibrateOptions) -> dict[str, float]:
    """Does what the options say, and returns the new thresholds.

    Raises:
        FileNotFoundError: there is no such model or folder.
        ValueError: the model has no thresholds from good parts, or there are too few.
        OSError: naming an image that cannot be read.
    """
    package = load_task_package(options.model, choose_device(options.device))
    state = None
    if options.add:
        assert isinstance(package.model, TaskModel)
        package.task.learn_more(
            package.model,
            _open(options.add, package),
            lambda images: show_set(package, images, package.task.config.evaluation, num_workers=options.num_workers),
        )
        state = {name: value.cpu() for name, value in package.model.state_dict().items()}
    images = _open(options.good, package)
    config = package.task.config.evaluation
    found = package.task.thresholds_from_good(
        (prediction for _, prediction in predict_set(package, images, config, num_workers=options.num_workers)),
        images.get_group_ids(),
        false_alarm_rate=options.false_alarm_rate,
        margin=options.margin,
    )
    for name, value in found.items():
        if _PROMISES in name:
            continue
        before = package.thresholds.get(name)
        was = "" if before is None else f" (so far {before:.4g})"
        point = OperatingPoint.of_thresholds(name, found)
        logger.info("threshold per %s %.4g%s%s", name, value, was, "" if point is None else f": {point.promise()}")
    output = options.output or options.model
    rewrite_task_package(options.model, output, thresholds=found, state=state)
    logger.info("from %d images of %d good parts; written to %s", len(images), len(set(images.get_group_ids())), output)
    return found


def _open(source: str, package: TaskPackage) -> ImageDataset:
    """Images of a folder or a dataset string, prepared as the model's own were."""
    prepared = package.preprocessing
    prepared.chain.check_files()
    if Path(source).is_dir():
        dataset: ImageDataset = ImageFolder(source, labels="none")
    elif source.partition(":")[1]:
        dataset = make_dataset(dataset_str=source, value_range=prepared.value_range)
    else:
        raise FileNotFoundError(f"{source} is no folder, and no dataset string such as ImageFolder:root=images/good")
    # Whatever a dataset string says: images are prepared as they will be where the model is used.
    dataset.value_range, dataset.light = prepared.value_range, prepared.light
    dataset.preprocessing = prepared.chain
    try:
        good = package.task.good_images(dataset)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    if len(good) < len(dataset):
        others = len(dataset) - len(good)
        logger.warning("%s: %d of %d images are left out: their parts are not good", source, others, len(dataset))
    return ImageSelection(dataset, good)


if __name__ == "__main__":
    run_as("calibrate")
