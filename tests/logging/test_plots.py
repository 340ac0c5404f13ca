import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2.logging import MetricsFile
from dinov2.logging.plots import plot_training

LOSSES = ("total_loss", "dino_local_crops_loss", "dino_global_crops_loss", "koleo_loss", "ibot_loss")


def write_run(path: Path, *, losses: tuple[str, ...] = LOSSES, evaluations: int = 5, length: int = 200) -> None:
    generator = np.random.default_rng(0)
    with MetricsFile(path) as file:
        for iteration in range(9, 10 * length, 10):
            progress = iteration / (10 * length)
            noise = generator.normal(scale=0.3, size=len(losses))
            values = {name: 11 / (1 + level) - 3 * progress + noise[level] for level, name in enumerate(losses)}
            timing = {"images_per_second": 150 + generator.normal(), "data_wait_fraction": 0.03, "memory_gib": 3.1}
            schedules = {
                "lr": 1e-4 * math.sin(math.pi * progress),
                "last_layer_lr": 0.0 if progress < 0.1 else 1e-4 * math.sin(math.pi * progress),
                "weight_decay": 0.04 + 0.36 * progress,
                "momentum": 0.992 + 0.008 * progress,
                "teacher_temp": min(0.07, 0.04 + 0.1 * progress),
            }
            file.append({"iteration": iteration, **values, **schedules, "batch_size": 64, "timing": timing})
        for number in range(evaluations):
            scores = {
                f"knn_{who}_balanced_accuracy_k{k}": 0.9 - 0.5 / (number + 2) - k / 1000
                for who in ("image", "part")
                for k in (10, 20, 100)
            }
            file.append({"iteration": 400 * number, "evaluation": scores})


def size_and_ink(path: Path) -> tuple[tuple[int, int], float]:
    """Size of a picture, and the share of its pixels that are not background."""
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("L"))
        return picture.size, float((pixels < 250).mean())


def test_a_run_is_drawn_into_four_pictures_of_readable_size(tmp_path: Path) -> None:
    write_run(tmp_path / "metrics.jsonl")
    written = plot_training(tmp_path / "metrics.jsonl", tmp_path)
    assert [path.name for path in written] == ["losses.png", "schedules.png", "throughput.png", "knn.png"]
    assert {path.parent for path in written} == {tmp_path / "plots"}
    sizes = {}
    for path in written:
        sizes[path.name], ink = size_and_ink(path)
        assert ink > 0.01
    # Panels in two columns and one row for two scores, in three columns and two rows for five losses.
    assert sizes["knn.png"] == (1104, 384)
    assert sizes["losses.png"] == (1656, 708)
    assert sizes["throughput.png"] == (1080, 1032)


def test_monitors_are_drawn_from_training_and_evaluation_with_warnings_marked(tmp_path: Path) -> None:
    def draw(warnings: list[str]) -> tuple[tuple[int, int], float]:
        with MetricsFile(tmp_path / "metrics.jsonl") as file:
            file.truncate_to(0)
            file.append({"iteration": -1, "evaluation": {"probe_cls_rank": 20.0, "probe_patch_drift": 0.0}})
            for iteration in range(9, 100, 10):
                more = {"warnings": warnings} if iteration == 49 and warnings else {}
                file.append({"iteration": iteration, "teacher_entropy_cls": 0.5, "kl_patch": None, **more})
            file.append({"iteration": 99, "evaluation": {"probe_cls_rank": 30.0, "probe_patch_drift": 0.1}})
        (picture,) = plot_training(tmp_path / "metrics.jsonl", tmp_path)
        assert picture.name == "monitors.png"
        return size_and_ink(picture)

    size, ink = draw([])
    assert size == (1656, 708), "four panels in three columns"
    assert ink > 0.01
    assert draw(["COLLAPSE: …"])[1] > ink


def test_only_what_was_recorded_is_drawn(tmp_path: Path) -> None:
    with MetricsFile(tmp_path / "metrics.jsonl") as file:
        file.append({"iteration": 0, "total_loss": 1.0})
    assert [path.name for path in plot_training(tmp_path / "metrics.jsonl", tmp_path)] == ["losses.png"]


def test_losses_that_are_not_finite_leave_gaps(tmp_path: Path) -> None:
    with MetricsFile(tmp_path / "metrics.jsonl") as file:
        for iteration in range(20):
            broken = iteration in (5, 6)
            file.append({"iteration": iteration, "total_loss": math.nan if broken else 1.0, "koleo_loss": math.inf})
    (picture,) = plot_training(tmp_path / "metrics.jsonl", tmp_path)
    assert size_and_ink(picture)[1] > 0.005


def test_drawing_again_gives_the_same_bytes_and_leaves_no_other_files(tmp_path: Path) -> None:
    write_run(tmp_path / "metrics.jsonl", length=5)
    first = [path.read_bytes() for path in plot_training(tmp_path / "metrics.jsonl", tmp_path)]
    second = [path.read_bytes() for path in plot_training(tmp_path / "metrics.jsonl", tmp_path)]
    assert first == second
    assert len(list((tmp_path / "plots").iterdir())) == 4


def test_a_file_with_nothing_to_draw_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"note": "empty"}\n')
    with pytest.raises(ValueError, match=r"no training or evaluation record to draw \(1 records\)"):
        plot_training(tmp_path / "metrics.jsonl", tmp_path)
    with pytest.raises(FileNotFoundError, match="no metrics file at"):
        plot_training(tmp_path / "missing.jsonl", tmp_path)
