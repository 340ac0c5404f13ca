import csv
import json
import runpy
import sys
from pathlib import Path

import pytest
from eval_command_sets import TINY, dataset_strings, make_parts

from dinov2.eval.knn import main
from dinov2.eval.results import EvaluationResults

# At the default LayerScale of 1e-5, a random backbone's class token hardly sees the image.
SEEING = (*TINY, "student.layerscale=1.0")


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    return make_parts(tmp_path / "parts: line 4")


def datasets(root: Path) -> list[str]:
    train, val = dataset_strings(root)
    return [f"--train-dataset={train}", f"--val-dataset={val}"]


def read_results(folder: Path) -> EvaluationResults:
    return EvaluationResults.from_dict(json.loads((folder / "results.json").read_text()))


def test_command_writes_results_predictions_and_log(parts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main([*SEEING, *datasets(parts), f"--output-dir={out}", "--nb_knn", "3", "50", "--num-workers=0"]) == 0
    results = read_results(out)
    assert list(results.scores) == ["k=3", "k=16"]
    assert results.classes == ("good", "defect")
    assert (results.datasets["train"]["num_images"], results.datasets["train"]["num_parts"]) == (16, 8)
    scores = results.scores[results.chosen]
    assert scores.image.metrics["accuracy"].value == 1.0
    assert scores.part.metrics["auroc"].value == scores.part.metrics["auroc"].low == 1.0
    assert (scores.image.count, scores.part.count) == (16, 8)
    assert results.settings["image_size"] == [28, 28]
    assert results.settings["temperature"] == 0.07
    log = (out / "log" / "log.txt").read_text()
    assert "the backbone is random" in log
    assert "k=3*" in log
    with open(out / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [str(parts / "val" / f"{photo}.png") for photo in range(16)]
    assert all(row["label"] == row["prediction"] for row in rows)


def test_config_file_and_flags_agree(parts: Path, tmp_path: Path) -> None:
    train, val = dataset_strings(parts)
    config = tmp_path / "model.yaml"
    config.write_text(
        "student: {arch: vit_tiny, patch_size: 14}\n"
        "crops: {global_crops_size: 28, local_crops_size: 14}\n"
        "train: {device: cpu}\n"
        f"evaluation: {{nb_knn: [4], temperature: 0.1, train_dataset_path: '{train}', val_dataset_path: '{val}'}}\n"
    )
    flags = [*TINY, *datasets(parts), "--temperature=0.1", "--nb_knn", "4"]
    written = []
    for name, argv in (("file", ["--config-file", str(config)]), ("flags", flags)):
        main([*argv, "--output-dir", str(tmp_path / name), "--num-workers=0"])
        written.append((tmp_path / name / "results.json").read_text())
    assert written[0] == written[1]
    assert json.loads(written[0])["settings"]["temperature"] == 0.1


def test_one_set_is_enough_when_parts_are_left_out(parts: Path, tmp_path: Path) -> None:
    val = datasets(parts)[1]
    common = [*SEEING, "--num-workers=0", "--nb_knn", "1", "16"]
    assert main([*common, val, "--leave-one-part-out", f"--output-dir={tmp_path / 'one'}"]) == 0
    results = read_results(tmp_path / "one")
    assert list(results.scores) == ["k=1", "k=14"]
    assert results.settings["leave_one_part_out"] is True
    assert results.scores["k=1"].part.metrics["accuracy"].value == 1.0
    with pytest.raises(ValueError, match="needs --train-dataset"):
        main([*common, val, f"--output-dir={tmp_path / 'two'}"])


def test_few_shot_flags(parts: Path, tmp_path: Path) -> None:
    flags = ["--n-per-class-list", "2", "-1", "--n-tries", "3", "--gather-on-cpu", "--num-workers=0"]
    assert main([*SEEING, *datasets(parts), *flags, f"--output-dir={tmp_path}"]) == 0
    results = read_results(tmp_path)
    assert list(results.scores) == ["k=10", "k=16", "n=2 k=2"]
    assert "mean ± std [min, max] over tries" in (tmp_path / "log" / "log.txt").read_text()
    assert len(results.extra["few_shot"]["n=2 k=2"]["part"]["auroc"]["values"]) == 3


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--image-size=30"], "evaluation.image_size=30 is not divisible by student.patch_size=14"),
        (["--temperature=0"], "evaluation.temperature .*must be greater than 0"),
        (["--nb_knn", "0"], "evaluation.nb_knn .*must be at least 1"),
        (["--n-per-class-list", "0"], "numbers from 1 up, or -1"),
        (["--pretrained-weights=nowhere.pth"], r"nowhere\.pth"),
    ],
)
def test_bad_options(parts: Path, tmp_path: Path, extra: list[str], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main([*TINY, *datasets(parts), "--output-dir", str(tmp_path), *extra])


def test_datasets_are_needed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs --train-dataset and --val-dataset"):
        main([*TINY, "--output-dir", str(tmp_path)])


def test_door_shows_help_with_an_example(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["knn.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(repository / "eval" / "knn.py"), run_name="__main__")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for flag in (
        "--config-file",
        "--pretrained-weights",
        "--nb-knn",
        "_ and - mean the same",
        "--temperature",
        "--gather-on-cpu",
        "--n-per-class-list",
        "--n-tries",
        "--leave-one-part-out",
        "example:",
    ):
        assert flag in shown
