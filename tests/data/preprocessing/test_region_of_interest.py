"""Regions of interest: which pixels count in training targets, predictions and metrics, and what is wrong with them."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinov2.config import ConfigError
from dinov2.data.datasets.dense_targets import IGNORED
from dinov2.data.image_reader import ImageReader
from dinov2.data.loaders import make_dataset
from dinov2.data.preprocessing import Chain, PreprocessingError
from dinov2.tasks.predictions import DepthPrediction, DetectionPrediction, NamedPredictions, SegmentationPrediction

RECTANGLE = [[2, 1], [8, 1], [8, 5], [2, 5]]
IMAGE = np.arange(1, 81, dtype=np.uint8).reshape(8, 10)
INSIDE = np.zeros((8, 10), dtype=bool)
INSIDE[1:5, 2:8] = True


def chain(*steps: Any, **region: Any) -> Chain:
    return Chain.parse([{"region_of_interest": region}, *steps])


@pytest.mark.parametrize("keep", ["inside", "outside"])
@pytest.mark.parametrize("shape", ["polygon", "mask"])
def test_pixels_outside_are_black_and_do_not_count(tmp_path: Path, keep: str, shape: str) -> None:
    Image.fromarray(INSIDE.astype(np.uint8)).save(tmp_path / "roi.png")
    where = {"polygon": RECTANGLE} if shape == "polygon" else {"mask": str(tmp_path / "roi.png")}
    kept = INSIDE if keep == "inside" else ~INSIDE
    for image in (IMAGE, np.dstack([IMAGE.astype(np.uint16)] * 3)):
        frame = chain(keep=keep, **where)(image)
        np.testing.assert_array_equal(frame.valid, kept)
        np.testing.assert_array_equal(frame.image, image * (kept if image.ndim == 2 else kept[..., None]))
    frame = chain({"crop": {"top": 2, "left": 3, "height": 5, "width": 6}}, keep=keep, blacken=False, **where)(IMAGE)
    np.testing.assert_array_equal(frame.image, IMAGE[2:7, 3:9])
    np.testing.assert_array_equal(frame.valid, kept[2:7, 3:9])
    parsed = chain(keep=keep, **where)
    assert Chain.parse(parsed.to_values()) == parsed


def test_every_camera_has_its_own_region_and_several_add_up() -> None:
    steps = [
        {"region_of_interest": {"images": "*cam1*", "polygon": RECTANGLE}},
        {"region_of_interest": {"images": "*/cam1/b*", "polygon": [[0, 0], [4, 0], [4, 8], [0, 8]]}},
    ]
    both = Chain.parse(steps)
    assert both(IMAGE, "line/cam2/a.png").placement is None
    np.testing.assert_array_equal(both(IMAGE, "line/cam1/a.png").valid, INSIDE)
    left = INSIDE.copy()
    left[:, 4:] = False
    np.testing.assert_array_equal(both(IMAGE, "line/cam1/b.png").valid, left)
    np.testing.assert_array_equal(both.region("line/cam1/b.png", (8, 10)), left)
    with pytest.raises(PreprocessingError, match=r"step 1 \(region_of_interest\): it is for images '\*cam1\*'"):
        ImageReader(chain=both).convert(IMAGE)


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ({"polygon": [[0, 0], [11, 0], [0, 5]]}, "does not lie in an image of 10 x 8 pixels"),
        ({"polygon": [[1, 1], [1.2, 1], [1, 1.2]]}, "no pixel of the polygon counts"),
        ({"mask": "MASK"}, r"roi\.png has \[4, 4\] pixels, the image \[8, 10\]"),
    ],
)
def test_a_region_that_does_not_fit_is_an_error_of_the_step_and_the_image(
    tmp_path: Path, region: dict[str, Any], message: str
) -> None:
    Image.fromarray(np.ones((4, 4), np.uint8)).save(tmp_path / "roi.png")
    steps = chain(**{key: str(tmp_path / "roi.png") if value == "MASK" else value for key, value in region.items()})
    for call in (lambda: steps(IMAGE, "a.png"), lambda: steps.region("a.png", (8, 10))):
        with pytest.raises(
            PreprocessingError, match=rf"a\.png: preprocessing step 1 \(region_of_interest\): .*{message}"
        ):
            call()


def test_what_is_no_region_and_files_that_are_missing() -> None:
    for region in ({}, {"mask": "a", "polygon": RECTANGLE}, {"polygon": [[0, 0], [1, 1]]}):
        with pytest.raises(ConfigError, match="region_of_interest"):
            chain(**region)
    late = Chain.parse([{"crop": {"height": 4, "width": 4}}, {"region_of_interest": {"polygon": RECTANGLE}}])
    with pytest.raises(PreprocessingError, match="must come before steps that crop"):
        late(IMAGE)
    message = re.escape("preprocessing step 1 (region_of_interest): none.png does not exist")
    with pytest.raises(FileNotFoundError, match=message):
        make_dataset(dataset_str="ImageFolder:root=x:labels=none", preprocessing=chain(mask="none.png"))


def test_targets_outside_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    Image.fromarray(IMAGE).save(tmp_path / "a.png")
    Image.fromarray(np.ones((8, 10), np.uint8)).save(tmp_path / "m.png")
    boxes = "[[2, 1, 4, 3], [0, 0, 3, 8], [7, 4, 9, 6]]"  # the middle of the first alone lies inside
    row = f'{{"img_path": "a.png", "mask_path": "m.png", "boxes": {boxes}, "box_labels": [1, 0, 0], "group_id": "p"}}'
    row = row[:-1] + ', "height_path": "m.png"}'
    text = f'{{"metainfo": {{"classes": ["good", "bad"], "mask_classes": ["good", "bad"]}}, "data_list": [{row}]}}'
    (tmp_path / "annotations" / "train.json").write_text(text)
    dataset: Any = make_dataset(
        dataset_str=f"GroupedJSON:split=TRAIN:root={tmp_path}", preprocessing=chain(images="*a.png", polygon=RECTANGLE)
    )
    np.testing.assert_array_equal(dataset.get_mask(0), np.where(INSIDE, 1, IGNORED))
    np.testing.assert_array_equal(np.isnan(dataset.get_depth(0)), ~INSIDE)
    assert dataset.get_boxes(0)[0].tolist() == [[2, 1, 4, 3]]
    assert dataset.get_objects(0)[1].tolist() == dataset.get_box_labels(0).tolist() == [1]
    dataset.preprocessing = Chain.parse(["median"])
    (tmp_path / "a.png").unlink()
    assert dataset.counted_region(0) is None
    assert dataset.get_box_labels(0).tolist() == [1, 0, 0], "no image is opened where all pixels count"


def test_the_share_of_a_map_that_counts() -> None:
    placement = chain(polygon=RECTANGLE)(IMAGE).placement
    assert placement is not None
    scores = np.where(INSIDE, 0.2, 0.8)
    assert placement.share_that_counts(scores) == 0.25
    assert placement.share_that_counts(0 * scores) == placement.share_that_counts(-scores + 1) == 1.0


def test_nothing_is_predicted_outside() -> None:
    placement = chain({"crop": {"top": 1, "height": 6, "width": 10}}, polygon=RECTANGLE)(IMAGE).placement
    assert placement is not None
    ones = np.ones((6, 10), dtype=np.float32)
    boxes = np.array([[2, 0, 4, 2], [0, 0, 3, 6], [4, 4, 6, 6]], dtype=np.float32)
    found = DetectionPrediction(boxes, ones[0, :3], np.arange(3), size=(6, 10))
    whole = NamedPredictions(
        mask=SegmentationPrediction(np.ones((6, 10), np.uint8), ones * 0.7, ones * 0.7),
        depth=DepthPrediction(ones),
        boxes=found,
    ).placed(placement)
    mask: Any = whole["mask"]
    np.testing.assert_array_equal(mask.labels, INSIDE)
    np.testing.assert_allclose(mask.defect, INSIDE * 0.7, rtol=1e-6)
    np.testing.assert_allclose(mask.scores, np.where(INSIDE, 0.7, 1), rtol=1e-6)
    np.testing.assert_array_equal(np.isnan(whole["depth"].depth), ~INSIDE)
    assert whole["boxes"].to_dict()["objects"][0]["box"] == [2, 1, 4, 3]
    assert len(whole["boxes"]) == 1
