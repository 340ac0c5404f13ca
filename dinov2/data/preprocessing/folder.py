"""A chain applied to a folder of images: in parallel, resumable, with what it was written beside the results."""

import contextlib
import csv
import hashlib
import io
import json
import logging
import math
import multiprocessing
import os
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image, ImageDraw
from skimage import segmentation
from tqdm import tqdm

from dinov2.data.decoding import decode_levels, readable_endings
from dinov2.data.preprocessing.chain import Chain
from dinov2.data.preprocessing.regions import region_table
from dinov2.data.preprocessing.step import Frame, Pixels, top_of
from dinov2.data.reading import read_image_bytes
from dinov2.data.value_range import ValueRange
from dinov2.utils.errors import RunError
from dinov2.utils.files import file_digest, write_atomically, write_text_atomically
from dinov2.utils.untrusted_text import table_cell

logger = logging.getLogger("dinov2")

PROVENANCE, RECORDS, REGIONS, PREVIEW = "provenance.json", "images.jsonl", "regions.csv", "preview.png"

_SHOWN = 5  # images that failed, in a message
_TILE = 256  # pixels along the longer side of an image in a preview
_CAPTION = 16


@dataclass(frozen=True)
class _Job:
    """One image to be processed: where it lies, and where its results go."""

    name: str
    root: Path
    output: Path
    target: str
    chain: Chain
    value_range: ValueRange | None


def preprocess_folder(
    root: str | Path,
    output: str | Path,
    chain: Chain,
    *,
    value_range: ValueRange | None = None,
    num_workers: int = 0,
) -> int:
    """Applies a chain to every image below a folder.

    Writes ``output/images/...`` with the folders of ``root`` (PNG; TIFF where there are other than 1 or 3 channels),
    ``output/masks/...`` (white on black) and ``output/regions.csv`` where a step looks for regions, ``images.jsonl``
    with a row per image (its SHA-256, where the result begins in it) and ``provenance.json`` (chain, versions,
    calibration). The same call goes on where an earlier one ended, and does images again that have changed.

    Args:
        root: folder with images.
        output: new or empty folder, or one that the same chain has filled; not ``root`` or below it.
        chain: the steps.
        value_range: of images of more than 8 bits, see `decode_levels`.
        num_workers: processes; 0 for this one.

    Returns:
        How many images were processed by this call.

    Raises:
        FileNotFoundError: ``root`` holds no image.
        ValueError: ``output`` lies in ``root``, or holds results of something else.
        RunError: images failed; all others are done.
    """
    root, output = Path(root), Path(output)
    names = _find_images(root)
    if output.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"the output {output} lies in the input {root}, and would be its own input the next time")
    targets = _targets(names)
    _begin(output, _provenance(chain, value_range))
    done = _read_records(output / RECORDS)
    jobs = [
        _Job(name, root, output, targets[name], chain, value_range)
        for name in names
        if not _is_done(done.get(name), root / name, output, targets[name])
    ]
    if len(jobs) < len(names):
        logger.info("%d of %d images are done already", len(names) - len(jobs), len(names))
    failed = []
    with contextlib.closing(_run(jobs, num_workers)) as results, (output / RECORDS).open("a", encoding="utf-8") as file:
        for job, record in tqdm(results, total=len(jobs), unit="image", disable=None):
            if "error" in record:
                failed.append(record["error"])
                logger.error("%s", record["error"])
                continue
            done[job.name] = record
            file.write(json.dumps(record) + "\n")
            file.flush()
    _write_regions(output / REGIONS, [done[name] for name in names if name in done])
    if failed:
        shown = "\n  ".join(failed[:_SHOWN])
        raise RunError(f"{len(failed)} of {len(names)} images failed, all others are in {output}:\n  {shown}")
    return len(jobs)


