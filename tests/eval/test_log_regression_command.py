import csv
import json
import runpy
import sys
from pathlib import Path

import pytest
from eval_command_sets import TINY, dataset_strings, make_parts

from dinov2.eval.log_regression import load_log_regression
from dinov2.eval.log_regression.evaluation import main
from dinov2.eval.results import EvaluationResults

# At the default LayerScale of 1e-5, a random backbone's class token hardly sees the image.
SEEING = (*TINY, "student.layerscale=1.0", "--num-workers=0")


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    return make_parts(tmp_path / "parts: line 4")


def datasets(root: Path) -> list[str]:
    train, val = dataset_strings(root)
    return [f"--train-dataset={train}", f"--val-dataset={val}"]


def test_command_writes_results_predictions_model_and_log(parts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train, val = dataset_strings(parts)
    code = main(
        [
            *SEEING,
            *datasets(parts),
            f"--output-dir={out}",
            "--test-datasets",
            val,
            train,
            "--cs",
            "0.001",
            "0.1",
            "10",
            "--metric-type=log_loss",
            "--max_train_iters=200",
            "--n-per-class-list",
            "-1",
            "2",
            "--n_tries=2",
            "--hold-out-repeats=2",
            "--class-weighting=balanced",
            "--features=patch_mean",
        ]
    )
    assert code == 0
    results = EvaluationResults.from_dict(json.loads((out / "results.json").read_text()))
    chosen = results.chosen
    assert list(results.scores) == [
        *(f"{variant}{judged}" for variant in (chosen, "n=2") for judged in ("", " on test 1", " on test 2"))
    ]
    assert results.scores[chosen].image.metrics["accuracy"].value == 1.0
    assert results.scores[chosen].part.metrics["auroc"].value == 1.0
    settings = results.settings
    assert (settings["cs"], settings["metric"], settings["max_iter"]) == ([0.001, 0.1, 10.0], "log_loss", 200)
    assert (settings["n_tries"], settings["hold_out_repeats"]) == (2, 2)
    assert settings["chosen_by"] == "log_loss on held-out parts of the training set, 2 times"
    assert (settings["features"], settings["image_size"]) == ("patch_mean", [28, 28])
    assert settings["test_datasets"] == {"test 1": val, "test 2": train}
    assert load_log_regression(out / "log_regression.npz").classes == ("good", "defect")
    for name, split in (("predictions", "val"), ("predictions_test_1", "val"), ("predictions_test_2", "train")):
        with open(out / f"{name}.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["image"] for row in rows] == [str(parts / split / f"{photo}.png") for photo in range(16)]
        assert all(row["label"] == row["prediction"] for row in rows)
    log = (out / "log" / "log.txt").read_text()
    assert f"{chosen}*" in log
    assert "mean ± std [min, max] over tries" in log


def test_defaults_of_the_command_are_those_of_the_library(parts: Path, tmp_path: Path) -> None:
    main([*SEEING, *datasets(parts), f"--output-dir={tmp_path}", "--num-resamples=0"])
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["settings"]["cs"]) == 45
    assert results["settings"]["metric"] == ""
    assert results["extra"]["choice_of_c"]["metric"] == "auroc"
    assert results["extra"]["choice_of_c"]["repeats"] == 5
    assert list(results["datasets"]) == ["train", "val"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--cs", "0"], "cs must be one or more finite numbers above 0"),
        (["--hold-out-fraction=1"], "hold_out_fraction must be between 0 and 1"),
        (["--n-per-class-list", "0"], "n_per_class_list"),
        (["--image-size=30"], "evaluation.image_size=30 is not divisible by student.patch_size=14"),
        (["--pretrained-weights=nowhere.pth"], "nowhere.pth"),
        (["--test-datasets", "Nothing:root=x"], "Nothing"),
    ],
)
def test_bad_options(parts: Path, tmp_path: Path, extra: list[str], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main([*SEEING, *datasets(parts), "--output-dir", str(tmp_path), *extra])


def test_datasets_are_needed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs --train-dataset and --val-dataset"):
        main([*SEEING, "--output-dir", str(tmp_path)])


def test_door_shows_help_with_an_example(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["log_regression.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(repository / "eval" / "log_regression.py"), run_name="__main__")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for flag in ("--config-file", "--test-datasets", "--n-per-class-list", "--hold-out-fraction", "--cs", "example:"):
        assert flag in shown
