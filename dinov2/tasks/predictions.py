"""Predictions for one image, at the image's own size: what they say, how they are drawn, the files they are kept in."""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinov2.data.preprocessing import Placement
from dinov2.tasks.drawing import (
    PRESENT_FROM,
    Box,
    LegendEntry,
    ValueScale,
    add_panel,
    class_colour,
    class_name,
    count_pixels,
    display_size,
    draw_boxes,
    known_range,
    legible,
    paint_depth,
    paint_labels,
    resize_depth,
    resize_image,
    resize_labels,
)

logger = logging.getLogger("dinov2")

MAX_LEVEL = 65_535  # of a 16-bit image
_MAX_NAMED = 3  # classes of an image that are written down
_IGNORED = 255


def span_text(low: float, high: float, unit: str) -> str:
    """``0 to 2020 um``: three digits count, and none becomes an exponent below a million."""
    return f"{float(f'{low:.3g}'):g} to {float(f'{high:.3g}'):g} {unit}".strip()


@dataclass(frozen=True, kw_only=True)
class SaveOptions:
    """How predictions are written as files; each kind reads what concerns it.

    Attributes:
        score_maps: also write the probability of any defect per pixel.
        value_step: value, in the model's unit, of one level of 16-bit images.
        warned: values that did not fit were warned of; once is enough.

    Raises:
        ValueError: the step is not above 0.
    """

    score_maps: bool = False
    value_step: float = 1 / 256
    warned: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.value_step <= 0:
            raise ValueError(f"depth_step must be above 0, found {self.value_step}")


