"""ImageNet-1k and 22k: folders, archives, and the kept list of images."""

import io
import logging
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2.data.datasets import ImageNet, ImageNet22k
from dinov2.data.reading import ByteCache, UnreadableImageError


def encoded(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (4, 4), level).save(buffer, "PNG")
    return buffer.getvalue()


def fill(root: Path, levels: dict[str, int]) -> Path:
    for name, level in levels.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(level))
    return root


@pytest.fixture
def image_net(tmp_path: Path) -> Path:
    fill(tmp_path, {"train/n01/n01_1.JPEG": 1, "train/n01/n01_2.JPEG": 2, "train/n02/n02_1.JPEG": 3})
    fill(tmp_path, {"val/n02/ILSVRC2012_val_1.JPEG": 4, "test/ILSVRC2012_test_1.JPEG": 5})
    (tmp_path / "labels.txt").write_text('n02,crane, bird\nn01,"tench"\n')
    return tmp_path


class TestImageNet:
    def test_splits(self, image_net: Path) -> None:
        train, val, test = (ImageNet(split=split, root=image_net) for split in ("TRAIN", "val", "TEST"))
        assert train.classes == val.classes == ("tench", "crane, bird")
        assert train.class_ids == ("n01", "n02")
        assert train.get_targets().tolist() == [0, 0, 1]
        assert (val[0][1], val.get_image(0).getpixel((0, 0))) == (1, (4, 4, 4))
        assert (test.get_target(0), test.get_targets().tolist()) == (None, [-1])
        assert train.get_image_path(2) == image_net / "train/n02/n02_1.JPEG"

    def test_without_labels_txt_classes_are_the_folders_of_train(self, image_net: Path) -> None:
        (image_net / "labels.txt").unlink()
        assert ImageNet(split="VAL", root=image_net).get_targets().tolist() == [1]
        assert ImageNet(split="VAL", root=image_net).classes == ("n01", "n02")

    def test_list_is_kept_and_used_again(self, image_net: Path, tmp_path: Path) -> None:
        extra = tmp_path / "new" / "extra"
        first = ImageNet(split="TRAIN", root=image_net, extra=extra)
        (image_net / "train/n01/n01_3.JPEG").write_bytes(encoded(9))
        again = ImageNet(split="TRAIN", root=image_net, extra=extra)
        assert len(first) == len(again) == 3
        assert [again.get_image_path(i) for i in range(3)] == [first.get_image_path(i) for i in range(3)]
        assert (again.get_targets() == first.get_targets()).all()
        assert [path.name for path in extra.iterdir()] == ["index-TRAIN.npz"]

    def test_list_not_kept_or_of_other_classes(self, image_net: Path, caplog: pytest.LogCaptureFixture) -> None:
        ImageNet(split="TRAIN", root=image_net, extra=image_net / "extra")
        with caplog.at_level(logging.WARNING, logger="dinov2"):
            assert len(ImageNet(split="TRAIN", root=image_net, extra=image_net / "labels.txt" / "extra")) == 3
        assert "could not be kept" in caplog.text
        (image_net / "labels.txt").unlink()
        fill(image_net, {"train/n00/n00_1.JPEG": 7})
        with caplog.at_level(logging.WARNING, logger="dinov2"):
            assert len(ImageNet(split="TRAIN", root=image_net, extra=image_net / "extra")) == 4
        assert "lists other classes" in caplog.text

    def test_damaged_kept_lists_are_refused_and_run_no_code(self, image_net: Path) -> None:
        ImageNet(split="TRAIN", root=image_net, extra=image_net / "extra")
        path = image_net / "extra" / "index-TRAIN.npz"
        with np.load(path) as file:
            arrays = dict(file)
        for changes, message in (
            ({"classes": np.array([object()], dtype=object)}, "Object arrays"),
            ({"targets": arrays["targets"][:1]}, "lengths differ"),
            (None, ""),
        ):
            if changes is None:
                path.write_bytes(b"PK nonsense")
            else:
                np.savez(path, **(arrays | changes))
            with pytest.raises(ValueError, match=rf"index-TRAIN\.npz is not an image index \(.*{message}"):
                ImageNet(split="TRAIN", root=image_net, extra=image_net / "extra")

    def test_bad_layouts(self, image_net: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="unknown split 'dev'; allowed are TRAIN, VAL, TEST"):
            ImageNet(split="dev", root=image_net)
        with pytest.raises(FileNotFoundError, match="must hold train/, val/ or test/"):
            ImageNet(split="TRAIN", root=tmp_path / "absent")
        fill(image_net, {"val/n03/1.JPEG": 0})
        with pytest.raises(ValueError, match=r"n03 is no known class: not in labels\.txt"):
            ImageNet(split="VAL", root=image_net)
        fill(image_net, {"train/loose.JPEG": 0})
        with pytest.raises(ValueError, match=r"loose\.JPEG lies in no class folder; images belong in train/<wnid>/"):
            ImageNet(split="TRAIN", root=image_net)
        (image_net / "labels.txt").write_text("n01,tench\n\nn02\n")
        with pytest.raises(ValueError, match=r"labels\.txt, line 3: must read 'wnid,name', found 'n02'"):
            ImageNet(split="TRAIN", root=image_net)


class TestImageNet22k:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        fill(tmp_path, {"n01/n01_1.JPEG": 1, "n03/n03_1.JPEG": 4})
        with tarfile.open(tmp_path / "n02.tar", "w") as archive:
            for name, level in {"n02_2.JPEG": 3, "n02_1.JPEG": 2, "notes.txt": 0}.items():
                member = tarfile.TarInfo(name)
                member.size = len(encoded(level))
                archive.addfile(member, io.BytesIO(encoded(level)))
        return tmp_path

    @pytest.mark.parametrize("extra", [None, "extra"])
    def test_folders_and_archives_which_are_cached(self, root: Path, extra: str | None) -> None:
        for _ in range(2):  # the second time from the kept list
            dataset = ImageNet22k(root=root, extra=extra and root / extra)
            assert dataset.classes == ("n01", "n02", "n03")
            assert dataset.get_targets().tolist() == [0, 1, 1, 2]
            assert [dataset.get_image(i).getpixel((0, 0)) for i in range(4)] == [(i, i, i) for i in range(1, 5)]
        assert dataset.get_image_path(1) == root / "n02.tar" / "n02_1.JPEG"
        dataset.cache = ByteCache(10_000)
        before = [dataset.get_image(i).tobytes() for i in range(4)]
        (root / "n02.tar").unlink()
        assert [dataset.get_image(i).tobytes() for i in range(4)] == before

    def test_damaged_archives(self, root: Path) -> None:
        dataset = ImageNet22k(root=root)
        (root / "n02.tar").write_bytes((root / "n02.tar").read_bytes()[:600])
        with pytest.raises(UnreadableImageError, match=r"n02_1\.JPEG: the archive .*n02\.tar ends within the image"):
            dataset.get_image(1)
        (root / "n02.tar").unlink()
        with pytest.raises(UnreadableImageError, match="the archive cannot be read"):
            dataset.get_image(1)
        (root / "n02.tar").write_bytes(b"nonsense" * 100)
        with pytest.raises(ValueError, match=r"n02\.tar is not an uncompressed tar archive, or is damaged"):
            ImageNet22k(root=root)

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="is not a folder"):
            ImageNet22k(root=tmp_path / "absent")
        with pytest.raises(ValueError, match="neither class folders nor archives"):
            ImageNet22k(root=tmp_path)
        (tmp_path / "n01").mkdir()
        with pytest.raises(ValueError, match="holds no image"):
            ImageNet22k(root=tmp_path)
