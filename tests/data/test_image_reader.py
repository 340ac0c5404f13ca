"""From files and images in memory to what networks see: one order of steps, whatever the image came as."""

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.data.datasets import GroupedJSON, ImageFolder
from dinov2.data.decoding import decode_levels
from dinov2.data.image_reader import ImageReader, PlacedImage
from dinov2.data.loaders import make_dataset
from dinov2.data.photometric import standardize_light
from dinov2.data.preprocessing import Chain, Placement, PreprocessingError
from dinov2.data.reading import UnreadableImageError
from dinov2.data.task_dataset import TaskDataset, box_targets, mask_targets
from dinov2.data.value_range import ValueRange

CHAIN = Chain.parse([{"window": {"low": 2, "high": 98}}, {"clahe": {"tiles": 2}}])
CROP = Chain.parse([{"crop": {"top": 4, "left": 6, "height": 20, "width": 24}}])


def coded(levels: np.ndarray, ending: str = ".png") -> bytes:
    return cv2.imencode(ending, levels if levels.ndim == 2 else levels[..., ::-1])[1].tobytes()


def levels(dtype: str, *channels: int) -> np.ndarray:
    top = np.iinfo(dtype).max
    return np.random.default_rng(3).integers(top // 5, top // 2, (32, 40, *channels)).astype(dtype)


@pytest.mark.parametrize("channels", [(), (3,)], ids=["grey", "rgb"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_steps_get_all_bits_and_light_comes_last_for_files_and_for_images_in_memory(
    dtype: str, channels: tuple[int, ...]
) -> None:
    image = levels(dtype, *channels)
    found = CHAIN(image).stacked
    expected = np.rint(found / 257.0).astype(np.uint8) if dtype == "uint16" else found
    expected = np.dstack([expected] * 3) if expected.ndim == 2 else expected
    for light, wanted in (("original", expected), ("standardized", standardize_light(Image.fromarray(expected)))):
        reader = ImageReader(None, CHAIN, light)
        inputs = [image, torch.from_numpy(image.transpose(2, 0, 1) if channels else image)]
        if dtype == "uint8" or not channels:
            inputs.append(Image.fromarray(image))
        for one in (reader.decode(coded(image), "a.png"), *map(reader.convert, inputs)):
            np.testing.assert_array_equal(np.asarray(one.image), np.asarray(wanted))
            assert one.placement is None


def test_the_range_of_values_comes_before_the_steps() -> None:
    file = io.BytesIO()
    values = np.linspace(-5, 10, 32 * 32, dtype=np.float32).reshape(32, 32)
    Image.fromarray(values).save(file, "TIFF")
    reader = ImageReader(ValueRange(0, 5), Chain.parse([{"gamma": {"gamma": 2}}]))
    expected = np.rint(np.clip(values / 5, 0, 1).astype(np.float64) ** 2 * 255)
    for picture in (reader.decode(file.getvalue(), "a.tif"), reader.convert(values)):
        assert abs(np.asarray(picture.image)[..., 0] - expected).max() <= 1
    np.testing.assert_array_equal(decode_levels(file.getvalue(), "a", ValueRange(0, 5)).max(), 65535)


def test_without_steps_all_is_as_before() -> None:
    image = levels("uint16")
    dark = ImageReader().decode(coded(image), "a.png").image
    np.testing.assert_array_equal(np.asarray(dark)[..., 1], np.rint(image / 257.0))
    assert ImageReader().convert(Image.fromarray(image)) == PlacedImage(dark)


def test_faults_name_the_step_and_the_file(tmp_path: Path) -> None:
    Image.fromarray(levels("uint8")).save(tmp_path / "a.png")
    appends = Chain.parse([{"sobel": {"output": "append"}}])
    too_far = Chain.parse(["median", {"crop": {"top": 90, "left": 0, "height": 9, "width": 9}}])
    for chain, message in (
        (appends, r"a\.png: preprocessing gives 2 channels where the network takes 1 \(grey\) or 3"),
        (too_far, r"a\.png: preprocessing step 2 \(crop\): "),
    ):
        dataset = make_dataset(dataset_str=f"ImageFolder:root={tmp_path}:labels=none", preprocessing=chain)
        with pytest.raises(UnreadableImageError, match=message):
            dataset.get_image(0)
        with pytest.raises(PreprocessingError):
            ImageReader(chain=chain).convert(levels("uint8"))


def test_masks_and_boxes_follow_what_is_cut_out(tmp_path: Path) -> None:
    image, mask = levels("uint8"), np.zeros((32, 40), np.uint8)
    mask[2:7, 3:9] = mask[10:15, 12:20] = 1
    (tmp_path / "annotations").mkdir()
    Image.fromarray(image).save(tmp_path / "a.png")
    Image.fromarray(mask).save(tmp_path / "m.png")
    boxes = [[3.0, 2.0, 9.0, 7.0], [12.0, 10.0, 20.0, 15.0], [0.0, 0.0, 6.0, 3.0]]
    row = f'{{"img_path": "a.png", "mask_path": "m.png", "boxes": {boxes}, "box_labels": [0, 0, 0], "group_id": "p"}}'
    text = f'{{"metainfo": {{"classes": ["good", "bad"], "mask_classes": ["good", "bad"]}}, "data_list": [{row}]}}'
    (tmp_path / "annotations" / "train.json").write_text(text)
    dataset = make_dataset(dataset_str=f"GroupedJSON:split=TRAIN:root={tmp_path}", preprocessing=CROP)
    assert isinstance(dataset, GroupedJSON)
    picture = dataset.get_placed_image(0)
    assert picture.placement is not None
    assert (picture.placement.origin, picture.placement.full_size) == ((4, 6), (32, 40))
    np.testing.assert_array_equal(np.asarray(picture.whole)[4:24, 6:30, 0], image[4:24, 6:30])
    assert not np.asarray(picture.whole)[24:].any()
    sample = TaskDataset(dataset, mask_targets(dataset, 2), lambda sample: sample)[0]
    np.testing.assert_array_equal(sample["image"][0], image[4:24, 6:30])
    np.testing.assert_array_equal(sample["mask"], mask[4:24, 6:30])
    sample = TaskDataset(dataset, box_targets(dataset, 2), lambda sample: sample)[0]
    assert sample["boxes"].tolist() == [[0, 0, 3, 3], [6, 6, 14, 11]]
    assert sample["box_labels"].tolist() == [0, 0]
    assert sample["boxes"].canvas_size == (20, 24)


def test_brightness_is_judged_after_the_steps(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "dark.png"), levels("uint16") // 64)
    dataset = ImageFolder(root=str(tmp_path), labels="none")
    assert "nearly black" in dataset.describe_light()
    dataset.preprocessing = CHAIN
    assert dataset.describe_light() == ""


def test_a_reference_is_cut_where_the_image_was() -> None:
    """Whatever a step has cut out of the reference itself."""
    grey = np.arange(12 * 10, dtype=np.uint8).reshape(12, 10)
    whole = Image.fromarray(np.stack([grey] * 3, axis=-1))
    image = PlacedImage(whole.crop((2, 3, 7, 9)), Placement((3, 2), (6, 5), (12, 10)))
    for reference in (PlacedImage(whole), PlacedImage(whole.crop((1, 1, 9, 11)), Placement((1, 1), (10, 8), (12, 10)))):
        cut = image.cut_alike(reference)
        assert cut.placement == image.placement
        np.testing.assert_array_equal(np.asarray(cut.image), np.asarray(image.image))
    with pytest.raises(ValueError, match=r"its reference has 5 x 4 pixels \(height x width\), the image 12 x 10"):
        image.cut_alike(PlacedImage(Image.new("RGB", (4, 5))))
