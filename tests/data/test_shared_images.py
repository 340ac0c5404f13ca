"""Images that two sets share are found by path and by content."""

import logging
import shutil
from pathlib import Path

import pytest
from PIL import Image

from dinov2.data.datasets import ImageDataset, ImageFolder
from dinov2.data.shared_images import find_shared_images, warn_of_shared_images
from tests.data.data_stand_ins import MemoryLabels


def fill(folder: Path, *levels: int) -> ImageFolder:
    folder.mkdir(parents=True, exist_ok=True)
    for level in levels:
        Image.new("L", (8, 8), level).save(folder / f"{level}.bmp")  # all of one size
    return ImageFolder(folder, labels="none")


def test_equal_paths_and_equal_contents_are_found(tmp_path: Path) -> None:
    train = fill(tmp_path / "a", 1, 2, 3)
    assert find_shared_images(train, fill(tmp_path / "b", 4, 5)) == ([], 2)
    again = ImageFolder(tmp_path / "b" / ".." / "a", labels="none")
    assert [len(found) for found in find_shared_images(train, again)[:1]] == [3]
    shutil.copy(tmp_path / "a" / "2.bmp", tmp_path / "b" / "renamed.bmp")
    shared, looked = find_shared_images(train, ImageFolder(tmp_path / "b", labels="none"))
    assert (shared, looked) == ([(f"{tmp_path}/a/2.bmp", f"{tmp_path}/b/renamed.bmp")], 3)


def test_what_is_shared_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train, val, test = fill(tmp_path / "a", 1, 2), fill(tmp_path / "b", 1, 3), fill(tmp_path / "c", 4)
    sets: dict[str, ImageDataset] = {"train": train, "val": val, "test": test}
    with caplog.at_level(logging.WARNING):
        assert warn_of_shared_images(sets) == 1
        assert warn_of_shared_images({"val": val, "test": ImageFolder(tmp_path / "b", labels="none")}) == 2
        assert warn_of_shared_images({"train": train, "val": train, "test": MemoryLabels()}) == 0
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith(
        f"1 of 2 images of val that were looked at are in train too, such as {tmp_path}/b/1.bmp, the same"
    )
    assert second.startswith("all 2 images of test that were looked at are in val too, such as")
