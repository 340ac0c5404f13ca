"""The command that predicts for photos: from weights and files to drawings, masks, depths and tables."""

import csv
import glob
import json
import logging
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinov2.config.command_line import option, parse
from dinov2.data.datasets.scan import find_images, is_image_name
from dinov2.data.decoding import decode_image, read_image_bytes, read_image_size
from dinov2.distributed import choose_device
from dinov2.eval.features import report_progress
from dinov2.logging import logging_to
from dinov2.tasks.drawing import PRESENT_FROM, class_name, count_pixels, draw_overlay
from dinov2.tasks.inference import PreparedPhoto, TaskPredictor
from dinov2.tasks.package import TaskPackage, load_task_package
from dinov2.tasks.predictions import ClassPrediction, DepthPrediction, Prediction, SegmentationPrediction
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


def summarize(prediction: Prediction, classes: Sequence[str] = ()) -> dict[str, Any]:
    """Plain values for one photo.

    Args:
        prediction: of the photo.
        classes: names by index.

    Returns:
        Classification: ``label`` and ``score`` of the most probable class (``labels``, those from 0.5 on, where there
        may be several) and ``probabilities`` by name. Segmentation: ``pixels`` and mean ``scores`` by name of the
        classes that are there, and ``defect_score``, the largest probability of anything but class 0. Depth: ``unit``,
        ``min``, ``median``, ``mean``, ``max`` (None where nothing is known) and ``known``, the share of known pixels.
    """
    if isinstance(prediction, ClassPrediction):
        return _summarize_classes(prediction, classes)
    if isinstance(prediction, SegmentationPrediction):
        return _summarize_areas(prediction, classes)
    return _summarize_depth(prediction)


def table_header(task: str, classes: Sequence[str]) -> list[str]:
    """Columns of `table_row`."""
    if task == "classification":
        return ["image", "label", "score", *(f"probability {name}" for name in classes)]
    if task == "segmentation":
        return ["image", "width", "height", "defect_score", *(f"pixels {name}" for name in classes)]
    return ["image", "width", "height", "unit", "min", "median", "mean", "max", "known"]


def table_row(image: str, prediction: Prediction, summary: dict[str, Any], classes: Sequence[str]) -> list[Any]:
    """The numbers of `summarize` as a row under `table_header`."""
    if isinstance(prediction, ClassPrediction):
        label = ";".join(summary["labels"]) if prediction.multi_label else summary["label"]
        return [image, label, summary["score"], *summary["probabilities"].values()]
    if isinstance(prediction, SegmentationPrediction):
        height, width = prediction.labels.shape
        areas = [summary["pixels"].get(name, 0) for name in classes]
        return [image, width, height, summary["defect_score"], *areas]
    height, width = prediction.depth.shape
    return [image, width, height, *(summary[name] for name in ("unit", "min", "median", "mean", "max", "known"))]


def _summarize_classes(prediction: ClassPrediction, classes: Sequence[str]) -> dict[str, Any]:
    probabilities = {
        class_name(classes, index): _round(value) for index, value in enumerate(prediction.probabilities.tolist())
    }
    best = int(prediction.probabilities.argmax())
    score = _round(float(prediction.probabilities[best]))
    if not prediction.multi_label:
        return {"label": class_name(classes, best), "score": score, "probabilities": probabilities}
    there = [class_name(classes, int(index)) for index in np.flatnonzero(prediction.probabilities >= PRESENT_FROM)]
    return {"labels": there, "score": score, "probabilities": probabilities}


def _summarize_areas(prediction: SegmentationPrediction, classes: Sequence[str]) -> dict[str, Any]:
    pixels, sums = count_pixels(prediction.labels), count_pixels(prediction.labels, prediction.scores)
    present = {class_name(classes, int(index)): int(index) for index in np.flatnonzero(pixels)}
    return {
        "pixels": {name: int(pixels[index]) for name, index in present.items()},
        "scores": {name: _round(float(sums[index] / pixels[index])) for name, index in present.items()},
        "defect_score": _round(float(prediction.defect.max())),
    }


def _summarize_depth(prediction: DepthPrediction) -> dict[str, Any]:
    known = prediction.depth[np.isfinite(prediction.depth)]
    figures: dict[str, Any] = {"unit": prediction.unit, "min": None, "median": None, "mean": None, "max": None}
    if known.size:
        figures |= {
            "min": _round(float(known.min())),
            "median": _round(float(np.median(known))),
            "mean": _round(float(known.mean(dtype=np.float64))),
            "max": _round(float(known.max())),
        }
    return {**figures, "known": _round(known.size / prediction.depth.size)}


def _round(value: float) -> float:
    """Six significant digits: a float32 has no more, and lines stay short."""
    return value if value == 0 or not math.isfinite(value) else round(value, 5 - math.floor(math.log10(abs(value))))


logger = logging.getLogger("dinov2")

