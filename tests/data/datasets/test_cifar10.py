"""CIFAR-10: the published pickles and binary files, as folders and as archives."""

import io
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinov2.data.datasets import CIFAR10

TRAIN = [f"data_batch_{number}" for number in range(1, 6)]
PER_BATCH = 3


def batch(number: int) -> tuple[np.ndarray, list[int]]:
    """Pixels [3, 3072] and labels of a batch; the test batch is number 6."""
    rng = np.random.default_rng(number)
    return rng.integers(0, 256, (PER_BATCH, 3072), dtype=np.uint8), rng.integers(0, 10, PER_BATCH).tolist()


def python_2(value: Any) -> bytes:
    """What cPickle of Python 2 with numpy 1 writes for a value, protocol 2, as in the published files."""
    if isinstance(value, str):
        return b"T" + struct.pack("<i", len(value)) + value.encode("latin1")
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(python_2, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(python_2(part) for pair in value.items() for part in pair) + b"u"
    assert isinstance(value, np.ndarray)
    shape = b"".join(map(python_2, value.shape)) + b"\x86"
    state = b"(K\3" + python_2("|") + b"NNN" + python_2(-1) + python_2(-1) + b"K\0tb"
    dtype = b"cnumpy\ndtype\n" + python_2("u1") + b"K\0K\1\x87R" + state
    empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85" + python_2("b") + b"\x87R"
    return empty + b"(K\1" + shape + dtype + b"\x89" + python_2(value.tobytes().decode("latin1")) + b"tb"


def python_batch(number: int, **changes: Any) -> bytes:
    pixels, labels = batch(number)
    names = [f"thing_{number}_{row}.png" for row in range(PER_BATCH)]
    content = {"batch_label": f"batch {number}", "labels": labels, "data": pixels, "filenames": names, **changes}
    return b"\x80\x02" + python_2({key: value for key, value in content.items() if value is not None}) + b"."


def binary_batch(number: int) -> bytes:
    pixels, labels = batch(number)
    return b"".join(bytes([label]) + row.tobytes() for label, row in zip(labels, pixels, strict=True))


PYTHON_FILES = {name: python_batch(number) for number, name in enumerate([*TRAIN, "test_batch"], start=1)}
BINARY_FILES = {f"{name}.bin": binary_batch(number) for number, name in enumerate([*TRAIN, "test_batch"], start=1)}


def write_folder(root: Path, layout: str) -> Path:
    folder = root / {"py": "cifar-10-batches-py", "bin": "cifar-10-batches-bin"}[layout]
    folder.mkdir(parents=True)
    for name, content in (PYTHON_FILES if layout == "py" else BINARY_FILES).items():
        (folder / name).write_bytes(content)
    return folder


def write_archive(root: Path, layout: str, files: dict[str, bytes] | None = None) -> Path:
    archive = root / {"py": "cifar-10-python.tar.gz", "bin": "cifar-10-binary.tar.gz"}[layout]
    root.mkdir(parents=True, exist_ok=True)
    files = files or (PYTHON_FILES if layout == "py" else BINARY_FILES)
    with tarfile.open(archive, "w:gz") as tar:
        for name in ["readme.html", *reversed(files)]:  # in no particular order, as published
            content = files.get(name, b"<html>")
            member = tarfile.TarInfo(f"cifar-10-batches-{layout}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return archive


@pytest.mark.parametrize("layout", ["py", "bin"])
@pytest.mark.parametrize("write", [write_folder, write_archive])
@pytest.mark.parametrize("inside", [False, True])
def test_every_layout(tmp_path: Path, write: Any, layout: str, inside: bool) -> None:
    source = write(tmp_path / "data", layout)
    root = source if inside else tmp_path / "data"
    train, test = CIFAR10(root, "TRAIN"), CIFAR10(root, "test")
    assert (len(train), len(test)) == (15, 3)
    assert len(train.classes) == 10
    assert list(train.classes) == sorted(train.classes)  # the published order
    assert train.classes[9] == "truck"
    for dataset, index, number, row in ((train, 0, 1, 0), (train, 7, 3, 1), (train, -1, 5, 2), (test, 2, 6, 2)):
        pixels, labels = batch(number)
        image = np.asarray(dataset.get_image(index))
        assert np.concatenate([image[..., channel].ravel() for channel in range(3)]).tolist() == pixels[row].tolist()
        assert dataset.get_target(index) == labels[row]
    assert train.get_targets().tolist() == [label for number in range(1, 6) for label in batch(number)[1]]
    ending = ".bin" if layout == "bin" else ""
    for index, (number, row) in {2: (1, 2), 3: (2, 0), 7: (3, 1), -1: (5, 2)}.items():
        assert train.get_image_path(index) == source / f"data_batch_{number}{ending}:{row}"
    assert len({str(train.get_image_path(index)) for index in range(15)}) == 15
    assert train.get_image_size(0) == (32, 32)


def test_folders_are_preferred_and_pickles_first(tmp_path: Path) -> None:
    write_archive(tmp_path, "py")
    assert CIFAR10(tmp_path, "TEST").source.name == "cifar-10-python.tar.gz"
    write_folder(tmp_path, "bin")
    assert CIFAR10(tmp_path, "TEST").source.name == "cifar-10-batches-bin"
    write_folder(tmp_path, "py")
    assert CIFAR10(tmp_path, "TEST").source.name == "cifar-10-batches-py"


def test_the_pickles_of_these_tests_are_what_python_reads() -> None:
    content = pickle.loads(PYTHON_FILES["data_batch_2"], encoding="latin1")
    assert (content["data"].tolist(), content["labels"]) == (batch(2)[0].tolist(), batch(2)[1])


class TestErrors:
    def test_nothing_there(self, tmp_path: Path) -> None:
        known = "cifar-10-batches-py, cifar-10-batches-bin, cifar-10-python"
        with pytest.raises(FileNotFoundError, match=f"holds none of {known}"):
            CIFAR10(tmp_path, "TRAIN")
        with pytest.raises(ValueError, match="CIFAR-10 has no split VAL; it has TRAIN and TEST"):
            CIFAR10(tmp_path, "VAL")

    @pytest.mark.parametrize("write", [write_folder, write_archive])
    def test_a_batch_is_missing(self, tmp_path: Path, write: Any) -> None:
        if write is write_folder:
            (write_folder(tmp_path, "py") / "data_batch_4").unlink()
        else:
            write_archive(tmp_path, "py", {name: PYTHON_FILES[name] for name in PYTHON_FILES if name != "data_batch_4"})
        with pytest.raises(FileNotFoundError, match=r"cifar-10-.* has no file data_batch_4"):
            CIFAR10(tmp_path, "TRAIN")

    @pytest.mark.parametrize("share", [0.0, 0.02, 0.5, None])
    def test_truncated_archives_and_flipped_bytes(self, tmp_path: Path, share: float | None) -> None:
        archive = write_archive(tmp_path, "py")
        data = bytearray(archive.read_bytes())
        if share is None:
            data[len(data) // 2 : len(data) // 2 + 200] = bytes(200)
        archive.write_bytes(data[: None if share is None else int(len(data) * share)])
        with pytest.raises(ValueError, match=r"cifar-10-python\.tar\.gz is not a gzipped tar archive, or is damaged"):
            CIFAR10(tmp_path, "TRAIN")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (PYTHON_FILES["test_batch"][:-500], "is not a pickle of plain values and arrays"),
            (b"cos\nsystem\n(S'true'\ntR.", "refers to os.system, which is refused"),
            (b"\x80\x02" + python_2([1]) + b".", "must hold a dict with data and labels"),
            (python_batch(6, labels=None), "must hold a dict with data and labels"),
            (python_batch(6, data="text"), r"data must be bytes \[N, 3072\], found str"),
            (python_batch(6, data=np.zeros((3, 10), np.uint8)), r"\[N, 3072\], found uint8 \(3, 10\)"),
            (python_batch(6, labels=[1, 2]), "labels must be a list of 3 numbers"),
            (python_batch(6, labels=[1, 2, 10]), "row 2: label 10 is outside 0 to 9"),
            (python_batch(6, labels=[1, "cat", 2]), "row 1: label 'cat' is outside 0 to 9"),
        ],
    )
    def test_bad_pickles(self, tmp_path: Path, content: bytes, message: str) -> None:
        (write_folder(tmp_path, "py") / "test_batch").write_bytes(content)
        with pytest.raises(ValueError, match=f"cifar-10-batches-py/test_batch.*{message}"):
            CIFAR10(tmp_path, "TEST")

    def test_bad_binary_files(self, tmp_path: Path) -> None:
        path = write_folder(tmp_path, "bin") / "test_batch.bin"
        for content, message in (
            (b"", "has 0 bytes, which is not a multiple of the 3073 of an image"),
            (BINARY_FILES["test_batch.bin"][:-1], "has 9218 bytes"),
            (bytes([10]) + bytes(3072), "row 0: label 10 is outside 0 to 9"),
        ):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=rf"cifar-10-batches-bin/test_batch\.bin.*{message}"):
                CIFAR10(tmp_path, "TEST")
