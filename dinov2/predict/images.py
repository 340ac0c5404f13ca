"""The command that predicts for images: from weights and files to drawings, masks, depths and tables."""

import csv
import glob
import json
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from dinov2.config.command_line import option, parse, run_as
from dinov2.data.datasets.scan import LeftOut, find_images
from dinov2.data.decoding import decode_image, read_image_size
from dinov2.data.reading import find_file, read_image_bytes
from dinov2.distributed import choose_device
from dinov2.eval.features import report_progress
from dinov2.logging import logging_to
from dinov2.predict.predictor import Predictor
from dinov2.tasks.package import load_task_package
from dinov2.tasks.predictions import Prediction, SaveOptions
from dinov2.tasks.task import PreparedImage
from dinov2.utils.errors import RunError
from dinov2.utils.untrusted_text import table_cell

logger = logging.getLogger("dinov2")

DEVICES = ("auto", "cpu", "cuda", "mps")
_PNG_COMPRESSION = 3  # 0 to 9: drawings need not be small
_MAX_PIXELS = 40_000_000  # of images that are in memory together, apart from a single larger one
_DECODING_THREADS = 4


@dataclass(frozen=True)
class InputFile:
    """A file to predict for.

    Attributes:
        path: of the image.
        stem: name, without extension, of all files about it; with folders where a folder was searched. Each is unique.
    """

    path: Path
    stem: str


def find_inputs(inputs: Sequence[str], output_dir: Path) -> list[InputFile]:
    """Finds images: files as they are named, those in and below folders, and those that match patterns (``**`` too).

    An image that is meant twice counts once. What lies in the output folder is no input.

    Raises:
        FileNotFoundError: when there is no such file or folder, or no image in a folder or behind a pattern.
    """
    output = output_dir.resolve()
    files: dict[Path, InputFile] = {}  # by their real path
    stems: set[str] = set()
    for name in inputs:
        found = [(path, stem) for path, stem in _look_up(name) if not path.resolve().is_relative_to(output)]
        if not found:
            raise FileNotFoundError(f"no image in {name}")
        for path, stem in found:
            if path.resolve() in files:
                continue
            number, unused = 1, stem
            while unused.casefold() in stems:  # file systems may not tell upper from lower case
                number += 1
                unused = f"{stem}_{number}"
            stems.add(unused.casefold())
            files[path.resolve()] = InputFile(path, unused)
    return list(files.values())


def _look_up(name: str) -> Iterator[tuple[Path, str]]:
    path = find_file(Path(name))
    if path.is_file():
        yield path, path.stem
    elif path.is_dir():
        for inner in find_images(path):
            yield path / inner, PurePosixPath(inner).with_suffix("").as_posix()
    elif glob.has_magic(name):
        left_out = LeftOut()
        for match in map(Path, sorted(glob.glob(name, recursive=True))):
            # Folders that the pattern itself names are meant.
            below = [part for part in match.parts[:-1] if part not in path.parts]
            if match.is_file() and left_out.takes("/".join([*below, match.name])):
                yield match, match.stem
        left_out.log(path)
    else:
        raise FileNotFoundError(f"no file, folder or pattern: {name}")


class ResultFiles(AbstractContextManager["ResultFiles"]):
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
        # In JSON, a name of no known encoding is read back from its escapes.
        self._lines = (folder / "predictions.jsonl").open("w", encoding="utf-8", errors="backslashreplace")
        self._table = (folder / "predictions.csv").open("w", encoding="utf-8", newline="")
        self._rows: Any = None

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
            self._rows = csv.writer(self._table)
            self._rows.writerow(map(table_cell, row))
        self._rows.writerow(map(table_cell, row.values()))
        self._table.flush()
        self._append({"image": name, **values, **files})

    def write_failure(self, image: str, error: str) -> None:
        """Says why there is nothing about an image."""
        self._append({"image": image, "error": error})

    def close(self) -> None:
        """Closes the tables; closing twice is harmless. A table of nothing has a header all the same."""
        if self._rows is None and not self._table.closed:
            csv.writer(self._table).writerow(["image"])
        self._lines.close()
        self._table.close()

    def __exit__(self, *error: object) -> None:
        self.close()

    def _append(self, line: dict[str, Any]) -> None:
        self._lines.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        self._lines.flush()


