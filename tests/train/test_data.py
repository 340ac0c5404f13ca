"""Files that cannot be read or never end, a data order that changes on resuming."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from train_stand_ins import Train, checkpoint

from dinov2.data.pretraining import TooManyUnreadableImages
from dinov2.train import setup
from dinov2.train.data import data_identity

CHANGES = {
    "train.seed=3": "train.seed was 0 and is 3",
    "train.sampler_type=INFINITE": "train.sampler_type was SHARDED_INFINITE and is INFINITE",
}
WARNING = "THE ORDER OF THE DATA CHANGES"


@pytest.mark.parametrize(("change", "message"), CHANGES.items())
def test_a_changed_option_is_named(train: Train, half: Path, change: str, message: str) -> None:
    assert train(half, change) == 0
    log = (half / "log" / "log.txt").read_text()
    assert log.count(WARNING) == 1
    assert message in log


def test_a_changed_set_is_noticed_and_a_moved_one_is_not(train: Train, half: Path, tmp_path: Path, parts: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(parts, moved)
    train(half, f"train.dataset_path=GroupedJSON:split=TRAIN:root={moved}")
    log = half / "log" / "log.txt"
    assert WARNING not in log.read_text()
    assert checkpoint(half)["identity"]["dataset"].startswith("14 images, names ")
    train(half, f"train.dataset_path=GroupedJSON:split=VAL:root={moved}", "optim.epochs=3")
    assert "dataset was 14 images, names " in log.read_text()
    assert "and is 4 images, names " in log.read_text()


def test_a_run_of_a_version_with_other_crops_goes_on_with_a_warning(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def identity_of_before(*arguments: Any) -> dict[str, str]:
        return {name: value for name, value in data_identity(*arguments).items() if name != "crops"}

    with monkeypatch.context() as before:
        before.setattr(setup, "data_identity", identity_of_before)
        train(tmp_path, "optim.epochs=1")
    log = tmp_path / "log" / "log.txt"
    assert train(tmp_path) == 0
    assert log.read_text().count("THE CROPS CHANGE from here on") == 1
    assert WARNING not in log.read_text()
    assert checkpoint(tmp_path)["iteration"] == 5
    train(tmp_path, "optim.epochs=3")
    assert log.read_text().count("THE CROPS CHANGE from here on") == 1, "told once"


def with_bad_images(parts: Path, folder: Path, count: int) -> tuple[list[Path], str]:
    """A copy of the set whose first images are missing or cut off, and the option that names it."""
    shutil.copytree(parts, folder)
    images = sorted((folder / "train").rglob("*.jpeg"))[:count]
    images[0].unlink()
    for image in images[1:]:
        image.write_bytes(image.read_bytes()[:200])
    return images, f"train.dataset_path=GroupedJSON:split=TRAIN:root={folder}"


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_replaced_counted_and_named(
    train: Train, tmp_path: Path, parts: Path, workers: int
) -> None:
    bad, dataset = with_bad_images(parts, tmp_path / "parts", 2)
    assert train(tmp_path / "run", dataset, f"train.num_workers={workers}", "data.max_bad_fraction=0.2") == 0
    assert checkpoint(tmp_path / "run")["unreadable"] == {"names": [str(path) for path in bad]}
    log = (tmp_path / "run" / "log" / "log.txt").read_text()
    assert "2 of 14 images unreadable (14.29%)" in log
    if not workers:
        assert all(f"image {path} cannot be read" in log for path in bad)


def test_too_many_unreadable_images_stop_the_run(train: Train, tmp_path: Path, parts: Path) -> None:
    bad, dataset = with_bad_images(parts, tmp_path / "parts", 3)
    with pytest.raises(TooManyUnreadableImages, match=r"of 14 images .* data.max_bad_fraction \(10\.00%\)") as failure:
        train(tmp_path / "run", dataset, "data.max_bad_fraction=0.1")
    assert sum(str(path) in str(failure.value) for path in bad) == 2, "two are more than a tenth of 14"
    assert (tmp_path / "run" / "last_checkpoint.rank_0").exists(), "what was done until then is saved"


def test_an_endless_file_is_counted(train: Train, tmp_path: Path, parts: Path) -> None:
    (image,), dataset = with_bad_images(parts, tmp_path / "parts", 1)
    os.mkfifo(image)
    pairs = ("data.read_timeout_seconds=1", "data.max_bad_fraction=0.2")
    assert train(tmp_path / "run", dataset, "train.num_workers=1", *pairs) == 0
    assert checkpoint(tmp_path / "run")["unreadable"] == {"names": [str(image)]}
    first = torch.load(tmp_path / "run" / "eval" / "probe_start.pth", weights_only=True)
    assert [first["names"][i] for i in (~first["readable"]).nonzero()] == [image.name], "also among those watched"