def draw_preview(
    root: str | Path, path: str | Path, chain: Chain, *, count: int, value_range: ValueRange | None = None
) -> None:
    """Draws some images, evenly spread over a folder, before the chain and after each of its steps, a row per image.

    Images of 16 bits are stretched from their darkest to their brightest value. Regions are outlined in yellow.

    Args:
        root: folder with images.
        path: PNG file to write; its folder is made where needed.
        chain: the steps.
        count: how many images.
        value_range: of images of more than 8 bits, see `decode_levels`.

    Raises:
        FileNotFoundError: ``root`` holds no image.
        PreprocessingError: a step failed.
    """
    names = _find_images(Path(root))
    chosen = [names[index] for index in sorted({round(place) for place in np.linspace(0, len(names) - 1, count)})]
    rows = []
    for name in chosen:
        image = decode_levels(read_image_bytes(Path(root) / name), str(Path(root) / name), value_range)
        row: list[tuple[str, Image.Image]] = []
        num_channels = 0
        for step, frame in chain.trace(image, name):
            row.append((step, _tile(frame, frame.channels[-1] if len(frame.channels) > num_channels else frame.image)))
            num_channels = len(frame.channels)
        rows.append(row)
    sheet = Image.new("RGB", (len(rows[0]) * (_TILE + 4), len(rows) * (_TILE + _CAPTION + 4)), "white")
    for number, (name, row) in enumerate(zip(chosen, rows, strict=True)):
        for column, (caption, tile) in enumerate(row):
            left, top = column * (_TILE + 4), number * (_TILE + _CAPTION + 4)
            sheet.paste(tile, (left, top + _CAPTION))
            shown = name.encode("ascii", "replace").decode()[-40:] if column == 0 else caption
            ImageDraw.Draw(sheet).text((left + 2, top + 2), shown, fill="black")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: sheet.save(file, "PNG"))


def _find_images(root: Path) -> list[str]:
    """Paths of the images below a folder, relative to it, with ``/``, in order."""
    endings = readable_endings()
    found = sorted(
        (Path(folder) / name).relative_to(root).as_posix()
        for folder, _, names in os.walk(root)
        for name in names
        if Path(name).suffix.lower() in endings and not name.startswith(".")
    )
    if not found:
        missing = "holds no image" if root.is_dir() else "is no folder"
        raise FileNotFoundError(f"{root} {missing}; endings that are read: {' '.join(sorted(endings))}")
    return found


def _targets(names: Sequence[str]) -> dict[str, str]:
    """Where the result of each image goes, without the ending: names that differ only in theirs keep it."""
    stems = [str(Path(name).with_suffix("").as_posix()) for name in names]
    return {name: stem if stems.count(stem) == 1 else name for name, stem in zip(names, stems, strict=True)}


def _provenance(chain: Chain, value_range: ValueRange | None) -> dict[str, Any]:
    """What the results depend on, beside the images."""
    calibration = [path for step in chain.steps for path in step.files]
    return {
        "preprocessing": chain.to_values(),
        "value_range": value_range and value_range.ends,
        "calibration_sha256": {path: file_digest(path) for path in calibration},
        "versions": {"numpy": np.__version__, "opencv": cv2.__version__, "scikit-image": version("scikit-image")},
    }


def _begin(output: Path, provenance: Mapping[str, Any]) -> None:
    """Makes the folder for the results, or checks that the same chain has filled it."""
    path = output / PROVENANCE
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        differing = [key for key in provenance if not isinstance(found, dict) or found.get(key) != provenance[key]]
        if differing:
            raise ValueError(
                f"{output} holds results of another {' and '.join(differing)} (see {path}); choose another folder"
            )
        return
    if output.exists() and (not output.is_dir() or any(entry.name != PREVIEW for entry in output.iterdir())):
        raise ValueError(f"{output} is not empty and was not written by this command; choose another folder")
    output.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, json.dumps(provenance, indent=2) + "\n")


