"""The command and its door, on photos on disk."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.eval.linear.evaluation import main

TINY = [
    "student.arch=vit_tiny",
    "student.patch_size=14",
    "student.layerscale=1.0",
    "crops.global_crops_size=28",
    "crops.local_crops_size=14",
    "train.device=cpu",
    "--num-workers=0",
    "--epochs=2",
    "--epoch-length=10",
    "--num-resamples=10",
    "--batch-size=8",
]


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """Two photos of each of eight parts; defective parts are red, good ones blue, in three splits."""
    root = tmp_path / "parts: line 4"
    (root / "annotations").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        (root / split).mkdir()
        rows = []
        for photo in range(16):
            part, label = photo // 2, photo // 2 % 2
            pixels = generator.integers(0, 60, (40, 50, 3), dtype=np.uint8)
            pixels[..., 0 if label else 2] += 180
            name = f"{split}/{photo}.png"
            Image.fromarray(pixels).save(root / name)
            rows.append({"img_path": name, "gt_label": label, "group_id": f"{split} {part}"})
        content = {"metainfo": {"classes": ["good", "defect"]}, "data_list": rows}
        (root / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return root


def dataset(root: Path, split: str) -> str:
    return f"GroupedJSON:split={split}:root=" + str(root).replace(":", "\\:")


def sets(root: Path) -> list[str]:
    return ["--train-dataset", dataset(root, "TRAIN"), "--val-dataset", dataset(root, "VAL")]


def test_command_writes_results_and_a_head_that_can_be_judged(parts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    test = dataset(parts, "TEST")
    assert main([*TINY, *sets(parts), "--test-datasets", test, "--output-dir", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    on_test = f"{results['chosen']} on test"
    assert len(results["scores"]) == 53
    assert results["scores"][on_test]["part"]["count"] == 8
    assert results["scores"][on_test]["image"]["figures"]["accuracy"]["value"] == 1.0
    assert results["settings"]["test_datasets"] == {"test": test}
    assert (results["settings"]["global_batch_size"], results["settings"]["augment"]) == (8, False)
    assert torch.load(out / "linear_head.pth", weights_only=True)["classes"] == ["good", "defect"]
    assert "chosen by accuracy on the validation set itself" in (out / "log" / "log.txt").read_text()

    judged = tmp_path / "judged"
    head = ["--classifier-fpath", str(out / "linear_head.pth")]
    two = ["--test-datasets", test, dataset(parts, "TRAIN")]
    assert main([*TINY, *sets(parts), *two, *head, "--output-dir", str(judged)]) == 0
    assert "--train-dataset has no effect with --classifier-fpath" in (judged / "log" / "log.txt").read_text()
    again = json.loads((judged / "results.json").read_text())
    assert list(again["scores"]) == [again["chosen"], f"{again['chosen']} on test 1", f"{again['chosen']} on test 2"]
    assert again["scores"][again["chosen"]] == results["scores"][results["chosen"]]
    assert (judged / "predictions_test_2.csv").exists()


def test_published_augmentation_and_upstreams_flags(parts: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "swap.npy", np.array([1, 0]))
    flags = ["--augment", "--val-metric-type=mean_per_class_accuracy", "--learning_rates", "0.05", "0.1"]
    flags += ["--eval-period-iterations=5", "--class-weighting=balanced", "--no-resume", "--features=cls"]
    flags += ["--test-datasets", dataset(parts, "TEST"), dataset(parts, "TEST")]
    flags += ["--test-class-mapping-fpaths", "none", str(tmp_path / "swap.npy")]
    assert main([*TINY, *sets(parts), *flags, "--output-dir", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results["scores"]) == 10
    assert (results["settings"]["augment"], results["settings"]["val_metric"]) == (True, "balanced_accuracy")
    plain, swapped = (
        results["scores"][f"{results['chosen']} on test {number}"]["image"]["figures"]["accuracy"]["value"]
        for number in (1, 2)
    )
    assert plain + swapped == pytest.approx(1.0), "the second set's classes mean the opposite"
    assert len((tmp_path / "out" / "linear_metrics.jsonl").read_text().splitlines()) == 4
    assert "--features has no effect" in (tmp_path / "out" / "log" / "log.txt").read_text()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--epochs=0"], "epochs must be at least 1"),
        (["--learning-rates", "-0.1"], "learning rates must be one or more positive numbers"),
        (["--n-last-blocks", "13"], "cannot take the last 13 blocks of a model of 12"),
        (["--test-class-mapping-fpaths", "none"], "1 class mappings were given for 0 test sets"),
        (["--val-class-mapping-fpath", "nowhere.npy"], "no class mapping at nowhere.npy"),
        (["--classifier-fpath", "nowhere.pth"], "no checkpoint at nowhere.pth"),
    ],
)
def test_bad_options(parts: Path, tmp_path: Path, extra: list[str], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main([*TINY, *sets(parts), "--output-dir", str(tmp_path), *extra])


def test_datasets_are_needed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--train-dataset and --val-dataset"):
        main([*TINY, "--output-dir", str(tmp_path)])


def test_door_shows_help_with_an_example(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["linear.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(repository / "eval" / "linear.py"), run_name="__main__")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for flag in ("--test-datasets", "--val-class-mapping-fpath", "--epoch-length", "--no-augment", "example:"):
        assert flag in shown
