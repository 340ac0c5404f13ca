import csv
import json
import pickle
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from eval_command_sets import TINY
from PIL import Image

from dinov2.eval.results import EvaluationResults
from dinov2.eval.retrieval.evaluation import main

# At the default LayerScale of 1e-5, a random backbone's class token hardly sees the image.
SEEING = (*TINY, "student.layerscale=1.0", "--num-workers=0", "--num-resamples=20")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two photos of each of six parts, a colour each, and one photo of a seventh, in training and validation."""
    root = tmp_path_factory.mktemp("parts")
    (root / "annotations").mkdir()
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        (root / split).mkdir()
        rows = []
        for photo in range(13):
            part = photo // 2
            pixels = np.random.default_rng([ord(split[0]), part]).integers(0, 200, 3) + generator.integers(
                0, 40, (30, 40, 3)
            )
            name = f"{split}/{photo}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(root / name)
            rows.append({"img_path": name, "group_id": f"{split} {part}"})
        content = {"metainfo": {"classes": []}, "data_list": rows}
        (root / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rparis6k")
    (root / "jpg").mkdir()
    generator = np.random.default_rng(0)
    for index in range(6):
        pixels = generator.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 30 + index)).save(root / "jpg" / f"paris_{index}.jpg")
    names = [f"paris_{index}" for index in range(6)]
    gnd = [{"bbx": [2.0, 2.0, 30.0, 25.0], "easy": [0], "hard": [1], "junk": [2]}]
    truth = {"imlist": names[:5], "qimlist": names[5:], "gnd": gnd}
    (root / "gnd_rparis6k.pkl").write_bytes(pickle.dumps(truth, protocol=2))
    return root


def dataset(root: Path, split: str) -> str:
    return f"GroupedJSON:split={split}:root={root}"


def run(out: Path, *words: str) -> EvaluationResults:
    assert main([*SEEING, *words, "--output-dir", str(out)]) == 0
    return EvaluationResults.from_dict(json.loads((out / "results.json").read_text()))


def test_parts(parts: Path, tmp_path: Path) -> None:
    results = run(tmp_path, "--val-dataset", dataset(parts, "VAL"), "--ks", "1", "3")
    figures = results.scores["parts"].image.metrics
    assert list(figures) == ["map", "mp@1", "mp@3", "recall@1", "recall@3"]
    assert figures["map"].low is not None
    assert figures["map"].value > 0.5  # by chance about 0.2
    assert (results.extra["num_queries"], results.extra["num_skipped_queries"]) == ({"parts": 12}, {"parts": 1})
    assert results.settings["features"] == "cls"
    assert results.settings["image_size"] == [28, 28]
    assert results.weights == {"path": "", "random": True}
    with (tmp_path / "predictions.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 12
    log = (tmp_path / "log" / "log.txt").read_text()
    assert results.table().splitlines()[-1] in log
    assert "without effect" not in log


def test_all_options_of_parts(parts: Path, tmp_path: Path) -> None:
    results = run(
        tmp_path,
        *("--train-dataset", dataset(parts, "TRAIN"), "--val-dataset", dataset(parts, "VAL")),
        *("--gallery", "train+val", "--features", "gem", "--gem-power", "2", "--scales", "1", "0.7071", "1.4142"),
        *("--whitening", dataset(parts, "TRAIN"), "--whitening-kind", "learned", "--whitening-dim", "5"),
    )
    assert results.extra["num_gallery"] == {"parts": 26}
    assert results.settings["features"] == "gem"
    assert results.settings["gem_power"] == 2.0
    assert results.settings["scales"] == [1.0, 0.7071, 1.4142]
    assert (results.settings["whitening"], results.settings["whitening_dim"]) == ("learned", 5)
    assert results.settings["whitening_dataset"] == dataset(parts, "TRAIN")
    log = (tmp_path / "log" / "log.txt").read_text()
    assert "7 parts are in both the set of the whitening and the evaluated ones" in log  # they are in the gallery
    assert "without effect" not in log


def test_revisited(benchmark: Path, parts: Path, tmp_path: Path) -> None:
    words = ["--revisited", str(benchmark), "--longer-side", "42", "--whitening", dataset(parts, "TRAIN")]
    results = run(tmp_path, *words, "--features", "patch_mean", "--gallery", "train+val", "--image-size", "56")
    assert list(results.scores) == ["easy", "medium", "hard"]
    assert results.settings["benchmark"] == "rparis6k"
    assert results.settings["longer_side"] == 42
    assert "image_size" not in results.settings
    assert list(results.datasets) == ["queries", "gallery", "whitening"]
    log = (tmp_path / "log" / "log.txt").read_text()
    assert "without effect here: --gallery, --image-size" in log


def test_options_without_effect_are_named(parts: Path, tmp_path: Path) -> None:
    words = ["--val-dataset", dataset(parts, "VAL"), "--train-dataset", dataset(parts, "TRAIN"), "--gem-power", "2"]
    run(tmp_path, *words, "--whitening-dim", "3", "--part-aggregation", "mean", "--longer-side", "500")
    log = (tmp_path / "log" / "log.txt").read_text()
    expected = "--part-aggregation, --gem-power, --whitening-dim, --longer-side, --train-dataset"
    assert f"without effect here: {expected}" in log


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ([], ValueError, "needs --val-dataset"),
        (["--val-dataset=VAL", "--gallery=train+val"], ValueError, "needs --train-dataset"),
        (["--val-dataset=VAL", "--ks", "0"], ValueError, "ks must be"),
        (["--val-dataset=VAL", "--scales", "0"], ValueError, "scales must be"),
        (["--val-dataset=VAL", "--features=gem", "--gem-power=-1"], ValueError, "must be above 0"),
        (["--val-dataset=VAL", "--whitening=VAL", "--whitening-dim=1000"], ValueError, "13 images give 1 to 12"),
        (["--revisited", "nowhere"], FileNotFoundError, "nowhere holds neither"),
    ],
)
def test_bad_options(parts: Path, tmp_path: Path, words: list[str], error: type[Exception], message: str) -> None:
    named = [word.replace("=VAL", f"={dataset(parts, 'VAL')}") for word in words]
    with pytest.raises(error, match=message):
        main([*SEEING, *named, "--output-dir", str(tmp_path)])


@pytest.mark.parametrize("words", [["--features", "max"], ["--gallery", "train"], ["--whitening-kind", "zca"]])
def test_wrong_choices(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "invalid choice" in capsys.readouterr().err


def test_door_shows_help_with_an_example(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["retrieval.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(repository / "eval" / "retrieval.py"), run_name="__main__")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for flag in ("--config-file", "--revisited", "--whitening", "--scales", "--gallery", "example:"):
        assert flag in shown
