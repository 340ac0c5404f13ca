"""Boxes: average precision and matches against pycocotools, the rest against loops."""

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dinov2.eval.metrics.detection import (
    FALSE_ALARM,
    IGNORED,
    MATCH_IOU,
    DetectionMetrics,
    detection_error,
    match_boxes,
)
from dinov2.eval.metrics.thresholds import ThresholdRule, choose_threshold

CLASSES = ("open", "short", "spur", "never there")
NUM_IMAGES = 12
STATS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar_1", "ar_10", "ar")
STATS += ("ar_small", "ar_medium", "ar_large")


def problem(seed: int, *, crowds: bool = True, steps: int = 8) -> dict[int, dict[str, Any]]:
    """Images with objects and boxes around them, some empty of one, the other or both; scores of few values tie."""
    generator = np.random.default_rng(seed)
    images = {}
    for index in range(NUM_IMAGES):
        num_true, num_boxes = (int(generator.integers(0, most)) if index % 5 else 0 for most in (6, 25))
        num_boxes += 3 * (index == 5)
        corners = generator.integers(0, 200, (num_true, 2))
        true_boxes = np.concatenate([corners, corners + generator.integers(4, 150, (num_true, 2))], axis=1)
        true_labels = generator.integers(0, 3, num_true)
        boxes, labels = np.zeros((num_boxes, 4)), generator.integers(0, 4, num_boxes)
        for place in range(num_boxes):
            if num_true and generator.random() < 0.7:
                near = int(generator.integers(num_true))
                boxes[place] = true_boxes[near] + generator.integers(-6, 7, 4)
                labels[place] = true_labels[near]
            else:
                boxes[place, :2] = generator.integers(0, 200, 2)
                boxes[place, 2:] = boxes[place, :2] + generator.integers(4, 150, 2)
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        images[index] = {
            "boxes": boxes.astype(np.float32),
            "scores": (generator.integers(1, steps, num_boxes) / steps).astype(np.float32),
            "labels": labels,
            "true_boxes": true_boxes.astype(np.float32),
            "true_labels": true_labels,
            "crowd": (generator.random(num_true) < 0.2) & crowds,
        }
    return images


def metrics_of(images: dict[int, dict[str, Any]], parts: int = NUM_IMAGES, **more: Any) -> DetectionMetrics:
    metrics = DetectionMetrics(CLASSES, [f"part {index % parts}" for index in range(NUM_IMAGES)])
    for index, image in images.items():
        metrics.update(index, **image, **more)
    return metrics