class Prediction(ABC):
    """What a model says about one image.

    Attributes:
        is_map: whether it covers the image; otherwise it is said in words.
        unit: of its values; empty where there are none.
        classes: names by index; a class without a name is called by its index.
    """

    is_map: ClassVar[bool] = False
    unit: str = ""
    classes: tuple[str, ...] = ()

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""

    @abstractmethod
    def table_row(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The numbers of `to_dict` as one row of a table; all predictions of a model have the same columns."""

    def save(self, folder: Path, stem: str, options: SaveOptions) -> dict[str, Any]:
        """Writes what is too large for `to_dict` below a folder.

        Args:
            folder: where folders for each kind of file are made.
            stem: name of the files without extension; it may have folders.
            options: what to write.

        Returns:
            The files, relative to the folder, by kind; empty where there are none.
        """
        return {}

    @abstractmethod
    def describe(self, *, scores: bool = True) -> str:
        """In a few words."""

    def image_score(self) -> float | None:
        """One number in [0, 1] about the whole image, such as how likely a defect is; None where there is none."""
        return None

    def certainty(self) -> float | None:
        """How far, in [0, 1], the model is from deciding otherwise; None where it does not tell."""
        return None

    def value_range(self) -> tuple[float, float] | None:
        """Smallest and largest value, NaN where none is known; None for predictions without values."""
        return None

    def placed(self, placement: Placement) -> Self:
        """The same in the coordinates of the image that the one predicted for was cut out of."""
        return self

    def agrees(self, other: "Prediction") -> bool | None:
        """Whether both say the same; None where that is a matter of degree."""
        return None

    def paint(self, picture: Image.Image, value_range: tuple[float, float] | None = None) -> Image.Image:
        """The prediction over a picture of the image, of any size, without words.

        Args:
            picture: RGB.
            value_range: values of the first and the last colour; by default `value_range`.
        """
        return picture

    def draw(
        self,
        image: Image.Image | NDArray[np.uint8],
        *,
        keep_size: bool = False,
        value_range: tuple[float, float] | None = None,
        caption: str = "",
    ) -> Image.Image:
        """Draws the prediction on its image, with a legend of what is there.

        An image whose longer side exceeds 2048 pixels is reduced and one below 320 is enlarged, for the drawing only.
        Classes beyond 0 are coloured; class 0, the background, stays as it is.

        Args:
            image: RGB, or uint8 ``[H, W, 3]``; of the prediction's size.
            keep_size: draw at the image's own size, the legend inside it, as frames of a video need it.
            value_range: values of the first and the last colour; by default the smallest and largest of this image.
            caption: further words for the legend.

        Returns:
            RGB, with the legend below the image unless ``keep_size``.
        """
        if not isinstance(image, Image.Image):
            image = Image.fromarray(image)
        picture = resize_image(image, image.size if keep_size else display_size(*image.size))
        value_range = value_range or self.value_range()
        scale = None if value_range is None else ValueScale(*value_range, self.unit)
        legend = self.legend()
        entries = [*legend[:1], *([LegendEntry(caption)] if caption else []), *legend[1:]]
        return add_panel(self.paint(picture, value_range), entries, scale, inside=keep_size)

    def legend(self) -> list[LegendEntry]:
        """Words that explain the drawing."""
        return [LegendEntry(self.describe(), bold=True)]


@dataclass(frozen=True, eq=False)
class ClassPrediction(Prediction):
    """Which class an image shows, or which of several.

    Attributes:
        probabilities: float32 ``[C]`` in [0, 1]; they add up to 1 unless ``multi_label``.
        multi_label: whether each class is decided by itself.
        classes: names by index.
        thresholds: ``[C]``, probabilities from which on classes are there, where several may be; of two classes, one of
            which it is, that of the second decides. Empty: 0.5, and the most probable.
    """

    probabilities: NDArray[np.float32]
    multi_label: bool = False
    classes: tuple[str, ...] = ()
    thresholds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        assert self.probabilities.dtype == np.float32
        assert self.probabilities.ndim == 1

    def present(self) -> list[int]:
        """Indices of the classes that are there: the most probable, or those from 0.5 on where there may be several.

        Thresholds take the place of both.
        """
        if self.multi_label:
            reached = self.probabilities >= np.array(self.thresholds or PRESENT_FROM)
            return [int(index) for index in np.flatnonzero(reached)]
        if self.thresholds:
            return [int(float(self.probabilities[1]) >= self.thresholds[1])]
        return [int(self.probabilities.argmax())]

    def to_dict(self) -> dict[str, Any]:
        """``label`` and ``score`` of the class (``labels`` where there may be several, and the highest score), and all
        ``probabilities`` by name."""
        values = self.probabilities.tolist()
        probabilities = {class_name(self.classes, index): _round(value) for index, value in enumerate(values)}
        names = [class_name(self.classes, index) for index in self.present()]
        label = {"labels": names} if self.multi_label else {"label": names[0]}
        score = max(values) if self.multi_label else values[self.present()[0]]
        return {**label, "score": _round(score), "probabilities": probabilities}

    def image_score(self) -> float:
        return float(self.probabilities.max() if self.multi_label else self.probabilities[self.present()[0]])

    def certainty(self) -> float:
        """Between the two most probable classes; with thresholds or several classes, of the class nearest its own."""
        chosen = self.probabilities if self.multi_label else self.probabilities[1:]
        if self.thresholds or self.multi_label:
            limits = np.array(self.thresholds[-len(chosen) :] or PRESENT_FROM)
            room = np.where(chosen >= limits, 1 - limits, limits).clip(min=1e-6)
            return float((np.abs(chosen - limits) / room).min().clip(0, 1))
        first, second, *_ = (*sorted(self.probabilities.tolist(), reverse=True), 0.0)
        return float(first - second)

    def table_row(self, values: Mapping[str, Any]) -> dict[str, Any]:
        label = ";".join(values["labels"]) if self.multi_label else values["label"]
        probabilities = {f"probability {name}": value for name, value in values["probabilities"].items()}
        return {"label": label, "score": values["score"], **probabilities}

    def describe(self, *, scores: bool = True) -> str:
        names = [
            class_name(self.classes, index) + (f" {self.probabilities[index]:.2f}" if scores else "")
            for index in self.present()
        ]
        return ", ".join(names) or "nothing"

    def agrees(self, other: Prediction) -> bool | None:
        return isinstance(other, ClassPrediction) and self.present() == other.present()

    def legend(self) -> list[LegendEntry]:
        """The most probable classes, or all that are there where an image may have several."""
        there = set(self.present())
        order = np.argsort(-self.probabilities, kind="stable").tolist()
        order = order if self.multi_label else sorted(order, key=lambda index: index not in there)
        names = {index: legible(class_name(self.classes, index), index) for index in order}
        values = {index: f"{self.probabilities[index]:.2f}" for index in order}
        if not self.multi_label:
            return [
                LegendEntry(names[index], values[index], bold=place == 0)
                for place, index in enumerate(order[:_MAX_NAMED])
            ]
        if there:
            return [LegendEntry(names[index], values[index], bold=True) for index in order if index in there]
        limit = "its threshold" if self.thresholds else PRESENT_FROM
        return [LegendEntry(f"nothing reaches {limit}; most likely: {names[order[0]]}", values[order[0]])]


@dataclass(frozen=True, eq=False)
class SegmentationPrediction(Prediction):
    """Which class each pixel shows.

    Attributes:
        labels: uint8 ``[H, W]``, index of the most probable class.
        scores: float32 ``[H, W]``, probability of that class.
        defect: float32 ``[H, W]``, 1 less the probability of class 0, the background.
        classes: names by index.
    """

    is_map = True

    labels: NDArray[np.uint8]
    scores: NDArray[np.float32]
    defect: NDArray[np.float32]
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert self.labels.dtype == np.uint8
        assert self.scores.dtype == self.defect.dtype == np.float32
        assert self.labels.ndim == 2
        assert self.labels.shape == self.scores.shape == self.defect.shape

    def placed(self, placement: Placement) -> Self:
        """Outside of what was cut out, and where pixels do not count, all is background, for sure."""
        return replace(
            self,
            labels=placement.to_image_map(self.labels),
            scores=placement.to_image_map(self.scores, 1.0),
            defect=placement.to_image_map(self.defect),
        )

    def with_threshold(self, threshold: float) -> "SegmentationPrediction":
        """The same of two classes, where a pixel is a defect from this probability on."""
        is_defect = self.defect >= threshold
        scores = np.where(is_defect, self.defect, 1 - self.defect)
        return SegmentationPrediction(is_defect.astype(np.uint8), scores, self.defect, self.classes)

    def to_dict(self) -> dict[str, Any]:
        """``pixels`` and mean ``scores`` by name of the classes that are there, and ``defect_score``, the largest
        probability of anything but class 0."""
        pixels, sums = count_pixels(self.labels), count_pixels(self.labels, self.scores)
        present = {class_name(self.classes, int(index)): int(index) for index in np.flatnonzero(pixels)}
        return {
            "pixels": {name: int(pixels[index]) for name, index in present.items()},
            "scores": {name: _round(float(sums[index] / pixels[index])) for name, index in present.items()},
            "defect_score": _round(float(self.defect.max())),
        }

    def image_score(self) -> float:
        return float(self.defect.max())

    def certainty(self) -> float:
        """Whether there is a defect at all, and of which class its pixels are: the lesser of both."""
        found = self.labels > 0
        classes = float(self.scores[found].mean(dtype=np.float64)) if found.any() else 1.0
        return min(abs(2 * self.image_score() - 1), classes)

    def table_row(self, values: Mapping[str, Any]) -> dict[str, Any]:
        height, width = self.labels.shape
        areas = {f"pixels {name}": values["pixels"].get(name, 0) for name in self.classes}
        return {"width": width, "height": height, "defect_score": values["defect_score"], **areas}

    def save(self, folder: Path, stem: str, options: SaveOptions) -> dict[str, Any]:
        """``masks/STEM.png``, 8 bits, the index of the class of every pixel; with ``score_maps`` ``defects/STEM.png``,
        16 bits, the probability that a pixel is not of class 0, times 65,535."""
        written = {"mask": _save_image(self.labels, folder, f"masks/{stem}.png")}
        if options.score_maps:
            levels = np.rint(self.defect * MAX_LEVEL).astype(np.uint16)
            written["defect"] = _save_image(levels, folder, f"defects/{stem}.png")
        return written

    def describe(self, *, scores: bool = True) -> str:
        present = [int(value) for value in np.unique(self.labels) if value > 0]
        names = ("ignored" if value == _IGNORED else class_name(self.classes, value) for value in present)
        return ", ".join(names) or "nothing"

    def paint(self, picture: Image.Image, value_range: tuple[float, float] | None = None) -> Image.Image:
        return paint_labels(picture, resize_labels(self.labels, picture.size))

    def legend(self) -> list[LegendEntry]:
        """The score of the image, and the classes that are there with their share of it, always in one order."""
        counts = count_pixels(self.labels)
        entries = [LegendEntry("defect score", f"{self.defect.max():.2f}", bold=True)]
        for index in sorted(map(int, np.flatnonzero(counts)), key=lambda index: (index == 0, index)):
            share = counts[index] / self.labels.size
            text = f"{share:.1%}".replace("%", " %") if share >= 0.001 else "< 0.1 %"
            name = legible(class_name(self.classes, index), index)
            entries.append(LegendEntry(name, text, class_colour(index), filled=index > 0))
        return entries


@dataclass(frozen=True, eq=False)
class DepthPrediction(Prediction):
    """How far away, or how deep, each pixel is.

    Attributes:
        depth: float32 ``[H, W]`` in ``unit``; NaN where nothing is known.
        unit: such as ``m``, ``um`` or ``px``; empty for relative depth.
    """

    is_map = True

    depth: NDArray[np.float32]
    unit: str = ""

    def __post_init__(self) -> None:
        assert self.depth.dtype == np.float32
        assert self.depth.ndim == 2

    def placed(self, placement: Placement) -> Self:
        """Outside of what was cut out, and where pixels do not count, nothing is known."""
        return replace(self, depth=placement.to_image_map(self.depth, math.nan))

    def to_dict(self) -> dict[str, Any]:
        """``unit``, ``min``, ``median``, ``mean``, ``max`` (None where nothing is known) and ``known``, the share of
        known pixels."""
        known = self.depth[np.isfinite(self.depth)]
        values: dict[str, Any] = {"unit": self.unit, "min": None, "median": None, "mean": None, "max": None}
        if known.size:
            values |= {
                "min": _round(float(known.min())),
                "median": _round(float(np.median(known))),
                "mean": _round(float(known.mean(dtype=np.float64))),
                "max": _round(float(known.max())),
            }
        return {**values, "known": _round(known.size / self.depth.size)}

    def table_row(self, values: Mapping[str, Any]) -> dict[str, Any]:
        height, width = self.depth.shape
        return {"width": width, "height": height, **values}

    def save(self, folder: Path, stem: str, options: SaveOptions) -> dict[str, Any]:
        """``depth/STEM.npy``, float32 ``[H, W]``, NaN where unknown, and ``depth/STEM.png``, 16 bits, the depth divided
        by ``value_step`` and rounded, 0 where unknown; what does not fit is 65,535 there, and a warning says so."""
        exact = folder / "depth" / f"{stem}.npy"
        exact.parent.mkdir(parents=True, exist_ok=True)
        np.save(exact, self.depth, allow_pickle=False)
        steps = np.nan_to_num(np.rint(self.depth / options.value_step), nan=0.0)
        if "depth" not in options.warned and steps.max() > MAX_LEVEL:
            options.warned.add("depth")
            top = float(steps[np.isfinite(self.depth)].max(initial=MAX_LEVEL))
            logger.warning(
                "%s: depths above %g do not fit into 16-bit images of step %g (the .npy files are exact); "
                "choose a larger --depth-step, such as %g",
                stem, MAX_LEVEL * options.value_step, options.value_step,
                options.value_step * 2 ** math.ceil(math.log2(2 * top / MAX_LEVEL)),  # with room for the images to come
            )  # fmt: skip
        image = _save_image(steps.clip(0, MAX_LEVEL).astype(np.uint16), folder, f"depth/{stem}.png")
        return {"depth": f"depth/{stem}.npy", "depth_image": image, "depth_step": options.value_step}

    def describe(self, *, scores: bool = True) -> str:
        return span_text(*self.value_range(), self.unit)

    def value_range(self) -> tuple[float, float]:
        return known_range(self.depth)

    def legend(self) -> list[LegendEntry]:
        return []

    def paint(self, picture: Image.Image, value_range: tuple[float, float] | None = None) -> Image.Image:
        return paint_depth(picture, resize_depth(self.depth, picture.size), value_range or self.value_range())


@dataclass(frozen=True, eq=False)
class DetectionPrediction(Prediction):
    """Which objects an image shows, and where.

    Attributes:
        boxes: float32 ``[N, 4]``, x0, y0, x1, y1 in pixels of the image; a pixel ``i`` covers ``[i, i + 1)``.
        scores: float32 ``[N]`` in [0, 1], how sure the model is.
        labels: int64 ``[N]``, index of the class.
        classes: names by index.
        size: height and width of the image; where it is not known, (0, 0), drawings must have its size.
        doubtful: what the model saw below its thresholds, for curves and for people who look again; None where it was
            not kept.
    """

    is_map = True

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    classes: tuple[str, ...] = ()
    size: tuple[int, int] = (0, 0)
    doubtful: "DetectionPrediction | None" = None

    def __post_init__(self) -> None:
        assert self.boxes.dtype == self.scores.dtype == np.float32
        assert self.labels.dtype == np.int64
        assert self.boxes.shape == (len(self.scores), 4)
        assert self.scores.shape == self.labels.shape

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def defect_score(self) -> float:
        """The highest score of anything that was seen, doubtful or not; 0 where nothing was."""
        seen = [self.scores, *([] if self.doubtful is None else [self.doubtful.scores])]
        return float(np.concatenate(seen).max(initial=0.0))

    def image_score(self) -> float:
        return self.defect_score

    def certainty(self) -> float:
        """Of the object whose score is nearest to one half."""
        seen = [self.scores, *([] if self.doubtful is None else [self.doubtful.scores])]
        return float(np.abs(2 * np.concatenate(seen) - 1).min(initial=1.0))

    def placed(self, placement: Placement) -> Self:
        """Objects whose middle lies where nothing counts are left out."""
        kept = placement.counts_at((self.boxes[:, :2] + self.boxes[:, 2:]) / 2)
        corners = placement.to_image_points(self.boxes[kept].reshape(-1, 2)).reshape(-1, 4).astype(np.float32)
        return replace(
            self,
            boxes=corners,
            scores=self.scores[kept],
            labels=self.labels[kept],
            size=placement.full_size,
            doubtful=None if self.doubtful is None else self.doubtful.placed(placement),
        )

    def joined(self, other: "DetectionPrediction") -> "DetectionPrediction":
        """The objects of both, those of the other behind."""
        boxes, scores = np.concatenate([self.boxes, other.boxes]), np.concatenate([self.scores, other.scores])
        labels = np.concatenate([self.labels, other.labels])
        return DetectionPrediction(boxes, scores, labels, self.classes, self.size)

    def to_dict(self) -> dict[str, Any]:
        """``objects``, the most certain first, each with ``label`` (its name), ``score`` and ``box`` (x0, y0, x1, y1
        in pixels), and ``defect_score``, the highest score of anything that was seen."""
        objects = [
            {
                "label": class_name(self.classes, int(self.labels[place])),
                "score": _round(float(self.scores[place])),
                "box": [_round(float(corner)) for corner in self.boxes[place]],
            }
            for place in np.argsort(-self.scores, kind="stable").tolist()
        ]
        return {"objects": objects, "defect_score": _round(self.defect_score)}

    def table_row(self, values: Mapping[str, Any]) -> dict[str, Any]:
        names = [found["label"] for found in values["objects"]]
        counts = {f"objects {name}": names.count(name) for name in self.classes}
        height, width = self.size
        return {"width": width, "height": height, "defect_score": values["defect_score"], **counts}

    def describe(self, *, scores: bool = True) -> str:
        return ", ".join(
            f"{count} {class_name(self.classes, index)}" + (f" {best:.2f}" if scores else "")
            for index, count, best in self._by_class()
        ) or "nothing"  # fmt: skip

    def paint(self, picture: Image.Image, value_range: tuple[float, float] | None = None) -> Image.Image:
        height, width = self.size if min(self.size) else picture.size[::-1]
        shares = np.array([picture.width / width, picture.height / height] * 2)
        boxes = [
            Box(x0, y0, x1, y1, label, score)
            for (x0, y0, x1, y1), label, score in zip(
                (self.boxes * shares).tolist(), self.labels.tolist(), self.scores.tolist(), strict=True
            )
        ]
        return draw_boxes(picture, boxes, self.classes, keep_size=True)

    def legend(self) -> list[LegendEntry]:
        """The score of the image, and the classes that are there with the number of their objects."""
        entries = [LegendEntry("defect score", f"{self.defect_score:.2f}", bold=True)]
        for index, count, _ in self._by_class():
            name = legible(class_name(self.classes, index), index)
            entries.append(LegendEntry(name, str(count), class_colour(index + 1)))
        return entries

    def _by_class(self) -> list[tuple[int, int, float]]:
        """Index, number of objects and highest score of the classes that are there."""
        there = np.unique(self.labels).tolist()
        return [
            (index, int((self.labels == index).sum()), float(self.scores[self.labels == index].max()))
            for index in there
        ]


class NamedPredictions(Prediction, dict[str, Prediction]):
    """What several heads say about one image, by their names."""

    is_map = True

    def to_dict(self) -> dict[str, Any]:
        """That of each head, by its name."""
        return {name: prediction.to_dict() for name, prediction in self.items()}

    def table_row(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {
            f"{name} {column}": value
            for name, prediction in self.items()
            for column, value in prediction.table_row(values[name]).items()
        }

    def placed(self, placement: Placement) -> Self:
        return type(self)({name: prediction.placed(placement) for name, prediction in self.items()})

    def save(self, folder: Path, stem: str, options: SaveOptions) -> dict[str, Any]:
        """The files of each head, in folders of its name."""
        return {
            f"{name} {kind}": path
            for name, prediction in self.items()
            for kind, path in prediction.save(folder, f"{name}/{stem}", options).items()
        }

    def describe(self, *, scores: bool = True) -> str:
        return "; ".join(f"{name}: {prediction.describe(scores=scores)}" for name, prediction in self.items())

    def certainty(self) -> float | None:
        """Of the head that is least sure."""
        return min((known for known in (head.certainty() for head in self.values()) if known is not None), default=None)

    def draw(self, image: Image.Image | NDArray[np.uint8], **options: Any) -> Image.Image:
        """Draws the prediction of every head, side by side; see `Prediction.draw`."""
        drawings = [prediction.draw(image, **{**options, "caption": name}) for name, prediction in self.items()]
        whole = Image.new("RGB", (sum(one.width for one in drawings), max(one.height for one in drawings)), "white")
        left = 0
        for drawing in drawings:
            whole.paste(drawing, (left, 0))
            left += drawing.width
        return whole


def _save_image(values: NDArray[np.uint8] | NDArray[np.uint16], folder: Path, name: str) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return name


def _round(value: float) -> float:
    """Six significant digits: a float32 has no more, and lines stay short."""
    return value if value == 0 or not math.isfinite(value) else round(value, 5 - math.floor(math.log10(abs(value))))
