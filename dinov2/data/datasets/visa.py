"""VisA: twelve kinds of objects, good in training, with masks of the anomalies in the test set."""

import csv
from pathlib import Path
from typing import Unpack

import numpy as np
import numpy.typing as npt

from dinov2.data.datasets.base import ListedImages, Transforms
from dinov2.data.datasets.dense_targets import IGNORED, MaskSource, read_class_mask

_COLUMNS = ("object", "split", "label", "image", "mask")
_LABELS = {"normal": 0, "anomaly": 1}
_VALUES = 255  # masks number the kinds of anomalies


class VisA(ListedImages, MaskSource):
    """Images of one category or of all, normal (0) or anomalous (1), as a table of splits lists them.

    The table is ``split_csv/1cls.csv`` with the columns object, split, label, image, mask; paths are relative to the
    root. Every kind of anomaly in a mask is a defect.

    Reference: Zou et al., SPot-the-Difference Self-Supervised Pre-training for Anomaly Detection and Segmentation,
    ECCV 2022.
    """

    classes = ("normal", "anomaly")
    mask_classes = ("background", "defect")

    def __init__(
        self,
        root: str | Path,
        split: str,
        category: str = "",
        table: str = "1cls",
        **transforms: Unpack[Transforms],
    ) -> None:
        """Reads the table; no image is opened.

        Args:
            root: folder that holds ``split_csv`` and the categories.
            split: ``TRAIN`` or ``TEST``, in any case.
            category: such as ``pcb1``; empty for all.
            table: name of the file in ``split_csv``, such as ``2cls_fewshot``.
            **transforms: see `ImageDataset`.

        Raises:
            FileNotFoundError: there is no such table.
            ValueError: it lacks columns, has another label, an anomaly without a mask, or no image of the split.
        """
        root, name = Path(root), split.strip().lower()
        if name not in ("train", "test"):
            raise ValueError(f"unknown split {split!r}; VisA has TRAIN and TEST")
        file = root / "split_csv" / f"{table}.csv"
        if not file.is_file():
            raise FileNotFoundError(f"there is no table of splits {file}")
        with file.open(encoding="utf-8", newline="") as opened:
            reader = csv.DictReader(opened)
            if missing := set(_COLUMNS) - set(reader.fieldnames or ()):
                raise ValueError(f"{file} lacks the columns {', '.join(sorted(missing))} of {', '.join(_COLUMNS)}")
            rows = [row for row in reader if row["split"] == name and category in ("", row["object"])]
        if not rows:
            raise ValueError(f"{file} lists no image of split {name}" + (f" and object {category}" if category else ""))
        for row in rows:
            if row["label"] not in _LABELS or (row["label"] == "anomaly" and not row["mask"]):
                raise ValueError(f"{file}: {row['image']} has the label {row['label']!r} and the mask {row['mask']!r}; "
                                 "normal, or anomaly with a mask, are allowed")  # fmt: skip
        self._masks = [root / row["mask"] if row["mask"] else None for row in rows]
        labels = np.array([_LABELS[row["label"]] for row in rows], dtype=np.int64)
        super().__init__(root, [row["image"] for row in rows], labels, **transforms)

    def get_mask(self, index: int) -> npt.NDArray[np.uint8]:
        size, path = self.get_image_size(index), self._masks[index]
        mask = np.zeros(size, dtype=np.uint8) if path is None else read_class_mask(path, size, _VALUES)
        return self.fill_uncounted(index, (mask > 0).astype(np.uint8), IGNORED)