def coco_of(images: dict[int, dict[str, Any]]) -> COCOeval:
    truth, found = [], []
    for index, image in images.items():
        for boxes, labels, crowd, scores, rows in (
            (image["true_boxes"], image["true_labels"], image["crowd"], np.ones(len(image["crowd"])), truth),
            (image["boxes"], image["labels"], np.zeros(len(image["labels"])), image["scores"], found),
        ):
            for (left, top, right, bottom), label, flag, score in zip(boxes, labels, crowd, scores, strict=True):
                sides = [float(left), float(top), float(right - left), float(bottom - top)]
                rows.append(
                    {"id": len(rows) + 1, "image_id": index, "category_id": int(label), "bbox": sides,
                     "area": sides[2] * sides[3], "iscrowd": int(flag), "score": float(score)}
                )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        api = COCO()
        api.dataset = {
            "info": {},
            "images": [{"id": index} for index in images],
            "categories": [{"id": place} for place in range(len(CLASSES))],
            "annotations": truth,
        }
        api.createIndex()
        evaluation = COCOeval(api, api.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("seed", range(4))
def test_average_precision_is_that_of_pycocotools(seed: int) -> None:
    images = problem(seed)
    expected = coco_of(images)
    metrics = metrics_of(dict(reversed(images.items())))  # the order of images must not matter
    values = metrics.compute()
    known = {name: value for name, value in zip(STATS, expected.stats.tolist(), strict=True) if value > -1}
    assert {name: values[name] for name in STATS if name in values} == pytest.approx(known)
    precision = expected.eval["precision"]
    assert values["ap50/spur"] == pytest.approx(precision[0, :, 2, 0, 2].mean())
    assert "ap50/never there" not in values
    curve = metrics.precision_recall()["short"]
    assert curve.precision == pytest.approx(precision[0, :, 1, 0, 2])
    assert list(metrics.precision_recall()) == ["open", "short", "spur"]


@pytest.mark.parametrize("seed", range(4))
def test_boxes_hit_the_objects_that_pycocotools_says(seed: int) -> None:
    images = problem(seed)
    by_image: dict[int, dict[int, float]] = {}
    evaluated = [entry for entry in coco_of(images).evalImgs if entry and entry["aRng"] == [0, 1e10]]
    ignored = set()
    for entry in evaluated:
        matched = by_image.setdefault(entry["image_id"], {})
        for identity, object_id, ignore in zip(
            entry["dtIds"], entry["dtMatches"][0], entry["dtIgnore"][0], strict=True
        ):
            matched[identity] = object_id
            if ignore:
                ignored.add(identity)
    first_box = first_object = 1
    for index, image in images.items():
        order = np.argsort(-image["scores"], kind="stable")
        hits = match_boxes(
            image["boxes"][order], image["labels"][order], image["true_boxes"], image["true_labels"],
            image["crowd"], MATCH_IOU,
        )  # fmt: skip
        for place, hit in zip(order.tolist(), hits.tolist(), strict=True):
            identity = first_box + place
            expected = int(by_image[index][identity]) - first_object if by_image[index][identity] else FALSE_ALARM
            assert hit == (IGNORED if identity in ignored else expected)
        first_box += len(image["boxes"])
        first_object += len(image["true_boxes"])


def test_more_objects_than_coco_looks_at_still_count() -> None:
    boxes = np.array([[x * 10, y * 10, x * 10 + 8, y * 10 + 8] for x in range(25) for y in range(20)], dtype=np.float32)
    labels = np.zeros(500, dtype=np.int64)
    image = {"boxes": boxes, "scores": np.ones(500), "labels": labels, "true_boxes": boxes, "true_labels": labels}
    values = metrics_of({0: image}).compute()
    assert values["ap50"] == values["ar"] == values["f33"] == values["ap33"] == 1
    assert values["image_misses"] == values["image_false_alarms"] == 0


def hits_by_loop(images: dict[int, dict[str, Any]], min_iou: float) -> Iterator[tuple[int, float, int, int]]:
    """Image, score, class and what is hit."""
    for index, image in images.items():
        order = np.argsort(-image["scores"], kind="stable")
        hits = match_boxes(
            image["boxes"][order], image["labels"][order], image["true_boxes"], image["true_labels"],
            image["crowd"], min_iou,
        )  # fmt: skip
        for place, hit in zip(order.tolist(), hits.tolist(), strict=True):
            yield index, float(image["scores"][place]), int(image["labels"][place]), hit


@pytest.mark.parametrize("seed", range(2))
def test_deep_pcb_counts_every_threshold(seed: int) -> None:
    images = problem(seed, steps=10_000)
    rows = sorted((row for row in hits_by_loop(images, 0.33) if row[3] != IGNORED), key=lambda row: -row[1])
    num_true = np.zeros(4)
    for image in images.values():
        np.add.at(num_true, image["true_labels"], ~image["crowd"])
    best = 0.0
    for _, threshold, _, _ in rows:
        kept = [hit >= 0 for _, score, _, hit in rows if score >= threshold]
        precision, recall = sum(kept) / len(kept), sum(kept) / num_true.sum()
        best = max(best, 2 * precision * recall / max(precision + recall, 1e-9))
    average = []
    for label in range(3):
        right = total = 0
        sum_of_precisions = 0.0
        for _, _, kind, hit in rows:
            total += kind == label
            if kind == label and hit >= 0:
                right += 1
                sum_of_precisions += right / total
        average.append(sum_of_precisions / num_true[label])
    values = metrics_of(images).compute()
    assert values["f33"] == pytest.approx(best)
    assert values["ap33"] == pytest.approx(np.mean(average))


@pytest.mark.parametrize("level", ["image", "part"])
def test_misses_and_false_alarms_are_those_of_a_loop(level: str) -> None:
    images = problem(3)
    for image in images.values():
        image["found"] = image["scores"] >= 0.6
    metrics = metrics_of(images, parts=6)
    unit_of = [index if level == "image" else index % 6 for index in range(NUM_IMAGES)]
    units = sorted(set(unit_of))
    found, defective, missed, false = (dict.fromkeys(units, 0) for _ in range(4))
    for index, image in images.items():
        unit = unit_of[index]
        found[unit] += int(image["found"].sum())
        defective[unit] += len(image["true_boxes"])
        missed[unit] += int((~image["crowd"]).sum())
    for index, score, _, hit in hits_by_loop(images, MATCH_IOU):
        if score >= 0.6:
            missed[unit_of[index]] -= hit >= 0
            false[unit_of[index]] += hit == FALSE_ALARM
    bad = [unit for unit in units if defective[unit]]
    values = metrics.compute()
    assert values[f"{level}_misses"] == pytest.approx(sum(missed.values()) / len(units))
    assert values[f"{level}_false_alarms"] == pytest.approx(sum(false.values()) / len(units))
    assert values[f"{level}_escape_rate"] == pytest.approx(sum(not found[unit] for unit in bad) / len(bad))
    if level == "image":
        good = [unit for unit in units if not defective[unit]]
        assert values["image_alarm_rate"] == pytest.approx(sum(found[unit] > 0 for unit in good) / len(good))
    scored = metrics.scores(num_resamples=200)
    assert scored is not None
    metric = getattr(scored, level).metrics["false_alarms"]
    assert metric.low < metric.value < metric.high


def one_box(score: float, *, is_true: bool) -> dict[str, Any]:
    box, label = np.array([[10, 10, 50, 50]], dtype=np.float32), np.zeros(1, dtype=np.int64)
    none, no_label = np.zeros((0, 4), dtype=np.float32), np.zeros(0, dtype=np.int64)
    truth = {"true_boxes": box, "true_labels": label} if is_true else {"true_boxes": none, "true_labels": no_label}
    return {"boxes": box, "scores": np.array([score]), "labels": label, **truth}


def test_false_alarms_at_zero_escapes() -> None:
    """Parts 0 and 1 are defective, 2 to 4 good; two images of each show it, and the better one counts."""
    scores = {0: (0.1, 0.9), 1: (0.4, 0.2), 2: (0.1, 0.3), 3: (0.5, 0.6), 4: (0.4, 0.1)}
    images = {
        part + 5 * view: one_box(score, is_true=part < 2)
        for part, both in scores.items()
        for view, score in enumerate(both)
    }
    metrics = DetectionMetrics(CLASSES, [f"part {index % 5}" for index in range(10)])
    for index, image in images.items():
        metrics.update(index, **image)
    values = metrics.compute()
    assert values["zero_escapes/threshold"] == 0.4
    assert values["zero_escapes/false_alarms"] == 3  # 0.5, 0.6 and 0.4
    assert (values["zero_escapes/good_parts"], values["zero_escapes/defective_parts"]) == (3, 2)
    assert values["false_alarms_at_zero_escapes"] == 1
    blind = DetectionMetrics(CLASSES, ["a", "b"])
    nothing = one_box(0.5, is_true=True)
    nothing |= {"boxes": nothing["boxes"][:0], "scores": nothing["scores"][:0], "labels": nothing["labels"][:0]}
    blind.update(0, **nothing)
    blind.update(1, **one_box(0.5, is_true=False))
    assert blind.zero_escapes() == {"zero_escapes/parts_without_box": 1}


def test_empty_sets_and_wrong_rows() -> None:
    assert DetectionMetrics(CLASSES, []).compute() == {}
    good = one_box(0.5, is_true=False)
    nothing = metrics_of({0: {**good, "boxes": good["boxes"][:0], "scores": good["scores"][:0],
                              "labels": good["labels"][:0]}})  # fmt: skip
    assert nothing.compute() == {"image_misses": 0, "image_false_alarms": 0, "image_alarm_rate": 0}
    with pytest.raises(ValueError, match="differ in length"):
        metrics_of({0: {**good, "labels": good["labels"][:0]}})
    with pytest.raises(ValueError, match=r"classes must be in \[0, 4\)"):
        metrics_of({0: {**good, "labels": np.array([4])}})


def test_images_say_how_wrong_they_are() -> None:
    right, empty = one_box(0.5, is_true=True), one_box(0.5, is_true=False)
    for image, error in ((right, 0), (empty, 1)):
        assert detection_error(**image, crowd=np.zeros(len(image["true_boxes"]), dtype=bool)) == error
    assert detection_error(**right, crowd=np.ones(1, dtype=bool)) == 0
    nothing = {name: value[:0] for name, value in empty.items()}
    assert detection_error(**nothing, crowd=np.zeros(0, dtype=bool)) == 0


@pytest.mark.parametrize("goal", ["f1", "recall", "false_alarms"])
@pytest.mark.parametrize("seed", range(3))
def test_thresholds_are_the_best_of_all(goal: str, seed: int) -> None:
    generator = np.random.default_rng(seed)
    scores = generator.integers(1, 12, 40) / 12
    positive = generator.random(40) < scores
    threshold = choose_threshold(scores, positive, goal=goal, target=0.3 if goal == "false_alarms" else 0.8)
    assert threshold is not None

    def outcome(cut: float) -> tuple[float, float, float]:
        hits, alarms = int((positive & (scores >= cut)).sum()), int((~positive & (scores >= cut)).sum())
        return hits / positive.sum(), alarms / (~positive).sum(), 2 * hits / (hits + alarms + positive.sum())

    tried = [*(value - 1 / 24 for value in np.unique(scores)), 1.0]
    recall, alarms, f1 = outcome(threshold)
    if goal == "recall":
        assert recall >= 0.8
        assert all(outcome(cut)[0] < 0.8 for cut in tried if cut > threshold + 0.01)
    elif goal == "false_alarms":
        assert alarms <= 0.3
        assert all(outcome(cut)[1] > 0.3 for cut in tried if cut < threshold - 0.01)
    else:
        assert f1 == max(outcome(cut)[2] for cut in tried)
    assert choose_threshold(scores[:0], positive[:0], goal=goal) is None


def test_thresholds_of_classes_at_three_levels() -> None:
    """Objects score 0.8, false boxes on good images 0.6: in between lies what tells them apart, at every level."""
    metrics = DetectionMetrics(CLASSES, ["a", "b", "c", "d"])
    for index, is_true in enumerate((True, True, False, False)):
        metrics.update(index, **one_box(0.8 if is_true else 0.6, is_true=is_true))
    for level in ("object", "image", "part"):
        for goal, target in (("f1", 0.0), ("recall", 1.0), ("false_alarms", 0.0)):
            assert metrics.thresholds(ThresholdRule(goal, target, level)) == {"open": pytest.approx(0.7)}
    assert metrics.thresholds(ThresholdRule("false_alarms", 0.25, "object")) == {"open": pytest.approx(0.7)}
    assert metrics.thresholds(ThresholdRule("false_alarms", 1.0, "object")) == {"open": pytest.approx(0.3)}
