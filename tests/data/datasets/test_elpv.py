"""ELPV: labels from probabilities, splits by content, and the same as a grouped set."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2.data.datasets import ELPV, GroupedJSON
from dinov2.data.datasets.elpv import read_cells
from dinov2.data.prepare.elpv import prepare_elpv
from tools.prepare_elpv import main

SPLITS = ("TRAIN", "VAL", "TEST")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Forty cells in the package's layout; the last four repeat the first four in another encoding."""
    folder = tmp_path / "elpv"
    (folder / "images").mkdir(parents=True)
    lines = []
    for number in range(40):
        rng = np.random.default_rng(number % 36)
        name = f"images/cell{number:04d}.{'png' if number < 36 else 'bmp'}"
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / name)
        lines.append(f"{name}  {(number % 4) / 3}   {'mono' if number % 8 < 4 else 'poly'}\n")
    (folder / "labels.csv").write_text("".join(lines) + "\n")
    return folder


def test_labels_and_images(root: Path) -> None:
    dataset = ELPV("ALL", root)
    assert dataset.get_targets().tolist() == [0, 0, 1, 1] * 10
    assert dataset.classes == ("functional", "defective")
    image, target = dataset[2]
    assert (image.mode, image.size, target) == ("RGB", (8, 8), 1)
    assert dataset.get_image_path(39) == root / "images/cell0039.bmp"


def test_splits_are_a_partition_in_which_no_image_repeats(root: Path) -> None:
    splits = [ELPV(split, root) for split in SPLITS]
    paths = [dataset.get_image_path(i) for dataset in splits for i in range(len(dataset))]
    assert len(paths) == len(set(paths)) == 40
    contents = [{dataset.get_image(i).tobytes() for i in range(len(dataset))} for dataset in splits]
    assert sum(map(len, contents)) == len(set.union(*contents)) == 36
    groups = [set(dataset.get_group_ids()) for dataset in splits]
    assert [len(group) for group in groups] == [len(content) for content in contents]
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
    assert counts.sum(axis=1).tolist() == [1574, 525, 525]
    assert np.allclose(counts / counts.sum(axis=0), [[0.6], [0.2], [0.2]], atol=0.005)
    assert cells.types.count("mono") == 1074


@pytest.mark.parametrize("link", [False, True])
def test_a_grouped_set_has_the_splits_of_the_dataset(root: Path, tmp_path: Path, link: bool) -> None:
    prepare_elpv(tmp_path / "set", seed=5, root=root, link=link)
    for split in SPLITS:
        prepared, direct = GroupedJSON(tmp_path / "set", split), ELPV(split, root, seed=5)
        assert prepared.classes == direct.classes
        assert prepared.get_group_ids() == direct.get_group_ids()
        assert prepared.get_targets().tolist() == direct.get_targets().tolist()
        for index in range(len(direct)):
            row, path = prepared.get_annotation(index), prepared.get_image_path(index)
            source = direct.get_image_path(index)
            number = int(path.stem.removeprefix("cell"))
            assert row["defect_probability"] == pytest.approx((number % 4) / 3)
            assert row["cell_type"] == ("mono" if number % 8 < 4 else "poly")
            assert (path.name, path.is_symlink(), path.read_bytes()) == (source.name, link, source.read_bytes())


def test_a_grouped_set_may_have_an_empty_split(root: Path, tmp_path: Path) -> None:
    prepare_elpv(tmp_path / "set", fractions=(0.5, 0.5, 0), root=root)
    assert not (tmp_path / "set" / "annotations" / "test.json").exists()
    with pytest.raises(ValueError, match="must be three shares that sum to 1"):
        prepare_elpv(tmp_path / "other", fractions=(0.5, 0.5), root=root)


def test_door(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--output", str(tmp_path / "set"), "--root", str(root), "--seed"]
    monkeypatch.setattr("sys.argv", ["prepare_elpv.py", *words, "1"])
    assert main() == 0
    assert capsys.readouterr().out.split()[:5] == ["split", "images", "groups", "functional", "defective"]
    monkeypatch.setattr("sys.argv", ["prepare_elpv.py", *words, "2"])
    with pytest.raises(ValueError, match=r"was made with .*'seed': 1"):
        main()
