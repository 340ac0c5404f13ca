"""The command that predicts for photos: from weights and files to drawings, masks, depths and tables."""

import csv
import glob
import json
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self

from PIL import Image

from dinov2.config.command_line import option, parse
from dinov2.data.datasets.scan import find_images, is_image_name
from dinov2.data.decoding import decode_image, read_image_bytes, read_image_size
from dinov2.distributed import choose_device
from dinov2.eval.features import report_progress
from dinov2.logging import logging_to
from dinov2.predict.predictor import Predictor
from dinov2.tasks.package import load_task_package
from dinov2.tasks.predictions import Prediction, SaveOptions
from dinov2.tasks.task import PreparedImage
from dinov2.utils.errors import RunError


@dataclass(frozen=True)
class FoundPhoto:
    """A file to predict for.

    Attributes:
        path: of the photo.
        stem: name, without extension, of all files about it; with folders where a folder was searched. Each is unique.
    """

    path: Path
    stem: str


def find_photos(inputs: Sequence[str], output_dir: Path) -> list[FoundPhoto]:
    """Finds photos: files as they are named, images in and below folders, and images that match patterns (``**`` too).

    A photo that is meant twice counts once. What lies in the output folder is no input.

    Raises:
        FileNotFoundError: when there is no such file or folder, or no photo in a folder or behind a pattern.
    """
    output = output_dir.resolve()
    photos: list[FoundPhoto] = []
    seen: set[Path] = set()
    stems: set[str] = set()
    for name in inputs:
        found = [(path, stem) for path, stem in _look_up(name) if not path.resolve().is_relative_to(output)]
        if not found:
            raise FileNotFoundError(f"no photo in {name}")
        for path, stem in found:
            real = path.resolve()
            if real not in seen:
                seen.add(real)
                photos.append(FoundPhoto(path, _unused(stem, stems)))
    return photos


def _look_up(name: str) -> Iterator[tuple[Path, str]]:
    path = Path(name)
    if path.is_file():
        yield path, path.stem
    elif path.is_dir():
        for inner in find_images(path):
            yield path / inner, PurePosixPath(inner).with_suffix("").as_posix()
    elif glob.has_magic(name):
        for match in map(Path, sorted(glob.glob(name, recursive=True))):
            if match.is_file() and is_image_name(match.name):
                yield match, match.stem
    else:
        raise FileNotFoundError(f"no file, folder or pattern: {name}")


def _unused(stem: str, stems: set[str]) -> str:
    """A stem that no other photo has, on any file system: these may not tell upper from lower case."""
    number, candidate = 1, stem
    while candidate.casefold() in stems:
        number += 1
        candidate = f"{stem}_{number}"
    stems.add(candidate.casefold())
    return candidate


logger = logging.getLogger("dinov2")

_PNG_COMPRESSION = 3  # 0 to 9: drawings need not be small


class ResultFiles:
    """Writes everything about images below a folder; use it in a ``with`` block.

    Beside the files of `Prediction.save`: ``overlays/STEM.png``, ``predictions.jsonl`` (a line per image: ``image``,
    what `Prediction.to_dict` says, and the files; or ``image`` and ``error``), and ``predictions.csv``, one row each.
    A line is written when the files are complete. Tables of an earlier run in the same folder are replaced.

    Args:
        folder: made where needed.
        options: how predictions are written.
        overlay: whether to draw.
        value_range: values of the first and the last colour of all drawings; by default those of each image.
    """

    def __init__(
        self,
        folder: Path,
        *,
        options: SaveOptions | None = None,
        overlay: bool = True,
        value_range: tuple[float, float] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.options = options or SaveOptions()
        self.overlay = overlay
        self.value_range = value_range
        self._lines = (folder / "predictions.jsonl").open("w", encoding="utf-8")
        self._table = (folder / "predictions.csv").open("w", encoding="utf-8", newline="")
        self._rows: csv.DictWriter[str] | None = None

    def write(self, name: str, stem: str, image: Image.Image, prediction: Prediction) -> None:
        """Writes what there is about one image.

        Args:
            name: what the tables call it.
            stem: of its files.
            image: RGB.
            prediction: of it.
        """
        values = prediction.to_dict()
        files = prediction.save(self.folder, stem, self.options)
        if self.overlay:
            path = self.folder / "overlays" / f"{stem}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            drawing = prediction.draw(image, value_range=self.value_range)
            drawing.save(path, compress_level=_PNG_COMPRESSION)
            files["overlay"] = f"overlays/{stem}.png"
        row = {"image": name, **prediction.table_row(values)}
        if self._rows is None:
            self._rows = csv.DictWriter(self._table, list(row))
            self._rows.writeheader()
        self._rows.writerow(row)
        self._table.flush()
        self._append({"image": name, **values, **files})

    def write_failure(self, image: str, error: str) -> None:
        """Says why there is nothing about a photo."""
        self._append({"image": image, "error": error})

    def close(self) -> None:
        """Closes the tables; closing twice is harmless."""
        self._lines.close()
        self._table.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, line: dict[str, Any]) -> None:
        self._lines.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        self._lines.flush()


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
    prepared: PreparedImage


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
    value_range = check_value_range(options.depth_range)
    with logging_to(options.output_dir):
        photos = find_photos(options.input, options.output_dir)
        device = choose_device(options.device)
        package = load_task_package(options.weights, device)
        predictor = Predictor.of(package, batch_size=options.batch_size, flips=options.flips, scales=options.scales)
        name, at_once = package.task.name, predictor.batch_size
        logger.info("%s of %d images on %s, up to %d at once", name, len(photos), device, at_once)
        if package.task.max_images:
            logger.warning("this model is for parts of several images; here every image is a part of its own")
        saved = SaveOptions(score_maps=options.defect_maps, value_step=options.depth_step)
        with ResultFiles(
            options.output_dir, options=saved, overlay=options.overlay, value_range=value_range
        ) as results:
            infer_images(predictor, photos, results)
    return 0


def check_value_range(values: tuple[float, ...]) -> tuple[float, float] | None:
    """Two values that colours span, or None for none.

    Raises:
        ValueError: for another number of values, or when they do not increase.
    """
    if not values:
        return None
    if len(values) != 2 or not values[0] < values[1]:
        raise ValueError(f"--depth-range takes the least and the greatest depth, found {list(values)}")
    return values[0], values[1]


def infer_images(predictor: Predictor, photos: Sequence[FoundPhoto], results: ResultFiles) -> int:
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


def _outcomes(predictor: Predictor, photos: Sequence[FoundPhoto], results: ResultFiles) -> Iterator[bool]:
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


def _load(predictor: Predictor, found: FoundPhoto, data: bytes | OSError) -> _Loaded | _Failed:
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
