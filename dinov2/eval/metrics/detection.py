"""Metrics of boxes: COCO's average precision, DeepPCB's protocol, misses and false alarms per image and per part."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dinov2.eval.metrics.classification import (
    RANKING_METRICS,
    Float64Array,
    IntArray,
    LevelScores,
    MetricValue,
    Scores,
    draw_parts,
    interval,
    number_parts,
    score_predictions,
    share_of,
)
from dinov2.eval.metrics.streaming import StreamedMetric
from dinov2.eval.metrics.thresholds import ThresholdRule

BoxArray = npt.NDArray[np.floating]
BoolArray = npt.NDArray[np.bool_]

COCO_IOUS = tuple(np.linspace(0.5, 0.95, 10).tolist())
MATCH_IOU = 0.5  # from which on a box counts as found
DEEP_PCB_IOU = 0.33
MOST_BOXES = 100  # per image and class that COCO looks at; more where an image has more objects
AREAS = ("all", "small", "medium", "large")
FALSE_ALARM, IGNORED = -1, -2  # what a box hits
_IMAGE, _BOX, _SCORE, _LABEL, _FOUND = 0, slice(1, 5), 5, 6, 7
_CROWD = 6


@dataclass(frozen=True)
class PrecisionRecall:
    """Precision of one class over recall, as COCO interpolates it.

    Attributes:
        recall: ``[101]``, from 0 to 1.
        precision: ``[101]``, the highest that is reached at this recall or a higher one; 0 where none is.
        scores: ``[101]``, thresholds by which it is reached.
    """

    recall: Float64Array
    precision: Float64Array
    scores: Float64Array


class DetectionMetrics(StreamedMetric):
    """Compares boxes with those of the ground truth, class by class.

    Average precision is COCO's, computed by faster-coco-eval: 101 recalls, IoU 0.5 to 0.95, crowds ignored, and areas
    by the area of boxes. At most 100 boxes of a class and image count, or as many as any image has objects.

    A box is a hit when its IoU with an object of its class, which no better box has hit, is at least 0.5: a defect that
    is taken for another class is a miss and a false alarm. Boxes on crowds are neither. Misses and false alarms are
    counted among the boxes that the model's thresholds let through, everything else among all boxes.

    Args:
        classes: names of the classes by index.
        group_ids: the part that each image of the set shows.

    Raises:
        ValueError: there are no classes.
    """

    predicted: list[Tensor]  # [n, 8]: image, box, score, class, whether it counts as found
    actual: list[Tensor]  # [m, 7]: image, box, class, whether it is a crowd
    images: list[Tensor]

    def __init__(self, classes: Sequence[str], group_ids: Sequence[str]) -> None:
        super().__init__()
        if not classes:
            raise ValueError("there must be at least one class")
        self.classes = tuple(classes)
        self.group_ids = tuple(group_ids)
        for name in ("predicted", "actual", "images"):
            self.add_rows(name)

    def update(
        self,
        index: int,
        boxes: BoxArray,
        scores: BoxArray,
        labels: IntArray,
        true_boxes: BoxArray,
        true_labels: IntArray,
        *,
        crowd: BoolArray | None = None,
        found: BoolArray | None = None,
    ) -> None:
        """Adds an image.

        Args:
            index: its number in the set, each once.
            boxes: ``[n, 4]``, x0, y0, x1, y1 in pixels of the image.
            scores: ``[n]`` in [0, 1].
            labels: ``[n]``, classes.
            true_boxes: ``[m, 4]``.
            true_labels: ``[m]``.
            crowd: ``[m]``, which of them stand for many objects; None for none.
            found: ``[n]``, which boxes the model says are objects; None for all.

        Raises:
            ValueError: lengths differ, or a class is not among those of the metric.
        """
        crowd = np.zeros(len(true_boxes), dtype=bool) if crowd is None else crowd
        found = np.ones(len(boxes), dtype=bool) if found is None else found
        for what, lengths in (
            ("boxes", {len(boxes), len(scores), len(labels), len(found)}),
            ("true boxes", {len(true_boxes), len(true_labels), len(crowd)}),
        ):
            if len(lengths) > 1:
                raise ValueError(f"{what}, their classes and what else is said of them differ in length: {lengths}")
        for values in (labels, true_labels):
            if len(values) and not 0 <= values.min() <= values.max() < len(self.classes):
                raise ValueError(f"classes must be in [0, {len(self.classes)}), found {values.min()}, {values.max()}")
        order = np.argsort(-scores, kind="stable")
        boxes, scores, labels, found = boxes[order], scores[order], labels[order], found[order]
        self.images.append(torch.tensor([index]))
        self.predicted.append(_table(index, boxes, scores, labels, found))
        self.actual.append(_table(index, true_boxes, true_labels, crowd))

    def compute(self) -> dict[str, float]:
        """All values of `average_precision`, `deep_pcb`, `zero_escapes` and `scores`.

        The last come as ``image_NAME`` and, where images share parts, ``part_NAME``.
        """
        if not self.images:
            return {}
        return {
            **self.average_precision(),
            **self.deep_pcb(),
            **{
                f"{level}_{name}": metric.value
                for level, scores in self._levels(num_resamples=0, seed=0).items()
                for name, metric in scores.metrics.items()
            },
            **self.zero_escapes(),
        }

    def average_precision(self) -> dict[str, float]:
        """COCO's metrics, in [0, 1]; those of what does not occur are absent.

        Returns:
            ``ap`` (mean over IoU 0.5 to 0.95 and classes), ``ap50``, ``ap75``, ``ap_small`` (below 32 x 32 pixels),
            ``ap_medium``, ``ap_large`` (from 96 x 96 on); ``ar``, ``ar_small`` and so on, the recall that is reached;
            ``ar_1`` and ``ar_10`` with the best boxes of each class and image only; ``ap50/NAME`` of a class.
        """
        found = self._evaluate()
        if found is None:
            return {}
        precision, recall, _ = found  # [T, 101, C, areas, 3], [T, C, areas, 3]
        values = {"ap": precision[:, :, :, 0, -1], "ap50": precision[0, :, :, 0, -1], "ap75": precision[5, :, :, 0, -1]}
        values |= {f"ap_{area}": precision[:, :, :, place, -1] for place, area in enumerate(AREAS) if place}
        values |= {"ar": recall[:, :, 0, -1], "ar_1": recall[:, :, 0, 0], "ar_10": recall[:, :, 0, 1]}
        values |= {f"ar_{area}": recall[:, :, place, -1] for place, area in enumerate(AREAS) if place}
        values |= {f"ap50/{name}": precision[0, :, place, 0, -1] for place, name in enumerate(self.classes)}
        return {name: float(value[value > -1].mean()) for name, value in values.items() if (value > -1).any()}

    def precision_recall(self) -> dict[str, PrecisionRecall]:
        """Curves at IoU 0.5 of the classes that occur, by name."""
        found = self._evaluate()
        if found is None:
            return {}
        precision, _, scores = found
        recall = np.linspace(0, 1, precision.shape[1])
        return {
            name: PrecisionRecall(recall, precision[0, :, place, 0, -1], scores[0, :, place, 0, -1])
            for place, name in enumerate(self.classes)
            if precision[0, 0, place, 0, -1] > -1
        }

    def deep_pcb(self) -> dict[str, float]:
        """The protocol of DeepPCB: a box is right from an IoU of 0.33 on.

        Returns:
            ``ap33``, the mean over classes of the average precision (not interpolated), and ``f33``, the F-measure of
            all boxes at the threshold where it is highest.

        Reference:
            Tang et al., "Online PCB Defect Detector On A New PCB Defect Dataset" (2019), section 4.
        """
        predicted, actual = self._tables()
        hits = self._hits(DEEP_PCB_IOU)
        counted, right = hits != IGNORED, hits >= 0
        objects = actual[actual[:, _CROWD] == 0]
        if len(objects) == 0:
            return {}
        order = np.argsort(-predicted[:, _SCORE], kind="stable")
        order = order[counted[order]]
        precisions = []
        for label in np.unique(objects[:, 5]).tolist():
            of_class = right[order[predicted[order, _LABEL] == label]]
            precision = np.cumsum(of_class) / (np.arange(len(of_class)) + 1)
            precisions.append(float(precision[of_class].sum()) / int((objects[:, 5] == label).sum()))
        values = {"ap33": float(np.mean(precisions)), "f33": 0.0}
        scores = predicted[order, _SCORE]
        ends = np.flatnonzero(np.append(scores[1:] != scores[:-1], True)) if len(scores) else np.zeros(0, dtype=int)
        if len(ends):
            f_measures = 2 * np.cumsum(right[order])[ends] / (ends + 1 + len(objects))
            values["f33"] = float(f_measures.max())
        return values

    def zero_escapes(self) -> dict[str, float]:
        """False alarms per good part at the highest threshold that misses no defective part.

        A part is found to be defective when any box of any of its images reaches the threshold.

        Returns:
            ``false_alarms_at_zero_escapes``, and beside it ``zero_escapes/false_alarms`` (boxes),
            ``zero_escapes/good_parts``, ``zero_escapes/defective_parts`` and ``zero_escapes/threshold``. Absent without
            good or defective parts, and where a defective part has no box at all, for then no threshold finds all:
            ``zero_escapes/parts_without_box`` says how many.
        """
        predicted, _ = self._tables()
        images = self._per_image()
        names, part_of_image = number_parts(images.group_ids)
        defective, highest = np.zeros(len(names), dtype=bool), np.zeros(len(names))
        np.logical_or.at(defective, part_of_image, images.defective)
        np.maximum.at(highest, part_of_image, images.highest)
        if defective.all() or not defective.any():
            return {}
        without = int((highest[defective] == 0).sum())
        if without:
            return {"zero_escapes/parts_without_box": float(without)}
        threshold = float(highest[defective].min())
        of_good = ~defective[part_of_image[images.place_of(predicted[:, _IMAGE])]]
        alarms = int((of_good & (predicted[:, _SCORE] >= threshold)).sum())
        num_good = int((~defective).sum())
        return {
            "false_alarms_at_zero_escapes": alarms / num_good,
            "zero_escapes/false_alarms": float(alarms),
            "zero_escapes/good_parts": float(num_good),
            "zero_escapes/defective_parts": float(defective.sum()),
            "zero_escapes/threshold": threshold,
        }

    def scores(self, *, num_resamples: int = 1000, seed: int = 0) -> Scores | None:
        """Misses and false alarms of images and of parts with intervals from resampled parts; None without an image.

        Returns:
            ``misses``: objects per image (part) that are not found, and ``miss_rate``, their share of all objects;
            ``false_alarms``: boxes per image (part) that hit nothing;
            ``escape_rate``: share of the defective images (parts) in which nothing is found; ``alarm_rate``: share of
            the good ones in which something is. Where both are there, also the ranking by the highest score of any box:
            ``auroc``, ``average_precision`` and escape rates as in `classification_metrics`.
        """
        if not self.images:
            return None
        levels = self._levels(num_resamples=num_resamples, seed=seed)
        return Scores(image=levels["image"], part=levels.get("part", levels["image"]))

    def thresholds(self, rule: ThresholdRule) -> dict[str, float]:
        """Thresholds by class that a rule chooses; of classes that do not occur there are none.

        The score of an image or a part is the highest of its boxes. The rate of false alarms of single objects is their
        number per image.
        """
        if not self.images:
            return {}
        predicted, actual = self._tables()
        images = self._per_image()
        hits = self._hits(MATCH_IOU)
        parts = number_parts(images.group_ids)[1] if rule.level == "part" else np.arange(len(images.group_ids))
        chosen = {}
        for label, name in enumerate(self.classes):
            found, there = predicted[:, _LABEL] == label, actual[:, 5] == label
            if rule.level == "object":
                counted = found & (hits != IGNORED)
                scores, positive = predicted[counted, _SCORE], hits[counted] >= 0
                counts = int((there & (actual[:, _CROWD] == 0)).sum()), len(images.group_ids)
            else:
                scores, positive = np.zeros(parts.max() + 1), np.zeros(parts.max() + 1, dtype=bool)
                np.maximum.at(scores, parts[images.place_of(predicted[found, _IMAGE])], predicted[found, _SCORE])
                positive[parts[images.place_of(actual[there, _IMAGE])]] = True
                counts = int(positive.sum()), int((~positive).sum())
            threshold = rule.choose(scores, positive, num_positive=counts[0], num_negative=counts[1])
            if threshold is not None and counts[0]:
                chosen[name] = threshold
        return chosen

    def counts(self) -> tuple[int, int]:
        """Objects of the ground truth (no crowds), and boxes that were found."""
        predicted, actual = self._tables()
        return int((actual[:, _CROWD] == 0).sum()), int(predicted[:, _FOUND].sum())

    def _tables(self) -> tuple[Float64Array, Float64Array]:
        """``predicted`` and ``actual`` as one table each, by image, whatever the order in which images came."""
        tables = []
        for rows, width in ((self.predicted, 8), (self.actual, 7)):
            table = torch.cat(rows).numpy() if rows else np.zeros((0, width))
            tables.append(table[np.argsort(table[:, _IMAGE], kind="stable")])
        return tables[0], tables[1]

    def _hits(self, min_iou: float) -> IntArray:
        """What every predicted box hits, see `match_boxes`; numbers are those within the image."""
        predicted, actual = self._tables()
        hits = np.full(len(predicted), FALSE_ALARM, dtype=np.int64)
        for index in np.unique(predicted[:, _IMAGE]):
            rows = slice(*np.searchsorted(predicted[:, _IMAGE], [index, index + 1]).tolist())
            true_rows = slice(*np.searchsorted(actual[:, _IMAGE], [index, index + 1]).tolist())
            true = actual[true_rows]
            hits[rows] = match_boxes(
                predicted[rows, _BOX], predicted[rows, _LABEL], true[:, _BOX], true[:, 5], true[:, _CROWD] > 0, min_iou
            )
        return hits

    def _per_image(self) -> "_Images":
        predicted, actual = self._tables()
        indices = np.sort(torch.cat(self.images).numpy())
        images = _Images(indices, [self.group_ids[index] for index in indices.tolist()])
        hits = self._hits(MATCH_IOU)
        is_found = predicted[:, _FOUND] > 0
        place, true_place = images.place_of(predicted[:, _IMAGE]), images.place_of(actual[:, _IMAGE])
        np.maximum.at(images.highest, place, predicted[:, _SCORE])
        images.found[place[is_found]] = True
        images.defective[true_place] = True
        np.add.at(images.num_true, true_place, actual[:, _CROWD] == 0)
        np.add.at(images.num_hits, place, is_found & (hits >= 0))
        np.add.at(images.num_false, place, is_found & (hits == FALSE_ALARM))
        return images

    def _levels(self, *, num_resamples: int, seed: int) -> dict[str, LevelScores]:
        """Scores of images, and of parts where images share them."""
        images = self._per_image()
        names, part_of_image = number_parts(images.group_ids)
        draws = draw_parts(len(names) if len(names) > 1 else 0, num_resamples, seed).astype(np.float64)
        ranking = self._ranking(images, num_resamples, seed)
        levels = {}
        for level, unit in (("image", np.arange(len(images.group_ids))), ("part", part_of_image)):
            if level == "part" and len(names) == len(unit):
                continue
            count = int(unit.max()) + 1
            defective, found = np.zeros(count, dtype=bool), np.zeros(count, dtype=bool)
            np.logical_or.at(defective, unit, images.defective)
            np.logical_or.at(found, unit, images.found)
            part = part_of_image if level == "image" else np.arange(count)
            missed = (images.num_true - images.num_hits).astype(np.float64)
            ones = np.ones(count)
            shares = {  # what is counted, and of what it is a share, each by part
                "misses": (_by(missed, part_of_image), _by(ones, part)),
                "miss_rate": (_by(missed, part_of_image), _by(images.num_true, part_of_image)),
                "false_alarms": (_by(images.num_false, part_of_image), _by(ones, part)),
                "escape_rate": (_by(defective & ~found, part), _by(defective, part)),
                "alarm_rate": (_by(~defective & found, part), _by(~defective, part)),
            }
            metrics = {name: _share(*counts, draws) for name, counts in shares.items() if counts[1].any()}
            levels[level] = LevelScores(count=count, metrics={**metrics, **ranking.get(level, {})})
        return levels

    def _ranking(self, images: "_Images", num_resamples: int, seed: int) -> dict[str, dict[str, MetricValue]]:
        """Metrics of the highest scores of images and parts that depend on no threshold."""
        if images.defective.all() or not images.defective.any():
            return {}
        scores = score_predictions(
            np.stack([1 - images.highest, images.highest], axis=1),
            images.defective.astype(np.int64),
            images.group_ids,
            num_resamples=num_resamples,
            seed=seed,
        )
        return {
            level: {name: value for name, value in one.metrics.items() if name in RANKING_METRICS}
            for level, one in (("image", scores.image), ("part", scores.part))
        }

    def _evaluate(self) -> tuple[Float64Array, Float64Array, Float64Array] | None:
        """Precision, recall and scores as COCO accumulates them; None without an object or an image."""
        predicted, actual = self._tables()
        if not (actual[:, _CROWD] == 0).any():
            return None
        from faster_coco_eval import COCO, COCOeval_faster

        images = [{"id": int(index), "width": 0, "height": 0} for index in torch.cat(self.images).tolist()]
        categories = [{"id": place, "name": name} for place, name in enumerate(self.classes)]
        truth = COCO({"images": images, "annotations": _annotations(actual, 5), "categories": categories})
        boxes = _annotations(predicted, _LABEL)
        for box, score in zip(boxes, predicted[:, _SCORE].tolist(), strict=True):
            box |= {"score": score, "iscrowd": 0}
        found = COCO({"images": images, "annotations": boxes, "categories": categories})
        evaluation = COCOeval_faster(truth, found, "bbox", print_function=_be_silent, extra_calc=False)
        evaluation.params.iouThrs = np.array(COCO_IOUS)
        most = int(np.unique(actual[:, _IMAGE], return_counts=True)[1].max())
        evaluation.params.maxDets = [1, 10, max(MOST_BOXES, most)]
        evaluation.evaluate()
        evaluation.accumulate()
        return evaluation.eval["precision"], evaluation.eval["recall"], evaluation.eval["scores"]


def match_boxes(
    boxes: BoxArray,
    labels: npt.NDArray[np.generic],
    true_boxes: BoxArray,
    true_labels: npt.NDArray[np.generic],
    crowd: BoolArray,
    min_iou: float,
) -> IntArray:
    """Which object each box of an image hits, as COCO decides: box by box, each the best of those still free.

    Args:
        boxes: ``[n, 4]``, x0, y0, x1, y1; the best ones first.
        labels: ``[n]``, classes.
        true_boxes: ``[m, 4]``.
        true_labels: ``[m]``; a box hits objects of its class only.
        crowd: ``[m]``; a box whose share inside a crowd reaches ``min_iou`` and that hits no other object is ignored.
        min_iou: from which on a box hits.

    Returns:
        Per box the number of its object, `FALSE_ALARM` or `IGNORED`.
    """
    from faster_coco_eval.core import mask

    hits = np.full(len(boxes), FALSE_ALARM, dtype=np.int64)
    if len(boxes) == 0 or len(true_boxes) == 0:
        return hits
    overlaps = np.asarray(mask.iou(_as_xywh(boxes), _as_xywh(true_boxes), crowd.astype(np.uint8).tolist()))
    overlaps = np.where(labels[:, None] == true_labels[None], overlaps, -1.0)
    least = min(min_iou, 1 - 1e-10)
    free = ~crowd
    for place in np.flatnonzero(overlaps.max(axis=1) >= least).tolist():
        open_overlaps = np.where(free, overlaps[place], -1.0)
        best = len(open_overlaps) - 1 - int(open_overlaps[::-1].argmax())  # of equal ones the last
        if open_overlaps[best] >= least:
            hits[place] = best
            free[best] = False
        elif (overlaps[place][crowd] >= least).any():
            hits[place] = IGNORED
    return hits


def detection_error(
    boxes: BoxArray,
    scores: BoxArray,
    labels: IntArray,
    true_boxes: BoxArray,
    true_labels: IntArray,
    crowd: BoolArray,
) -> float:
    """How wrong the boxes of an image are: 1 less their F1; 0 where there is no object and no box."""
    order = np.argsort(-scores, kind="stable")
    hits = match_boxes(boxes[order], labels[order], true_boxes, true_labels, crowd, MATCH_IOU)
    counted = int((hits != IGNORED).sum()) + int((~crowd).sum())
    return 1 - 2 * int((hits >= 0).sum()) / counted if counted else 0.0


class _Images:
    """What is counted per image.

    Args:
        indices: numbers of the images, ascending.
        group_ids: the part that each shows.
    """

    def __init__(self, indices: IntArray, group_ids: Sequence[str]) -> None:
        count = len(indices)
        self.indices = indices
        self.group_ids = group_ids
        self.num_true, self.num_hits, self.num_false = (np.zeros(count, dtype=np.int64) for _ in range(3))
        self.defective, self.found = np.zeros(count, dtype=bool), np.zeros(count, dtype=bool)
        self.highest = np.zeros(count)  # of the scores of its boxes

    def place_of(self, indices: Float64Array) -> IntArray:
        return np.asarray(np.searchsorted(self.indices, indices), dtype=np.int64)


def _table(index: int, boxes: BoxArray, *columns: npt.NDArray[np.generic]) -> Tensor:
    """Rows of an image, in double precision, which holds float32 exactly."""
    table = np.empty((len(boxes), 5 + len(columns)))
    table[:, _IMAGE] = index
    table[:, _BOX] = boxes
    for place, column in enumerate(columns, start=5):
        table[:, place] = column
    return torch.from_numpy(table)


def _annotations(table: Float64Array, label: int) -> list[dict[str, object]]:
    """Rows as COCO writes them."""
    sides = _as_xywh(table[:, _BOX])
    return [
        {"id": number, "image_id": image, "category_id": kind, "bbox": box, "area": area, "iscrowd": flag}
        for number, (image, kind, box, area, flag) in enumerate(
            zip(
                table[:, _IMAGE].astype(int).tolist(),
                table[:, label].astype(int).tolist(),
                sides.tolist(),
                (sides[:, 2] * sides[:, 3]).tolist(),
                table[:, _CROWD].astype(int).tolist(),
                strict=True,
            ),
            start=1,  # 0 would mean "none" to the evaluation
        )
    ]


def _as_xywh(boxes: BoxArray) -> Float64Array:
    corners = np.asarray(boxes, dtype=np.float64)
    return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)


def _by(values: npt.NDArray[np.generic], part: IntArray) -> Float64Array:
    return np.asarray(np.bincount(part, weights=values.astype(np.float64)), dtype=np.float64)


def _share(counted: Float64Array, whole: Float64Array, draws: Float64Array) -> MetricValue:
    """A share of sums over parts ``[P]``, with its interval over resamples ``[R, P]`` that have a whole."""
    value = float(counted.sum() / whole.sum())
    if not len(draws):
        return MetricValue(value=value)
    wholes = draws @ whole
    low, high = interval(np.where(wholes > 0, share_of(draws @ counted, wholes), np.nan))
    return MetricValue(value=value, low=low, high=high)


def _be_silent(*words: object) -> None:
    """In place of printing."""
