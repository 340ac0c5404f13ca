"""Pascal VOC: lists, images and palette masks in the published layout; torchvision reads the same."""

from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image

from dinov2.data.datasets import BadTargetError, MaskSource, VOCSegmentation

NAMES = {"train": ["2007_000032", "2007_000039"], "val": ["2007_000033"]}


def palette() -> list[int]:
    """The colours of the published masks: the bits of an index, dealt to red, green, blue from the top."""
    colours = []
    for index in range(256):
        colours += [sum((index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8)) for channel in range(3)]
    return colours


def mask_of(name: str) -> np.ndarray:
    mask = np.random.default_rng(int(name[-4:])).integers(0, 21, (6, 8), dtype=np.uint8)
    mask[0] = 255
    return mask


@pytest.fixture
def root(tmp_path: Path) -> Path:
    year = tmp_path / "VOCdevkit" / "VOC2012"
    for folder in ("ImageSets/Segmentation", "JPEGImages", "SegmentationClass"):
        (year / folder).mkdir(parents=True)
    for split, names in (*NAMES.items(), ("trainval", NAMES["train"] + NAMES["val"])):
        (year / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    for name in NAMES["train"] + NAMES["val"]:
        Image.new("RGB", (8, 6), (200, 100, 50)).save(year / "JPEGImages" / f"{name}.jpg")
        mask = Image.frombytes("P", (8, 6), mask_of(name).tobytes())
        mask.putpalette(palette())
        mask.save(year / "SegmentationClass" / f"{name}.png")
    return tmp_path


def test_images_and_masks_are_those_that_torchvision_reads(root: Path) -> None:
    dataset = VOCSegmentation(root, "TRAINVAL")
    assert isinstance(dataset, MaskSource)
    assert len(dataset.mask_classes) == 21
    assert dataset.mask_classes[0] == "background"
    assert list(dataset.mask_classes[1:]) == sorted(dataset.mask_classes[1:])  # the published order
    assert dataset.mask_classes[15] == "person"
    torchvisions = torchvision.datasets.VOCSegmentation(str(root), year="2012", image_set="trainval")
    assert len(dataset) == len(torchvisions) == 3
    for index, name in enumerate(NAMES["train"] + NAMES["val"]):
        image, mask = torchvisions[index]
        assert dataset.get_image_path(index).name == f"{name}.jpg"
        assert np.array_equal(dataset.get_image(index), image)
        assert dataset.get_mask(index).tolist() == np.asarray(mask).tolist() == mask_of(name).tolist()
        assert dataset.get_target(index) is None
    assert dataset.get_targets().tolist() == [-1, -1, -1]


def test_other_splits_years_and_roots(root: Path) -> None:
    for folder in ("", "VOCdevkit", "VOCdevkit/VOC2012"):
        assert VOCSegmentation(root / folder, "val").get_image_path(0).is_file()
    with pytest.raises(ValueError, match="unknown split 'valid'; allowed are TRAIN, VAL, TRAINVAL, TEST"):
        VOCSegmentation(root, "valid")
    with pytest.raises(FileNotFoundError, match=r"Segmentation holds no test\.txt; it has train\.txt, trainval\.txt"):
        VOCSegmentation(root, "TEST")
    with pytest.raises(FileNotFoundError, match="holds no VOCdevkit/VOC2007/ImageSets/Segmentation"):
        VOCSegmentation(root, "val", 2007)
    with pytest.raises(ValueError, match="VOC2012' is not of year 2007; give year=2012"):
        VOCSegmentation(root / "VOCdevkit" / "VOC2012", "val", 2007)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\n \n", r"train\.txt lists nothing"),
        (b"a\n\nb\na\n", r"train\.txt, line 4: 'a' is already in line 1"),
        (b"a\n../b\n", r"train\.txt, line 2: name '../b' leaves the set's root"),
        (b"\xff\xfea", r"train\.txt is not UTF-8 at position 0"),
    ],
)
def test_broken_lists(root: Path, text: bytes, message: str) -> None:
    (root / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation" / "train.txt").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        VOCSegmentation(root, "TRAIN")


def test_a_value_that_is_no_class(root: Path) -> None:
    dataset = VOCSegmentation(root, "VAL")
    Image.fromarray(np.full((6, 8), 21, np.uint8)).save(dataset.get_mask_path(0))
    with pytest.raises(BadTargetError, match=r"2007_000033\.png: holds the value 21; allowed are 0 to 20"):
        dataset.get_mask(0)


def test_files_with_other_endings_are_found_by_name_and_values_may_be_told(root: Path) -> None:
    year = root / "VOCdevkit" / "VOC2012"
    name = NAMES["val"][0]
    (year / "JPEGImages" / f"{name}.jpg").rename(year / "JPEGImages" / f"{name}.JPG")
    Image.open(year / "SegmentationClass" / f"{name}.png").save(year / "SegmentationClass" / f"{name}.bmp")
    (year / "SegmentationClass" / f"{name}.png").unlink()
    dataset = VOCSegmentation(root, "VAL")
    assert dataset.get_image_path(0).name == f"{name}.JPG"
    assert dataset.get_mask(0).tolist() == mask_of(name).tolist()
    reversed_values = ",".join(map(str, range(20, -1, -1)))
    mask = VOCSegmentation(root, "VAL", mask_values=reversed_values).get_mask(0)
    assert mask[1:].tolist() == (20 - mask_of(name)[1:]).tolist()
