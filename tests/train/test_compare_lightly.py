"""The comparison with LightlyTrain, as far as it needs none: what is asked of it, the table, and what fails."""

import json
import sys
from pathlib import Path

import pytest

from dinov2.config import load_config
from dinov2.utils.errors import RunError
from tools.compare_lightly import CompareOptions, job, read_run, run, table, train_peer

OPTIONS = CompareOptions(run=Path("run"), minutes=2.0, train_dataset="a", val_dataset="b", seed=3)
PAIRS = (
    *("student.arch=vit_mini", "student.patch_size=16", "student.layerscale=1.0", "crops.global_crops_size=96"),
    *("crops.local_crops_size=48", "crops.local_crops_number=2", "train.batch_size_per_gpu=16", "optim.lr=0.0005"),
    *("optim.epochs=10", "train.OFFICIAL_EPOCH_LENGTH=10", "optim.warmup_epochs=1", "optim.freeze_last_layer_epochs=0"),
    *("teacher.warmup_teacher_temp_epochs=2", "teacher.momentum_teacher=0.9", "dino.head_n_prototypes=128"),
)


def test_it_gets_our_network_pixels_and_batch_and_our_schedule_in_proportion_to_its_steps(tmp_path: Path) -> None:
    config = load_config(None, list(PAIRS))
    plain, ours = (job(config, ["x"] * 160, tmp_path, 50, 2.0, schedule, OPTIONS) for schedule in (False, True))
    for asked in (plain, ours):
        sizes = {"img_size": 96, "patch_size": 16, "embed_dim": 192, "depth": 6, "num_heads": 3, "block_chunks": 0}
        assert asked["network"].items() >= sizes.items()
        assert (asked["seconds"], asked["seed"], asked["call"]["epochs"]) == (120, 3, 5)
        assert asked["call"]["transform_args"]["image_size"] == [96, 96]
        assert asked["call"]["transform_args"]["local_view"]["view_size"] == [48, 48]
        assert json.loads(json.dumps(asked)) == asked
    assert "method_args" not in plain["call"]
    method = ours["call"]["method_args"]
    assert (method["warmup_steps"], method["teacher_temp_warmup_steps"]) == (5, 10)  # 50 steps of our 100
    assert (method["momentum_start"], method["output_dim"]) == (0.9, 128)
    assert ours["call"]["optim_args"]["lr"] * (16 / 1024) ** 0.5 == pytest.approx(0.0005)
    assert ours["call"]["transform_args"]["local_view"]["num_views"] == 2
    assert (plain["network"]["init_values"], ours["network"]["init_values"]) == (1e-5, 1.0)


def test_the_last_teacher_is_compared(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no eval/training_"):
        read_run(tmp_path)
    for step in (99, 1099, 299):
        (tmp_path / f"eval/training_{step}").mkdir(parents=True)
        (tmp_path / f"eval/training_{step}/teacher_checkpoint.pth").touch()
    (tmp_path / "config.yaml").write_text("student: {arch: vit_mini}\n", encoding="utf-8")
    config, steps, weights = read_run(tmp_path)
    assert (config.student.arch, steps, weights.parent.name) == ("vit_mini", 1100, "training_1099")


def test_the_table_is_markdown() -> None:
    rows = [{"what": "ours", "steps": 3, "k-NN accuracy": 0.9}, {"what": "theirs", "steps": 2, "k-NN accuracy": 0.8}]
    assert table(rows) == (
        "| what | steps | k-NN accuracy |\n| --- | --- | --- |\n| ours | 3 | 0.900 |\n| theirs | 2 | 0.800 |\n"
    )


def test_failures_of_the_other_environment_are_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be started: No such file or directory; --python"):
        run([str(tmp_path / "python")])
    with pytest.raises(RunError, match=r"failed \(3\):\nno such module"):
        run([sys.executable, "-c", "import sys; print('no such module', file=sys.stderr); sys.exit(3)"])
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\ntest -f "$3" && echo STEPS 0\n', encoding="utf-8")
    script.chmod(0o755)
    with pytest.raises(RunError, match="no step in 30 seconds"):
        train_peer(str(script), {"seconds": 30, "call": {"out": str(tmp_path / "deep/try")}})
