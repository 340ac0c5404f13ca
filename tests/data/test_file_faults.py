"""Every way in which an image's file can fail under a run: it is replaced by another, named, counted, and alike again.

Through the whole path: annotation file, dataset, crops, loading processes, the tally of a run.
"""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dinov2.data.augmentations import DataAugmentationDINO
from dinov2.data.collate import PretrainingBatch, PretrainingCollate
from dinov2.data.datasets import GroupedJSON
from dinov2.data.loaders import make_pretraining_loader
from dinov2.data.masking import MaskingGenerator
from dinov2.data.pretraining import PretrainingDataset, TooManyUnreadableImages, UnreadableTally

IMAGES = 8
TIMEOUT = 0.3


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "annotations").mkdir()
    rows = []
    for number in range(IMAGES):
        Image.new("RGB", (20, 20), (30 * number, 90, 60)).save(tmp_path / f"{number}.png")
        rows.append({"img_path": f"{number}.png", "group_id": str(number)})
    (tmp_path / "annotations" / "train.json").write_text(json.dumps({"metainfo": {}, "data_list": rows}))
    return tmp_path


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "zero bytes": (lambda path: path.write_bytes(b""), "the file is empty"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:50]), "cannot read image"),
    "cut in its header": (lambda path: path.write_bytes(path.read_bytes()[:9]), "cannot read image"),
    "overwritten": (lambda path: path.write_bytes(b"\x00" * 500), "not an image of a known format"),
    "renamed": (lambda path: path.rename(path.with_suffix(".old")), "no such file"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "it is a folder"),
    "a link to nothing": (lambda path: (path.unlink(), path.symlink_to("gone")), "no such file"),
    "a link to itself": (lambda path: (path.unlink(), path.symlink_to(path)), "cannot read image"),
    # Reading a pipe takes for ever, as nobody writes.
    "endless": (lambda path: (path.unlink(), os.mkfifo(path)), f"given up after {TIMEOUT:g} s"),
}


def make_loader(root: Path, batch_size: int = 4, workers: int = 0) -> Iterable[Any]:
    dataset = PretrainingDataset(
        GroupedJSON(root=root, split="TRAIN"),
        DataAugmentationDINO((0.5, 1.0), (0.2, 0.5), 1, global_crops_size=16, local_crops_size=10),
        read_timeout=TIMEOUT,
    )
    collate = PretrainingCollate(mask_generator=MaskingGenerator((2, 2), max_num_patches=2))
    return make_pretraining_loader(dataset=dataset, collate=collate, batch_size=batch_size, num_workers=workers)


def batches(root: Path, count: int, *, workers: int = 0) -> list[PretrainingBatch]:
    return [batch for _, batch in zip(range(count), make_loader(root, workers=workers), strict=False)]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", FAULTS)
def test_it_is_replaced_named_and_counted(
    root: Path, name: str, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    break_it, reason = FAULTS[name]
    before = batches(root, 2)
    break_it(root / "5.png")
    bad, tally = str(root / "5.png"), UnreadableTally(IMAGES, 0.2)
    with caplog.at_level("WARNING", logger="dinov2"):
        found = batches(root, 2, workers=workers)
    for batch, good in zip(found, before, strict=True):
        tally.add(batch.unreadable)
        tally.check()
        assert bad not in batch.names
        assert [ours for ours, other in zip(batch.names, good.names, strict=True) if other != bad] == [
            other for other in good.names if other != bad
        ], "the others stay where they were"
        assert batch.unreadable == ((bad,) if bad in good.names else ())
        assert batch.global_crops.shape == good.global_crops.shape
    assert tally.state_dict() == {"names": [bad]}, "an epoch of eight holds it once"
    if not workers:  # else that process says it
        (message,) = [record.getMessage() for record in caplog.records]
        assert message.startswith(f"image {bad} cannot be read and is replaced by another: ")
        assert reason in message
        again = batches(root, 2)
        assert [batch.names for batch in again] == [batch.names for batch in found], "every start alike"
    strict = UnreadableTally(IMAGES, 0.1)
    strict.add([bad])
    with pytest.raises(TooManyUnreadableImages, match=r"data\.max_bad_fraction"):
        strict.check()


def test_a_file_that_fails_while_the_run_goes_on(root: Path) -> None:
    stream = iter(make_loader(root, batch_size=IMAGES))
    first = next(stream)
    assert str(root / "5.png") in first.names
    (root / "5.png").rename(root / "moved.png")
    assert next(stream).unreadable == (str(root / "5.png"),)
    (root / "moved.png").rename(root / "5.png")
    assert next(stream).unreadable == (), "it is read again as soon as it is back"