@dataclass(frozen=True, kw_only=True)
class InferImagesOptions:
    """Options of the command."""

    weights: Path = option(help="best.pth of run/train/finetune.py")
    input: tuple[str, ...] = option(help="images: files, folders (with those below them) and quoted patterns")
    output_dir: Path = option(help="folder for overlays, masks or depths, predictions.jsonl and predictions.csv")
    device: str = option("auto", help="where to compute", choices=DEVICES)
    batch_size: int | None = option(None, help="images per forward pass (usually what suits the device)")
    overlay: bool = option(True, help="draw each prediction on its image")
    flips: bool = option(False, help="average with the mirrored image")
    scales: tuple[float, ...] = option((1.0,), help="average over these sizes (segmentation and depth)")
    reference: Path | None = option(
        None,
        help="for a model that compares: one image without a defect, or a folder with one of the same name for each",
    )
    defect_maps: bool = option(False, help="segmentation: also write the probability of any defect per pixel")
    depth_step: float = option(1 / 256, help="depth of one level of the 16-bit images, in the model's unit")
    depth_range: tuple[float, ...] = option((), help="least and greatest depth of the colours (usually each image's)")


def main(argv: Sequence[str] | None = None) -> int:
    """Predicts for all images; returns the exit code."""
    options = parse(
        InferImagesOptions,
        argv,
        description=(
            "Predicts classes, masks or depths for images, and draws them. Unreadable images are skipped and counted."
        ),
        example=(
            "python run/infer/image.py --weights outputs/cracks/best.pth --input photos 'more/*.jpg' --output-dir found"
        ),
    )
    value_range = check_value_range(options.depth_range)
    with logging_to(options.output_dir):
        files = find_inputs(options.input, options.output_dir)
        device = choose_device(options.device)
        package = load_task_package(options.weights, device)
        predictor = Predictor.of(package, batch_size=options.batch_size, flips=options.flips, scales=options.scales)
        predictor.check_reference(given=options.reference is not None)
        references = None if options.reference is None else find_references(options.reference, files)
        name, at_once = package.task.name, predictor.batch_size
        logger.info("%s of %d images on %s, up to %d at once", name, len(files), device, at_once)
        if package.task.max_images:
            logger.warning("this model is for parts of several images; here every image is a part of its own")
        saved = SaveOptions(score_maps=options.defect_maps, value_step=options.depth_step)
        with ResultFiles(
            options.output_dir, options=saved, overlay=options.overlay, value_range=value_range
        ) as results:
            infer_images(predictor, files, results, references)
    return 0


def find_references(place: Path, files: Sequence[InputFile]) -> list[Path]:
    """What each file is compared with: the one image, or in a folder the one of its name.

    Raises:
        FileNotFoundError: there is no such file or folder, or none of the name of an input; the first is told, and how
            many there are.
    """
    place = find_file(place)
    if place.is_file():
        return [place] * len(files)
    if not place.is_dir():
        raise FileNotFoundError(f"--reference {place}: no such file or folder")
    names = [[find_file(place / f"{file.stem}{file.path.suffix}"), find_file(place / file.path.name)] for file in files]
    found = [next((path for path in candidates if path.is_file()), None) for candidates in names]
    missing = [file.path for file, path in zip(files, found, strict=True) if path is None]
    if missing:
        raise FileNotFoundError(
            f"{missing[0]}: its reference {place / missing[0].name} does not exist ({len(missing)} of {len(files)} "
            "images miss theirs)"
        )
    return [path for path in found if path is not None]


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


