"""Fine-tuning on few labels: nested subsets, what each method trains, resuming, and the table."""

from pathlib import Path

import numpy as np
import pytest
from fine_tune_stand_ins import make_parts, make_small

from dinov2.data.datasets import GroupedJSON
from dinov2.data.datasets.base import Split
from tools.benchmark_labels import METHODS, LabelsOptions, main, overrides, table, write_subset

OPTIONS = LabelsOptions(config=Path("c.yaml"), weights="w.pth", labels=(1, 2), seeds=(0, 1))


def test_subsets_are_balanced_links_and_nested(tmp_path: Path) -> None:
    dataset = GroupedJSON(split=Split.TRAIN, root=str(make_parts(tmp_path)))
    names = {}
    for count in (1, 3):
        assert write_subset(dataset, tmp_path / f"subset{count}", count, seed=1) == count * len(dataset.classes)
        subset = GroupedJSON(split=Split.TRAIN, root=str(tmp_path / f"subset{count}"))
        assert np.bincount(subset.get_targets()).tolist() == [count] * len(dataset.classes)
        names[count] = {Path(path).name for path in subset.get_image_paths()}
        assert all(path.is_symlink() for path in (tmp_path / f"subset{count}/train").iterdir())
    assert names[1] < names[3]


@pytest.mark.parametrize("method", METHODS)
def test_only_pretrained_methods_get_weights_and_only_scratch_fast_steps(method: str) -> None:
    changed = overrides(OPTIONS, method, Path("s"), Path("r"), seed=2, epochs=30)
    assert changed["backbone"]["pretrained_weights"] == ("w.pth" if method.startswith("pretrained") else "")
    assert ("backbone_lr_mult" in changed["optim"]) == (method == "scratch")
    assert changed["evaluation"]["every_epochs"] == changed["optim"]["epochs"] == 30  # val chooses nothing


def test_a_finished_run_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    parts = make_parts(tmp_path)
    make_small(monkeypatch)
    config = tmp_path / "recipe.yaml"
    config.write_text(
        f"backbone: {{config_file: {tmp_path}/backbone.yaml}}\n"
        f"data: {{train_dataset_path: 'GroupedJSON:split=TRAIN:root={parts}', image_size: 32, num_workers: 0,\n"
        f"  val_dataset_path: 'GroupedJSON:split=VAL:root={parts}'}}\n"
        "train: {batch_size_per_gpu: 2}\n",
        encoding="utf-8",
    )
    words = ["--config", str(config), "--weights", "none.pth", "--labels", "2", "--steps", "2"]
    words += ["--methods", "random_frozen", "--output-dir", str(tmp_path / "out")]
    assert main(words) == 0
    first = (tmp_path / "out/labels.md").read_text()
    assert first.startswith("| val, balanced_accuracy | 2 a class |")
    assert "seed 0: " in capsys.readouterr().out
    assert main(words) == 0
    assert "seed 0: " not in capsys.readouterr().out
    assert (tmp_path / "out/labels.png").is_file()
    assert (tmp_path / "out/labels.md").read_text() == first


def test_the_table_has_means_and_deviations() -> None:
    text = table(OPTIONS, {"scratch 1": [0.5, 0.7], "scratch 2": [0.9]})
    assert "| scratch | 0.600 ± 0.141 | 0.900 |" in text
    assert "| pretrained_lora | - | - |" in text