def _read_records(path: Path) -> dict[str, Any]:
    """The newest row of each image; a last line that was cut off is none."""
    records = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
            records[record["image"]] = record
        except (ValueError, KeyError, TypeError):
            logger.warning("%s: a line was cut off, its image is done again", path)
    return records


def _stamp(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _is_done(record: Any, source: Path, output: Path, target: str) -> bool:
    if record is None or record["stamp"] != _stamp(source) or not record["output"].startswith(f"images/{target}."):
        return False
    return all((output / record[kind]).is_file() for kind in ("output", "mask") if record.get(kind))


def _run(jobs: Sequence[_Job], num_workers: int) -> Generator[tuple[_Job, dict[str, Any]], None, None]:
    if not num_workers:
        yield from ((job, _process(job)) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")
    workers = ProcessPoolExecutor(num_workers, context, initializer=cv2.setNumThreads, initargs=(1,))
    try:
        yield from zip(jobs, workers.map(_process, jobs), strict=True)
    finally:
        workers.shutdown(cancel_futures=True)  # when interrupted, only what has begun is waited for


def _process(job: _Job) -> dict[str, Any]:
    """Processes one image and writes its results; returns its row, or the error."""
    source = job.root / job.name
    try:
        data = read_image_bytes(source)
        frame = job.chain(decode_levels(data, str(source), job.value_range), str(source))
    except (ValueError, OSError) as error:
        return {"error": str(error)}
    written = _write_image(job.output / "images" / job.target, frame.stacked)
    record = {
        "image": job.name,
        "output": written.relative_to(job.output).as_posix(),
        "sha256": hashlib.sha256(data).hexdigest(),
        "stamp": _stamp(source),
        "origin": frame.origin,
        "full_size": frame.full_size,
    }
    if frame.labels is not None:
        mask = _write_image(job.output / "masks" / job.target, (frame.labels > 0).astype(np.uint8) * np.uint8(255))
        record |= {"mask": mask.relative_to(job.output).as_posix(), "regions": region_table(frame)}
    return record


def _write_image(stem: Path, image: Pixels) -> Path:
    image = image[..., 0] if image.shape[2:] == (1,) else image
    stem.parent.mkdir(parents=True, exist_ok=True)
    if image.ndim == 3 and image.shape[2] != 3:
        path = stem.with_name(stem.name + ".tif")
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, image, photometric="minisblack", planarconfig="contig")
        content = buffer.getvalue()
    else:
        path = stem.with_name(stem.name + ".png")
        is_coded, coded = cv2.imencode(".png", image if image.ndim == 2 else image[..., ::-1])
        assert is_coded, "PNG holds every image of 8 or 16 bits"
        content = coded.tobytes()
    write_atomically(path, lambda file: file.write(content))
    return path


def _write_regions(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    rows = [{"image": record["image"], **row} for record in records for row in record.get("regions", ())]
    if not rows:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: table_cell(value) for name, value in row.items()} for row in rows)
    write_text_atomically(path, text.getvalue())


def _tile(frame: Frame, image: Pixels) -> Image.Image:
    """A small picture of what a step made, with the borders of regions."""
    image = image if image.ndim == 2 or image.shape[2] == 3 else image[..., 0]
    shown: npt.NDArray[Any] = image.astype(np.float32) / top_of(image)
    if image.dtype == np.uint16:
        shown = (shown - shown.min()) / max(float(np.ptp(shown)), 1e-6)
    picture = np.dstack([shown] * 3) if shown.ndim == 2 else shown
    levels = np.rint(picture * 255).astype(np.uint8)
    if frame.labels is not None and frame.labels.any():
        levels[segmentation.find_boundaries(frame.labels)] = (255, 220, 0)
    factor = _TILE / max(levels.shape[:2])
    size = (max(1, math.floor(levels.shape[1] * factor)), max(1, math.floor(levels.shape[0] * factor)))
    return Image.fromarray(levels).resize(size, Image.Resampling.BOX if factor < 1 else Image.Resampling.NEAREST)