_MOST_LEVELS = 65_535  # of a 16-bit image
_PNG_COMPRESSION = 3  # 0 to 9: drawings need not be small


class RawFiles:
    """Writes masks and depths as they are, below a folder.

    Segmentation: ``masks/STEM.png``, 8 bits, the index of the class of every pixel; on demand ``defects/STEM.png``, 16
    bits, the probability that a pixel is not of class 0, times 65,535. Depth: ``depth/STEM.npy``, float32 ``[H, W]``,
    NaN where unknown, and ``depth/STEM.png``, 16 bits, the depth divided by ``depth_step`` and rounded, 0 where
    unknown; what does not fit is 65,535 there, and a warning says so. Classification: nothing.

    Args:
        folder: where the folders named above are made.
        defects: whether to write ``defects/``.
        depth_step: depth, in the model's unit, of one level of the 16-bit images.
    """

    def __init__(self, folder: Path, *, defects: bool = False, depth_step: float = 1 / 256) -> None:
        if depth_step <= 0:
            raise ValueError(f"depth_step must be above 0, found {depth_step}")
        self.folder = folder
        self.defects = defects
        self.depth_step = depth_step
        self._warned = False

    def write(self, stem: str, prediction: Prediction) -> dict[str, Any]:
        """Writes what there is for one photo; returns what was written, relative to the folder, by kind."""
        if isinstance(prediction, SegmentationPrediction):
            written = {"mask": self._save(prediction.labels, f"masks/{stem}.png")}
            if self.defects:
                levels = np.rint(prediction.defect * _MOST_LEVELS).astype(np.uint16)
                written["defect"] = self._save(levels, f"defects/{stem}.png")
            return written
        if isinstance(prediction, DepthPrediction):
            return self._write_depth(stem, prediction.depth)
        return {}

    def _write_depth(self, stem: str, depth: NDArray[np.float32]) -> dict[str, Any]:
        exact = self.folder / "depth" / f"{stem}.npy"
        exact.parent.mkdir(parents=True, exist_ok=True)
        np.save(exact, depth, allow_pickle=False)
        steps = np.nan_to_num(np.rint(depth / self.depth_step), nan=0.0)
        if not self._warned and steps.max() > _MOST_LEVELS:
            self._warned = True
            logger.warning(
                "%s: depths above %g do not fit into 16-bit images of step %g (the .npy files are exact); "
                "choose a larger --depth-step",
                stem, _MOST_LEVELS * self.depth_step, self.depth_step,
            )  # fmt: skip
        levels = steps.clip(0, _MOST_LEVELS).astype(np.uint16)
        image = self._save(levels, f"depth/{stem}.png")
        return {"depth": f"depth/{stem}.npy", "depth_image": image, "depth_step": self.depth_step}

    def _save(self, values: NDArray[np.uint8] | NDArray[np.uint16], name: str) -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(path)
        return name


class ResultFiles:
    """Writes everything about photos below a folder; use it in a ``with`` block.

    Beside `RawFiles`: ``overlays/STEM.png``, ``predictions.jsonl`` (a line per photo: ``image``, what `summarize` says,
    and the files; or ``image`` and ``error``) and ``predictions.csv`` (a row per photo). A photo's line is written when
    its files are complete. Tables of an earlier run in the same folder are replaced.

    Args:
        folder: made where needed.
        package: what the predictions come from.
        raw: writes masks and depths; by default below ``folder``.
        overlay: whether to draw.
        depth_range: depths of the first and the last colour of all drawings; by default those of each photo.
    """

    def __init__(
        self,
        folder: Path,
        package: TaskPackage,
        *,
        raw: RawFiles | None = None,
        overlay: bool = True,
        depth_range: tuple[float, float] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.classes = package.classes
        self.overlay = overlay
        self.depth_range = depth_range
        self._raw = raw or RawFiles(folder)
        self._lines = (folder / "predictions.jsonl").open("w", encoding="utf-8")
        self._table = (folder / "predictions.csv").open("w", encoding="utf-8", newline="")
        self._rows = csv.writer(self._table)
        self._rows.writerow(table_header(package.task, self.classes))

    def write(self, image: str, stem: str, photo: Image.Image, prediction: Prediction) -> None:
        """Writes what there is about one photo.

        Args:
            image: what the tables call it.
            stem: of its files.
            photo: RGB.
            prediction: of it.
        """
        summary = summarize(prediction, self.classes)
        files = self._raw.write(stem, prediction)
        if self.overlay:
            path = self.folder / "overlays" / f"{stem}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            drawing = draw_overlay(photo, prediction, self.classes, depth_range=self.depth_range)
            drawing.save(path, compress_level=_PNG_COMPRESSION)
            files["overlay"] = f"overlays/{stem}.png"
        self._rows.writerow(table_row(image, prediction, summary, self.classes))
        self._table.flush()
        self._append({"image": image, **summary, **files})

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
