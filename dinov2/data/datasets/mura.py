"""MURA: radiographs of bones, a study of several images per patient."""

import re
from pathlib import Path
from typing import Unpack

import numpy as np

from dinov2.data.datasets.base import ListedImages, Transforms
from dinov2.data.datasets.scan import require_images

_SPLITS = {"TRAIN": "train", "VAL": "valid"}
_STUDY = re.compile(r"(?P<part>XR_[A-Z]+)/(?P<patient>patient\d+)/study\d+_(?P<label>positive|negative)")


class MURA(ListedImages):
    """Images of studies, normal (0) or abnormal (1); a study is a part, as it has one label for all its images.

    Images are ``train/XR_ELBOW/patient00011/study1_negative/image1.png``, and ``valid/...``. A patient may have several
    studies, of which all lie in one split.

    Reference: Rajpurkar et al., MURA: Large dataset for abnormality detection in musculoskeletal radiographs, 2018.
    """

    classes = ("normal", "abnormal")

    def __init__(self, root: str | Path, split: str, body_part: str = "", **transforms: Unpack[Transforms]) -> None:
        """Lists the images; none is opened.

        Args:
            root: folder that holds ``train`` and ``valid``, such as ``MURA-v1.1``.
            split: ``TRAIN`` or ``VAL``, in any case.
            body_part: such as ``elbow``; empty for all.
            **transforms: see `ImageDataset`.

        Raises:
            FileNotFoundError: the folder is not there, or holds no image of the body part.
            ValueError: an unknown split; an image that lies in no study.
        """
        name = split.strip().upper()
        if name not in _SPLITS:
            raise ValueError(f"unknown split {split!r}; MURA has {' and '.join(_SPLITS)}")
        folder = Path(root) / _SPLITS[name]
        paths = require_images(folder)
        found = [_STUDY.match(path) for path in paths]
        for path, study in zip(paths, found, strict=True):
            if study is None:
                raise ValueError(f"{folder / path} lies in no study, such as XR_ELBOW/patient00011/study1_negative")
        studies = [study for study in found if study is not None]
        parts = sorted({study["part"].removeprefix("XR_").lower() for study in studies})
        wanted = body_part.strip().lower().removeprefix("xr_")
        if wanted and wanted not in parts:
            raise FileNotFoundError(f"{folder} has no body part {body_part!r}; there are {', '.join(parts)}")
        chosen = [
            number for number, study in enumerate(studies) if not wanted or study["part"] == f"XR_{wanted.upper()}"
        ]
        self._studies = [studies[number].group() for number in chosen]
        labels = np.array([studies[number]["label"] == "positive" for number in chosen], dtype=np.int64)
        super().__init__(folder, [paths[number] for number in chosen], labels, **transforms)

    def get_group_ids(self) -> list[str]:
        """The study of each image."""
        return self._studies.copy()
