"""The command that predicts for photos: from weights and files to drawings, masks, depths and tables."""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from PIL import Image

from dinov2.config.command_line import option, parse
from dinov2.data.decoding import decode_image, read_image_bytes, read_image_size
from dinov2.distributed import choose_device
from dinov2.eval.progress import report_progress
from dinov2.logging import logging_to
from dinov2.tasks.image_inputs import FoundPhoto, find_photos
from dinov2.tasks.package import load_task_package
from dinov2.tasks.predictor import PreparedPhoto, TaskPredictor
from dinov2.tasks.result_files import RawFiles, ResultFiles
from dinov2.utils.errors import RunError

logger = logging.getLogger("dinov2")

DEVICES = ("auto", "cpu", "cuda", "mps")

_MOST_PIXELS = 40_000_000  # of photos that are in memory together, apart from a single larger one
_DECODING_THREADS = 4


@dataclass(frozen=True, kw_only=True)
class InferImagesOptions:
    """Options of the command."""

    weights: Path = option(help="best.pth of run/train/finetune.py")
    input: tuple[str, ...] = option(help="photos: files, folders (with those below them) and quoted patterns")
    output_dir: Path = option(help="folder for overlays, masks or depths, predictions.jsonl and predictions.csv")
    device: str = option("auto", help="where to compute", choices=DEVICES)
    batch_size: int | None = option(None, help="photos per forward pass (usually what suits the device)")
    overlay: bool = option(True, help="draw each prediction on its photo")
    flips: bool = option(False, help="average with the mirrored photo")
    scales: tuple[float, ...] = option((1.0,), help="average over these sizes (segmentation and depth)")
    defect_maps: bool = option(False, help="segmentation: also write the probability of any defect per pixel")
    depth_step: float = option(1 / 256, help="depth of one level of the 16-bit images, in the model's unit")
    depth_range: tuple[float, ...] = option((), help="least and greatest depth of the colours (usually each photo's)")


_File = tuple[FoundPhoto, bytes | OSError]


@dataclass(frozen=True, eq=False)
class _Loaded:
    found: FoundPhoto
    photo: Image.Image
    prepared: PreparedPhoto


@dataclass(frozen=True)
class _Failed:
    found: FoundPhoto
    cause: str


def main(argv: Sequence[str] | None = None) -> int:
    """Predicts for all photos; returns the exit code."""
    options = parse(
        InferImagesOptions,
        argv,
        description=(
            "Predicts classes, masks or depths for photos, and draws them. Unreadable photos are skipped and counted."
        ),
        example=(
            "python run/infer/image.py --weights outputs/cracks/best.pth --input photos 'more/*.jpg' --output-dir found"
        ),
    )
    depth_range = check_depth_range(options.depth_range)
    with logging_to(options.output_dir):
        photos = find_photos(options.input, options.output_dir)
        device = choose_device(options.device)
        package = load_task_package(options.weights, device)
        predictor = TaskPredictor(package, batch_size=options.batch_size, flips=options.flips, scales=options.scales)
        logger.info("%s of %d photos on %s, up to %d at once", package.task, len(photos), device, predictor.batch_size)
        if package.per_part:
            logger.warning("this model judges parts from several photos; here every photo is a part of its own")
        raw = RawFiles(options.output_dir, defects=options.defect_maps, depth_step=options.depth_step)
        with ResultFiles(
            options.output_dir, package, raw=raw, overlay=options.overlay, depth_range=depth_range
        ) as results:
            infer_images(predictor, photos, results)
    return 0


def check_depth_range(values: tuple[float, ...]) -> tuple[float, float] | None:
    """Two depths that colours span, or None for none.

    Raises:
        ValueError: for another number of values, or when they do not increase.
    """
    if not values:
        return None
    if len(values) != 2 or not values[0] < values[1]:
        raise ValueError(f"--depth-range takes the least and the greatest depth, found {list(values)}")
    return values[0], values[1]


def infer_images(predictor: TaskPredictor, photos: Sequence[FoundPhoto], results: ResultFiles) -> int:
    """Predicts for photos and writes what comes out.

    Files are read and prepared by a few threads while the network works.

    Returns:
        How many photos could not be read or prepared; the log and the results name them.

    Raises:
        RunError: when that is true of all.
    """
    num_failed = 0
    outcomes = _outcomes(predictor, photos, results)
    for failed in report_progress(outcomes, "photos", 1, len(photos)):
        num_failed += failed
    if num_failed == len(photos):
        raise RunError(f"none of the {num_failed} photos could be read; {results.folder}/predictions.jsonl says why")
    if num_failed:
        logger.warning("skipped %d of %d photos that could not be read", num_failed, len(photos))
    logger.info("results are in %s", results.folder)
    return num_failed


def _outcomes(predictor: TaskPredictor, photos: Sequence[FoundPhoto], results: ResultFiles) -> Iterator[bool]:
    """Yields for every photo, when it is done, whether it failed."""
    with ThreadPoolExecutor(_DECODING_THREADS) as pool:
        following: list[Future[_Loaded | _Failed]] = []
        for chunk in chain(_chunks(photos, predictor.batch_size), [[]]):
            current, following = following, [pool.submit(_load, predictor, *file) for file in chunk]
            outcomes = [future.result() for future in current]
            loaded = [outcome for outcome in outcomes if isinstance(outcome, _Loaded)]
            predictions = iter(predictor.predict_prepared([outcome.prepared for outcome in loaded]))
            for outcome in outcomes:
                name = str(outcome.found.path)
                if isinstance(outcome, _Loaded):
                    results.write(name, outcome.found.stem, outcome.photo, next(predictions))
                else:
                    logger.warning("skipped: %s", outcome.cause)
                    results.write_failure(name, outcome.cause)
                yield isinstance(outcome, _Failed)


def _load(predictor: TaskPredictor, found: FoundPhoto, data: bytes | OSError) -> _Loaded | _Failed:
    name = str(found.path)
    try:
        if isinstance(data, OSError):
            raise data
        photo = decode_image(data, name)
        return _Loaded(found, photo, predictor.prepare(photo))
    except OSError as error:  # names the file
        return _Failed(found, str(error))
    except ValueError as error:
        return _Failed(found, f"{name}: {error}")


def _chunks(photos: Sequence[FoundPhoto], most: int) -> Iterator[list[_File]]:
    """Photos that are in memory together, with the content of their files, or why it could not be read."""
    chunk: list[_File] = []
    total = 0
    for photo in photos:
        data, pixels = _read(photo.path)
        if chunk and (len(chunk) == most or total + pixels > _MOST_PIXELS):
            yield chunk
            chunk, total = [], 0
        chunk.append((photo, data))
        total += pixels
    if chunk:
        yield chunk


def _read(path: Path) -> tuple[bytes | OSError, int]:
    try:
        data = read_image_bytes(path)
        height, width = read_image_size(data, str(path))
    except OSError as error:
        return error, 0
    return data, height * width