def infer_images(
    predictor: Predictor,
    files: Sequence[InputFile],
    results: ResultFiles,
    references: Sequence[Path] | None = None,
) -> int:
    """Predicts for images and writes what comes out.

    Files are read and prepared by a few threads while the network works.

    Args:
        predictor: of the model.
        files: images.
        results: takes what comes out.
        references: of each image one without a defect, for a model that compares.

    Returns:
        How many images could not be read or prepared; the log and the results name them.

    Raises:
        RunError: when that is true of all.
    """
    num_failed = sum(report_progress(_outcomes(predictor, files, results, references), "images", 1, len(files)))
    if num_failed == len(files):
        raise RunError(f"none of the {num_failed} images could be read; {results.folder}/predictions.jsonl says why")
    if num_failed:
        logger.warning("skipped %d of %d images that could not be read", num_failed, len(files))
    logger.info("results are in %s", results.folder)
    return num_failed


_Loaded = tuple[Image.Image, PreparedImage] | str  # why it could not be loaded


def _outcomes(
    predictor: Predictor, files: Sequence[InputFile], results: ResultFiles, references: Sequence[Path] | None
) -> Iterator[bool]:
    """Yields for every image, when it is done, whether it failed."""
    beside = dict(zip(files, references, strict=True)) if references is not None else {}
    with ThreadPoolExecutor(_DECODING_THREADS) as pool:
        following: list[tuple[InputFile, Future[_Loaded]]] = []
        for chunk in chain(_chunks(files, predictor.batch_size), [[]]):
            current = [(file, future.result()) for file, future in following]
            following = [
                (file, pool.submit(_load, predictor, file.path, data, beside.get(file))) for file, data in chunk
            ]
            prepared = [loaded[1] for _, loaded in current if not isinstance(loaded, str)]
            predictions = iter(predictor.predict_prepared(prepared))
            for file, loaded in current:
                if isinstance(loaded, str):
                    logger.warning("skipped: %s", loaded)
                    results.write_failure(str(file.path), loaded)
                else:
                    results.write(str(file.path), file.stem, loaded[0], next(predictions))
                yield isinstance(loaded, str)


def open_image(
    predictor: Predictor, data: bytes, name: str, reference: Path | None = None
) -> tuple[Image.Image, PreparedImage]:
    """The image of a file, RGB, and the same as the network sees it.

    Args:
        predictor: prepares it.
        data: content of the file.
        name: names the image in errors.
        reference: one without a defect, for a model that compares.

    Raises:
        UnreadableImageError: it is no image, or its reference is none.
        ValueError: it cannot be prepared.
    """
    preprocessing = predictor.preprocessing
    other = None if reference is None else preprocessing.reader.read(reference)
    if not preprocessing.chain.steps:
        image = decode_image(data, name, preprocessing.value_range)
        return image, predictor.prepare(image, reference=other)
    placed = preprocessing.reader.decode(data, name)
    return placed.shown, predictor.prepare(placed, reference=other)


def _load(predictor: Predictor, path: Path, data: bytes | OSError, reference: Path | None) -> _Loaded:
    try:
        if isinstance(data, OSError):
            raise data
        return open_image(predictor, data, str(path), reference)
    except OSError as error:  # names the file
        return str(error)
    except ValueError as error:
        return f"{path}: {error}"


def _chunks(files: Sequence[InputFile], most: int) -> Iterator[list[tuple[InputFile, bytes | OSError]]]:
    """Images that are in memory together, with the content of their files, or why it could not be read."""
    chunk: list[tuple[InputFile, bytes | OSError]] = []
    total = 0
    for file in files:
        data: bytes | OSError
        pixels = 0
        try:
            data = read_image_bytes(file.path)
            height, width = read_image_size(data, str(file.path))
            pixels = height * width
        except OSError as error:
            data = error
        if chunk and (len(chunk) == most or total + pixels > _MAX_PIXELS):
            yield chunk
            chunk, total = [], 0
        chunk.append((file, data))
        total += pixels
    if chunk:
        yield chunk


if __name__ == "__main__":
    run_as("infer_image")
