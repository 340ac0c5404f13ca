"""NYU Depth V2 and KITTI: lists of images with depth maps, in the layouts that papers use."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinov2.data.datasets import BadTargetError, DepthSource, KITTIDepth, NYUDepthV2

DEPTH = np.array([[0, 256, 1000], [2560, 65535, 1]], np.uint16)
DRIVE = "2011_09_26_drive_0002_sync"


def add(image: Path, depth: Path) -> None:
    for path in (image, depth):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (3, 2), (10, 20, 30)).save(image)
    Image.fromarray(DEPTH).save(depth)


@pytest.fixture
def nyu(tmp_path: Path) -> Path:
    """One recording to train on, one kind of room to test on, with the fourth word of the published test list."""
    lines = []
    for name in ("kitchen_0028b/{}00045", "kitchen_0028b/{}00062", "office/{}00008"):
        image, depth = f"{name.format('rgb_')}.jpg", f"{name.format('sync_depth_')}.png"
        add(tmp_path / image, tmp_path / depth)
        lines.append(f"/{image} /{depth} 518.8579")
    (tmp_path / "nyu_train.txt").write_text("\n".join(lines[:2]))
    (tmp_path / "nyu_test.txt").write_text(f"{lines[2]} /office/sync_seg_00008.png\n")
    return tmp_path


def kitti_line(number: int, depth: bool = True) -> str:
    image = f"2011_09_26/{DRIVE}/image_02/data/{number:010d}.png"
    return f"{image} {f'{DRIVE}/proj_depth/groundtruth/image_02/{number:010d}.png' if depth else 'None'} 721.5377\n"


@pytest.fixture(params=[("input", "gt_depth"), ("", "")], ids=["input and gt_depth", "one root"])
def kitti(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    for number in (5, 69):
        image, depth, _ = kitti_line(number).split()
        add(tmp_path / request.param[0] / image, tmp_path / request.param[1] / depth)
    (tmp_path / "kitti_eigen_train.txt").write_text(kitti_line(69) + kitti_line(5))
    (tmp_path / "kitti_eigen_test.txt").write_text(kitti_line(1, False) + kitti_line(69) + kitti_line(2, False))
    return tmp_path


def test_nyu(nyu: Path) -> None:
    train, test = NYUDepthV2(nyu, "TRAIN"), NYUDepthV2(nyu, "test")
    assert isinstance(train, DepthSource)
    assert (len(train), len(test), train.depth_unit) == (2, 1, "m")
    assert train.get_image_path(1) == nyu / "kitchen_0028b" / "rgb_00062.jpg"
    assert train.get_image(0).size == (3, 2)
    assert train.get_group_ids() == ["kitchen_0028b"] * 2
    assert test.get_group_ids() == ["office"]
    for dataset in (train, test):
        depth = dataset.get_depth(0)
        assert depth.dtype == np.float32
        np.testing.assert_allclose(depth, [[np.nan, 0.256, 1.0], [2.56, 65.535, 0.001]], rtol=1e-6)
    assert train.get_targets().tolist() == [-1, -1]


def test_kitti(kitti: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="dinov2"):
        train, test = KITTIDepth(kitti, "train"), KITTIDepth(kitti, "TEST")
    assert (len(train), len(test), train.depth_unit) == (2, 1, "m")
    assert (train.num_without_depth, test.num_without_depth) == (0, 2)
    assert ["2 lines without a depth map are skipped" in record.getMessage() for record in caplog.records] == [True]
    assert [train.get_image_path(index).stem for index in range(2)] == ["0000000069", "0000000005"]
    assert test.get_image(0).size == (3, 2)
    assert train.get_group_ids() == [DRIVE] * 2
    expected = np.where(DEPTH == 0, np.nan, DEPTH / 256)
    np.testing.assert_allclose(test.get_depth(0), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("ending", "values", "found", "scale"),
    [
        (
            ".png",
            np.array([[0, 51, 255]], np.uint8),
            r"8-bit values \(up to 255\), where .* depth_scale=0.0392",
            10 / 255,
        ),
        (
            ".tif",
            np.array([[0, 2, np.nan]], np.float32),
            r"floating-point numbers \(up to 2\).* depth_scale=1 for",
            1.0,
        ),
        (".npy", np.array([[0, 2, 10]], np.float64), r"floating-point numbers \(up to 10\)", 1.0),
        (".npy", np.array([[0, 2, 10]], np.uint8), "8-bit values", 0.5),
    ],
)
@pytest.mark.parametrize(("dataset", "name"), [(NYUDepthV2, "nyu_test.txt"), (KITTIDepth, "kitti_eigen_test.txt")])
def test_depths_of_another_kind_need_a_scale(
    tmp_path: Path, dataset: Any, name: str, ending: str, values: np.ndarray, found: str, scale: float
) -> None:
    (tmp_path / name).write_text(f"a.png a_depth{ending} 500")
    Image.new("RGB", (3, 1)).save(tmp_path / "a.png")
    path = tmp_path / f"a_depth{ending}"
    np.save(path, values) if ending == ".npy" else Image.fromarray(values).save(path)
    with pytest.raises(BadTargetError, match=found):
        dataset(tmp_path, "test").get_depth(0)
    depth = dataset(tmp_path, "test", depth_scale=scale).get_depth(0)
    np.testing.assert_allclose(depth, np.where(values == 0, np.nan, values * scale), rtol=1e-6)
    with pytest.raises(ValueError, match="depth_scale must be a number above 0"):
        dataset(tmp_path, "test", depth_scale=-1.0)


def test_lists_may_have_the_names_of_bts(tmp_path: Path) -> None:
    for dataset, ours, theirs in ((NYUDepthV2, "nyu", "nyudepthv2"), (KITTIDepth, "kitti_eigen", "eigen")):
        (tmp_path / f"{theirs}_train_files_with_gt.txt").write_text("/b/1.jpg /b/1.png 1\n")
        assert dataset(tmp_path, "TRAIN").list_path.name == f"{theirs}_train_files_with_gt.txt"
        (tmp_path / f"{ours}_train.txt").write_text("/a/1.jpg /a/1.png 1\n")
        assert dataset(tmp_path, "TRAIN").get_image_path(0) == tmp_path / "a" / "1.jpg"


class TestErrors:
    @pytest.mark.parametrize("dataset", [NYUDepthV2, KITTIDepth])
    def test_no_such_split_or_list(self, tmp_path: Path, dataset: Any) -> None:
        with pytest.raises(ValueError, match="VAL; it has TRAIN and TEST"):
            dataset(tmp_path, "VAL")
        with pytest.raises(FileNotFoundError, match=r"holds no .*_train\.txt or .*_files_with_gt\.txt; it has no list"):
            dataset(tmp_path, "TRAIN")
        with pytest.raises(FileNotFoundError, match="absent' is not a folder"):
            dataset(tmp_path / "absent", "TRAIN")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("\n", "lists nothing"),
            ("/a/1.jpg None 518\n/a/2.jpg None 518\n", r"lists no image with a depth map \(2 without\)"),
            ("/a/1.jpg /a/1.png 1\n\n/a/2.jpg\n", "line 3: must read 'image depth-map focal-length', found '/a/2.jpg'"),
            ("/a/1.jpg /a/1.png 1\n//etc/2.jpg /a/2.png 1\n", r"line 2: path '/etc/2.jpg' is absolute"),
            ("/a/1.jpg /../1.png 1\n", "line 1: path '../1.png' leaves the set's root"),
        ],
    )
    def test_broken_lists(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "nyu_train.txt").write_text(text)
        with pytest.raises(ValueError, match=rf"nyu_train\.txt,? {message}"):
            NYUDepthV2(tmp_path, "TRAIN")

    def test_bad_depth_maps_are_named(self, nyu: Path) -> None:
        dataset = NYUDepthV2(nyu, "TRAIN")
        Image.fromarray(DEPTH[:1]).save(dataset.get_depth_path(0))
        with pytest.raises(BadTargetError, match=r"sync_depth_00045\.png: is 3x1 pixels .* its image is 3x2"):
            dataset.get_depth(0)
        dataset.get_depth_path(1).unlink()
        with pytest.raises(BadTargetError, match=r"sync_depth_00062\.png: cannot be read: no such file"):
            dataset.get_depth(1)
