"""Detection: boxes come back to the image they are of, those that mean one object are joined, thresholds decide."""

from typing import Any

import numpy as np
import pytest
import torch
from predictor_stand_ins import GREY, RED, ColourModel, make_package, plain_image
from torch import Tensor

from dinov2.config import ConfigError
from dinov2.predict.predictor import Predictor
from dinov2.tasks import load_task_config
from dinov2.tasks.detection import DetectionTask
from dinov2.tasks.package import TaskPackage
from dinov2.tasks.predictions import DetectionPrediction
from dinov2.tasks.task import TaskFacts

CLASSES = ("hole", "scratch")


class RedBoxModel(ColourModel):
    """Boxes what is red, as a scratch, and says so again one pixel beside it with a lower score; gives logits."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        colours = self.colours(images)
        boxes, scores = torch.zeros(len(images), 3, 4), torch.full((len(images), 3, 2), -9.0)
        for number, red in enumerate((colours[:, 0] - colours[:, 1] > 0.3).cpu()):
            rows, columns = (torch.nonzero(red.any(dim=axis))[:, 0] for axis in (1, 0))
            if len(rows):
                sides = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
                boxes[number, 0] = torch.stack(sides).float()
                boxes[number, 1] = boxes[number, 0] + 1
                scores[number, :2, 1] = torch.tensor([2.0, 1.0])
        return {"boxes": boxes, "scores": scores}


def package(*pairs: str, **more: Any) -> TaskPackage:
    return make_package(RedBoxModel(), "detection", *pairs, classes=CLASSES, **more)


def red_at(height: int, width: int, *boxes: tuple[int, int, int, int]) -> np.ndarray:
    image = plain_image(height, width, GREY)
    for left, top, right, bottom in boxes:
        image[top:bottom, left:right] = RED
    return image


@pytest.mark.parametrize("resize", ["stretch", "shorter_side", "original"])
@pytest.mark.parametrize("size", [(64, 64), (96, 128), (50, 41)])
def test_boxes_lie_where_the_objects_are(resize: str, size: tuple[int, int]) -> None:
    """Also where large images are seen window by window, and where the object is in several of these."""
    height, width = size
    truth = (1, height // 2 - 6, 17, height // 2 + 10)  # where a cut to the middle would lose it
    predictor = Predictor.of(package("detection.nms_iou=0.4", image_size=64, resize=resize))
    (found,) = predictor.predict([red_at(height, width, truth)])
    assert isinstance(found, DetectionPrediction)
    assert found.size == size
    assert len(found) == 1
    np.testing.assert_allclose(found.boxes[0], truth, atol=0 if resize == "original" else 1.6)
    assert found.labels.tolist() == [1]
    assert found.scores[0] == pytest.approx(float(torch.tensor(2.0).sigmoid()))
    assert predictor.predict([plain_image(height, width, GREY)])[0].describe() == "nothing"


def test_what_a_window_has_cut_is_left_out_and_what_is_too_large_for_one_stays() -> None:
    predictor = Predictor.of(package(image_size=48, resize="original"))
    small = (20, 35, 60, 45)  # whole in the window from column 19 (or 32) on, cut by the first one at 48
    (found,) = predictor.predict([red_at(48, 128, small)])
    (larger,) = predictor.predict([red_at(48, 128, (5, 10, 120, 30))])
    assert [box for box in found.boxes.tolist() if box[2] - box[0] < 25] == []
    assert larger.boxes[:, 0].min() == 5
    assert larger.boxes[:, 2].max() == 120


def test_boxes_of_one_object_are_joined_by_the_dense_head_only() -> None:
    image = red_at(16, 16, (3, 3, 12, 12))
    for kind, count in (("yolo", 1), ("detr", 2)):
        (found,) = Predictor.of(package(f"head.kind={kind}", "detection.nms_iou=0.5")).predict([image])
        assert len(found) == count
    (found,) = Predictor.of(package("detection.nms_iou=0.95")).predict([image])
    assert len(found) == 2
    (found,) = Predictor.of(package("detection.nms_iou=0.95", "detection.max_boxes=1")).predict([image])
    assert len(found) == 1


def test_thresholds_of_the_file_decide_and_what_they_hold_back_is_kept_aside() -> None:
    image = red_at(16, 16, (3, 3, 12, 12))
    made = package("head.kind=detr", "detection.score_threshold=0.8")
    for thresholds, count in (({}, 1), ({"scratch": 0.7}, 2), ({"scratch": 0.9, "hole": 0.1}, 0)):
        options: Any = {"thresholds": thresholds}
        predictor = Predictor(made.model, made.task, made.preprocessing, **options)
        (found,) = predictor.predict([image])
        assert len(found) == count
        assert found.doubtful is not None
        assert len(found.doubtful) == 2 - count
        assert found.defect_score == pytest.approx(float(torch.tensor(2.0).sigmoid()))


def test_sides_are_filled_up_on_the_right_and_below() -> None:
    """So that boxes keep their coordinates, in training as in prediction."""
    task = DetectionTask(load_task_config(None, ["task=detection"]), TaskFacts(classes=CLASSES))
    task._patch_size = (14, 14)
    seen: list[Tensor] = []
    task.forward(seen.append, {"image": torch.ones(1, 3, 20, 28)})
    assert seen[0].shape == (1, 3, 28, 28)
    assert seen[0][:, :, :20].min() == 1
    assert seen[0][:, :, 20:].max() == 0


def test_targets_reach_the_head_that_wants_them() -> None:
    given: list[Any] = []
    batch = {"image": torch.zeros(1, 3, 8, 8), "boxes": [torch.zeros(2, 4)], "box_labels": [torch.zeros(2).long()]}
    for kind in ("yolo", "detr"):
        task = DetectionTask(
            load_task_config(None, ["task=detection", f"head.kind={kind}"]), TaskFacts(classes=CLASSES)
        )
        task.forward(lambda image, targets=None: given.append(targets), batch)
    assert given[0] is None
    assert sorted(given[1]) == ["box_labels", "boxes"]


def test_mirrored_boxes_are_not_averaged() -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.flips: boxes of an image and of the mirrored one cannot be"):
        load_task_config(None, ["task=detection", "evaluation.flips=true"])
    with pytest.raises(ValueError, match="flips: boxes of an image and of the mirrored one cannot be averaged"):
        Predictor.of(package(), flips=True)
    with pytest.raises(ConfigError, match="threshold_level=object: task=classification has image, part"):
        load_task_config(None, ["evaluation.threshold=f1", "evaluation.threshold_level=object"])
