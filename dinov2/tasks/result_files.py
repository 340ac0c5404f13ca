"""Files about predictions: drawings for people, masks, depths and tables for programs."""

import csv
import json
import logging
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinov2.tasks.overlays import draw_overlay
from dinov2.tasks.package import TaskPackage
from dinov2.tasks.predictions import DepthPrediction, Prediction, SegmentationPrediction
from dinov2.tasks.summaries import summarize, table_header, table_row

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
