"""ELPV: labels from probabilities, splits by content."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2.data.datasets import ELPV
from dinov2.data.datasets.elpv import read_cells

SPLITS = ("TRAIN", "VAL", "TEST")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Forty cells in the package's layout; the last four repeat the first four in another encoding."""
    (tmp_path / "images").mkdir()
    lines = []
    for number in range(40):
        rng = np.random.default_rng(number % 36)
        name = f"images/cell{number:04d}.{'png' if number < 36 else 'bmp'}"
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / name)
        lines.append(f"{name}  {(number % 4) / 3}   {'mono' if number % 8 < 4 else 'poly'}\n")
    (tmp_path / "labels.csv").write_text("".join(lines) + "\n")
    return tmp_path


def test_labels_and_images(root: Path) -> None:
    dataset = ELPV("ALL", root)
    assert dataset.get_targets().tolist() == [0, 0, 1, 1] * 10
    assert dataset.classes == ("functional", "defective")
    image, target = dataset[2]
    assert (image.mode, image.size, target) == ("RGB", (8, 8), 1)
    assert dataset.get_image_path(39) == root / "images/cell0039.bmp"


def test_splits_are_a_partition_in_which_no_picture_repeats(root: Path) -> None:
    splits = [ELPV(split, root) for split in SPLITS]
    paths = [dataset.get_image_path(i) for dataset in splits for i in range(len(dataset))]
    assert len(paths) == len(set(paths)) == 40
    contents = [{dataset.get_image(i).tobytes() for i in range(len(dataset))} for dataset in splits]
    assert sum(map(len, contents)) == len(set.union(*contents)) == 36
    groups = [set(dataset.get_group_ids()) for dataset in splits]
    assert [len(group) for group in groups] == [len(content) for content in contents]


def test_seed_draws_the_splits(root: Path) -> None:
    first, again, other = (ELPV("TRAIN", root, seed=seed).get_group_ids() for seed in (0, 0, 1))
    assert first == again != other


def test_checkout_of_the_repository(root: Path, tmp_path: Path) -> None:
    target = tmp_path / "checkout" / "src" / "elpv_dataset"
    target.mkdir(parents=True)
    (target / "data").symlink_to(root)
    assert len(ELPV("ALL", tmp_path / "checkout")) == 40


def test_errors(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown split 'dev'; allowed are TRAIN, VAL, TEST, ALL"):
        ELPV("dev", root)
    with pytest.raises(FileNotFoundError, match=r"holds no labels\.csv"):
        ELPV("ALL", tmp_path / "absent")
    for line, message in (("a.png 0.5", "must read 'path probability type'"), ("a.png 2 mono", "outside 0 to 1")):
        (root / "labels.csv").write_text(f"\n{line}\n")
        with pytest.raises(ValueError, match=rf"labels\.csv, line 2: .*{message}"):
            ELPV("ALL", root)
    (root / "labels.csv").write_text("")
    with pytest.raises(ValueError, match="lists no cell"):
        ELPV("ALL", root)
    monkeypatch.setattr("dinov2.data.datasets.elpv.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="run pip install elpv-dataset"):
        ELPV("ALL")


def test_installed_set() -> None:
    """Deitsch et al. give 2,624 cells: 1,803 with a probability below one half, 821 above; 1,074 mono, 1,550 poly."""
    pytest.importorskip("elpv_dataset")
    cells = read_cells()
    splits = cells.split(seed=0)
    counts = np.array([np.bincount(cells.labels[splits == number]) for number in range(3)])
    assert counts.sum(axis=0).tolist() == [1803, 821]
    assert np.allclose(counts / counts.sum(axis=0), [[0.6], [0.2], [0.2]], atol=0.005)
    assert cells.types.count("mono") == 1074
