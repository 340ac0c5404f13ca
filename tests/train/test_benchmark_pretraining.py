"""Scores against length and number of images: nested subsets, resuming, the table, and lengths that do not fit."""

import json
from pathlib import Path

import pytest

from dinov2.config import load_config, render_config
from dinov2.data.datasets import GroupedJSON
from dinov2.data.datasets.base import Split
from tests.tiny_pretraining import TINY
from tools.benchmark_pretraining import main, write_subset


@pytest.fixture
def words(parts: Path, tmp_path: Path) -> list[str]:
    config = load_config(None, [*TINY, "train.OFFICIAL_EPOCH_LENGTH=2", "train.num_workers=0"])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(render_config(config), encoding="utf-8")
    sets = [f"GroupedJSON:split=TRAIN:root={parts}"] * 2  # that images are evaluated on themselves does not matter here
    words = ["--config", str(recipe), "--train-dataset", sets[0], "--val-dataset", sets[1]]
    return [*words, "--output-dir", str(tmp_path / "out")]


def test_smaller_sets_lie_in_larger_and_have_no_labels(parts: Path, tmp_path: Path) -> None:
    dataset = GroupedJSON(split=Split.TRAIN, root=str(parts))
    names = {}
    for count in (2, 5):
        subset = GroupedJSON(
            split=Split.TRAIN, root=write_subset(dataset, tmp_path / str(count), count, 1).split("=")[-1]
        )
        assert len(subset) == count
        assert not any(target is not None and target >= 0 for target in subset.get_targets())
        names[count] = {path.name for path in map(Path, subset.get_image_paths())}
    assert names[2] < names[5]


def test_what_is_there_is_not_done_again(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words += ["--steps", "2", "--images", "3", "--images-steps", "2"]
    assert main(words) == 0
    assert capsys.readouterr().out.count("steps on") == 2
    written = json.loads((tmp_path / "out/curve.json").read_text())
    rows = [(run["steps"], run["images"]) for run in written["runs"]]
    total = rows[0][1]
    assert rows == [(2, total), (2, 3)]
    assert all(0 <= run[name] <= 1 for run in written["runs"] for name in ("k-NN", "logistic regression"))
    assert {name.split(" on ")[0] for name in written["yardsticks"]["k-NN"]} >= {"random backbone", "image statistics"}
    assert (tmp_path / "out/curve.png").is_file()
    first = (tmp_path / "out/curve.md").read_text()
    assert first.startswith("| steps | images | minutes | k-NN | logistic regression |")
    assert main(words) == 0
    assert capsys.readouterr().out.count("steps on") == 0
    assert (tmp_path / "out/curve.md").read_text() == first


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--steps", "3"], "--steps 3 is not a multiple of an epoch"),
        (["--steps", "2", "--images-steps", "4"], "--images-steps 4 is not among --steps"),
        (["--steps", "2", "--images-steps", "2", "--images", "10000"], "--images 10000 is not from 1 to"),
    ],
)
def test_lengths_and_numbers_that_do_not_fit_are_told(words: list[str], changed: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main([*words, *changed])
