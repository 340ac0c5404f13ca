import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2.eval.knn_command import main
from dinov2.eval.results import KnnResults

TINY = [
    "student.arch=vit_tiny",
    "student.patch_size=14",
    "crops.global_crops_size=28",
    "crops.local_crops_size=14",
    "train.device=cpu",
]


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """Two photos of each of eight parts; defective parts are red, good ones blue, in training and validation."""
    root = tmp_path / "parts: line 4"
    (root / "annotations").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
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


def datasets(root: Path) -> list[str]:
    escaped = str(root).replace(":", "\\:")
    return [
        f"--train-dataset=GroupedJSON:split=TRAIN:root={escaped}",
        f"--val-dataset=GroupedJSON:split=VAL:root={escaped}",
    ]


def test_command_writes_results_and_log(parts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    # At the default LayerScale of 1e-5, a random backbone's class token hardly sees the image.
    code = main(
        [
            *TINY,
            "student.layerscale=1.0",
            *datasets(parts),
            "--output-dir",
            str(out),
            "--nb_knn",
            "3",
            "50",
            "--num-workers=0",
        ]
    )
    assert code == 0
    results = KnnResults.from_dict(json.loads((out / "results_eval_knn.json").read_text()))
    assert [scores.k for scores in results.scores] == [3, 16]
    assert (results.num_train_images, results.num_train_parts, results.classes) == (16, 8, ("good", "defect"))
    assert results.best.image.accuracy == 1.0
    assert results.best.part.auroc == 1.0
    assert (results.best.image.count, results.best.part.count) == (16, 8)
    log = (out / "log" / "log.txt").read_text()
    assert "the backbone is random" in log
    assert results.table().splitlines()[-1] in log


def test_config_file_and_flags_agree(parts: Path, tmp_path: Path) -> None:
    train, val = (flag.partition("=")[2] for flag in datasets(parts))
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
        written.append((tmp_path / name / "results_eval_knn.json").read_text())
    assert written[0] == written[1]
    assert json.loads(written[0])["temperature"] == 0.1


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--image-size=30"], "images of 30x30 pixels cannot be cut into patches of 14x14"),
        (["--temperature=0"], "evaluation.temperature .*must be greater than 0"),
        (["--nb_knn", "0"], "evaluation.nb_knn .*must be at least 1"),
        (["--pretrained-weights=nowhere.pth"], "nowhere.pth"),
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
    for flag in ("--config-file", "--pretrained-weights", "--nb_knn", "--temperature", "--gather-on-cpu", "example:"):
        assert flag in shown
