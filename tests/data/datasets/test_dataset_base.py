"""What every dataset inherits."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2.data.datasets.base import ImageDataset
from dinov2.data.decoding import ByteCache, UnreadableImageError


class Two(ImageDataset):
    """An image of class 1 and one without a label."""

    def __init__(self, root: Path, **transforms: object) -> None:
        super().__init__(**transforms)
        self.root = root

    def __len__(self) -> int:
        return 2

    def get_image_path(self, index: int) -> Path:
        return self.root / f"{index}.png"

    def get_target(self, index: int) -> int | None:
        return (1, None)[index]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for index in range(2):
        Image.new("L", (3, 2), 10 * index).save(tmp_path / f"{index}.png")
    return tmp_path


def test_items_are_rgb_images_and_targets(root: Path) -> None:
    dataset = Two(root)
    image, target = dataset[1]
    assert (image.mode, image.size, image.getpixel((0, 0)), target) == ("RGB", (3, 2), (10, 10, 10), -1)
    assert dataset[0][1] == 1


def test_transforms_are_applied(root: Path) -> None:
    dataset = Two(root, transform=lambda image: image.size, target_transform=lambda target: target * 10)
    assert [dataset[index] for index in range(2)] == [((3, 2), 10), ((3, 2), -10)]


def test_targets_and_groups_of_all_images(root: Path) -> None:
    targets = Two(root).get_targets()
    assert (targets.tolist(), targets.dtype) == ([1, -1], np.int64)
    assert Two(root).get_group_ids() == [str(root / "0.png"), str(root / "1.png")]
    assert Two(root).classes == ()


def test_cache_keeps_encoded_files(root: Path) -> None:
    dataset = Two(root)
    dataset.cache = ByteCache(10_000)
    before = dataset.get_image(1).tobytes()
    (root / "1.png").unlink()
    assert dataset.get_image(1).tobytes() == before
    with pytest.raises(UnreadableImageError, match=r"1\.png: no such file"):
        Two(root).get_image(1)


def test_unreadable_image_names_its_path(root: Path) -> None:
    (root / "0.png").write_bytes(b"nonsense")
    with pytest.raises(UnreadableImageError, match=r"0\.png: not an image"):
        Two(root)[0]
