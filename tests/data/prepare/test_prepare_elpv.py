"""ELPV as a grouped set."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2.data.datasets import ELPV, GroupedJSON
from dinov2.data.prepare.elpv import prepare_elpv


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Thirty cells; the last three repeat the first three."""
    folder = tmp_path / "elpv"
    (folder / "images").mkdir(parents=True)
    lines = []
    for number in range(30):
        pixels = np.random.default_rng(number % 27).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"cell{number:04d}.png")
        lines.append(f"images/cell{number:04d}.png {(number % 3) / 2} {'mono' if number % 2 else 'poly'}\n")
    (folder / "labels.csv").write_text("".join(lines))
    return folder


def test_rows_and_files(root: Path, tmp_path: Path) -> None:
    prepare_elpv(tmp_path / "set", root=root)
    datasets = [GroupedJSON(tmp_path / "set", split) for split in ("TRAIN", "VAL", "TEST")]
    assert sum(map(len, datasets)) == 30
    groups = [set(dataset.get_group_ids()) for dataset in datasets]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 27
    for dataset in datasets:
        assert dataset.classes == ("functional", "defective")
        for index in range(len(dataset)):
            row, path = dataset.get_annotation(index), dataset.get_image_path(index)
            number = int(path.stem.removeprefix("cell"))
            assert row["defect_probability"] == (number % 3) / 2
            assert row["gt_label"] == int(number % 3 > 0)
            assert row["cell_type"] == ("mono" if number % 2 else "poly")
            assert path.read_bytes() == (root / "images" / path.name).read_bytes()


def test_same_splits_as_the_dataset(root: Path, tmp_path: Path) -> None:
    prepare_elpv(tmp_path / "set", seed=5, root=root, link=True)
    prepared, direct = GroupedJSON(tmp_path / "set", "val"), ELPV("VAL", root, seed=5)
    assert [prepared.get_image_path(i).name for i in range(len(prepared))] == [
        direct.get_image_path(i).name for i in range(len(direct))
    ]
    assert prepared.get_image_path(0).is_symlink()


def test_empty_split_and_bad_fractions(root: Path, tmp_path: Path) -> None:
    prepare_elpv(tmp_path / "set", fractions=(0.5, 0.5, 0), root=root)
    assert not (tmp_path / "set" / "annotations" / "test.json").exists()
    with pytest.raises(ValueError, match="must be three shares that sum to 1"):
        prepare_elpv(tmp_path / "other", fractions=(0.5, 0.5), root=root)


def test_door(root: Path, tmp_path: Path, repository: Path) -> None:
    door = repository / "tools" / "prepare_elpv.py"

    def call(*words: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(door), *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, cwd=repository, check=False)

    done = call("--output", tmp_path / "set", "--root", root, "--seed", "1")
    assert (done.returncode, done.stdout.split()[:5]) == (0, ["split", "images", "groups", "functional", "defective"])
    refused = call("--output", tmp_path, "--root", root)
    assert refused.returncode == 1
    assert "is not empty" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
def test_installed_set(tmp_path: Path) -> None:
    pytest.importorskip("elpv_dataset")
    prepare_elpv(tmp_path / "set", link=True)
    assert [len(GroupedJSON(tmp_path / "set", split)) for split in ("TRAIN", "VAL", "TEST")] == [1574, 525, 525]
