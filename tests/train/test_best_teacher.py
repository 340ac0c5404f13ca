"""The best teacher is kept, whatever comes between: worse ones, resumes, changes of mind, crashes."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from train_stand_ins import monitors

from dinov2.train import evaluation as best_teacher
from dinov2.train.evaluation import BestTeacher, keep_best, read_best, score_of

FIGURES = {
    "knn_image_accuracy_k10": 0.8,
    "knn_image_accuracy_k20": 0.6,
    "knn_part_balanced_accuracy_k10": 0.7,
    "knn_part_auroc_k10": 0.9,
    "knn_part_auroc_k20": 0.8,
    "knn_part_auroc_k100": 0.7,
    "probe_cls_rank": 30.0,
}


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("", ("part_auroc", 0.8)),
        ("part_auroc", ("part_auroc", 0.8)),
        ("part_auroc_k10", ("part_auroc_k10", 0.9)),
        ("image_accuracy", ("image_accuracy", 0.7)),
        ("image_accuracy_k20", ("image_accuracy_k20", 0.6)),
        ("part_auroc_k1", None),
        ("part_top5", None),
    ],
)
def test_the_figure_that_decides(metric: str, expected: tuple[str, float] | None) -> None:
    assert score_of(FIGURES, metric) == (None if expected is None else (expected[0], pytest.approx(expected[1])))


def test_with_more_than_two_classes_balanced_accuracy_decides() -> None:
    assert score_of({name: value for name, value in FIGURES.items() if "auroc" not in name}) == (
        "part_balanced_accuracy",
        0.7,
    )
    assert score_of({}) is None


def teacher(run: Path, iteration: int, *, sidecar: bool = False) -> Path:
    path = run / "eval" / f"training_{iteration}" / "teacher_checkpoint.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"teacher of {iteration}")
    if sidecar:
        path.with_name(f"{path.name}.sha256").write_text(f"digest of {iteration}")
    return path


def keep(run: Path, iteration: int, score: float, **options: Any) -> BestTeacher | None:
    figures = {"knn_part_auroc_k10": score, "knn_image_accuracy_k10": 1 - score}
    return keep_best(run / "eval" / "best", teacher(run, iteration), iteration, figures, **options)


def content(run: Path) -> str:
    return (run / "eval" / "best" / "teacher_checkpoint.pth").read_text()


def test_the_best_is_kept_and_a_tie_changes_nothing(tmp_path: Path) -> None:
    for iteration, score in ((9, 0.7), (19, 0.9), (29, 0.8), (39, 0.9)):
        keep(tmp_path, iteration, score)
    assert content(tmp_path) == "teacher of 19"
    assert json.loads((tmp_path / "eval" / "best" / "best.json").read_text()) == {
        "iteration": 19,
        "metric": "part_auroc",
        "score": 0.9,
        "teacher": "eval/training_19/teacher_checkpoint.pth",
    }
    assert sorted(os.listdir(tmp_path / "eval" / "best")) == ["best.json", "teacher_checkpoint.pth"]
    keep(tmp_path, 49, 0.95)
    assert content(tmp_path) == "teacher of 49"


def test_it_outlives_the_file_it_came_from(tmp_path: Path) -> None:
    keep(tmp_path, 9, 0.7)
    teacher(tmp_path, 9).unlink()
    assert content(tmp_path) == "teacher of 9"


def test_where_files_cannot_be_linked_they_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("not on this file system")

    monkeypatch.setattr(os, "link", refuse)
    keep_best(tmp_path / "eval" / "best", teacher(tmp_path, 9, sidecar=True), 9, FIGURES)
    assert content(tmp_path) == "teacher of 9"
    assert (tmp_path / "eval" / "best" / "teacher_checkpoint.pth.sha256").read_text() == "digest of 9"


@pytest.mark.parametrize("digests", [(True, True), (True, False), (False, True)])
def test_the_checksum_goes_with_its_teacher(tmp_path: Path, digests: tuple[bool, bool]) -> None:
    for number, (score, sidecar) in enumerate(zip((0.7, 0.9), digests, strict=True)):
        source = teacher(tmp_path, number, sidecar=sidecar)
        keep_best(tmp_path / "eval" / "best", source, number, {"knn_part_auroc_k10": score})
        kept = tmp_path / "eval" / "best" / "teacher_checkpoint.pth.sha256"
        assert kept.exists() is sidecar, "never that of the former teacher"
        assert not sidecar or kept.read_text() == f"digest of {number}"


def test_a_crash_leaves_no_checksum_of_another_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = tmp_path / "eval" / "best"
    real = best_teacher._link_or_copy
    for crash_at in range(3):
        source = teacher(tmp_path, 9, sidecar=True)
        keep_best(best, source, 9, {"knn_part_auroc_k10": 0.7})
        calls = iter(range(10))

        def crash(source: Path, target: Path, calls: Any = calls, at: int = crash_at) -> None:
            if next(calls) == at:
                raise KeyboardInterrupt
            real(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(best_teacher, "_link_or_copy", crash)
            if crash_at < 2:
                with pytest.raises(KeyboardInterrupt):
                    keep_best(best, teacher(tmp_path, 19, sidecar=True), 19, {"knn_part_auroc_k10": 0.9})
        digest = best / "teacher_checkpoint.pth.sha256"
        assert not digest.exists() or digest.read_text().split()[-1] == content(tmp_path).split()[-1]
        (best / "best.json").unlink(missing_ok=True)


def test_another_metric_starts_anew(tmp_path: Path) -> None:
    keep(tmp_path, 9, 0.9)
    best = keep(tmp_path, 19, 0.4, metric="image_accuracy")
    assert best is not None
    assert (best.iteration, best.metric, best.score) == (19, "image_accuracy", 0.6)


def test_what_a_run_that_starts_again_made_void_is_forgotten(tmp_path: Path) -> None:
    keep(tmp_path, 19, 0.9)
    (tmp_path / "metrics.jsonl").touch()
    for start, known in ((20, True), (19, False)):
        monitors(tmp_path, start=start).begin()
        assert (read_best(tmp_path / "eval" / "best") is not None) is known
    keep(tmp_path, 9, 0.5)
    assert content(tmp_path) == "teacher of 9"


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"iteration": 3}', '{"iteration": "x", "metric": "m"}'])
def test_a_record_that_cannot_be_read_counts_as_none(tmp_path: Path, damage: str) -> None:
    keep(tmp_path, 9, 0.9)
    (tmp_path / "eval" / "best" / "best.json").write_text(damage)
    assert read_best(tmp_path / "eval" / "best") is None
    keep(tmp_path, 19, 0.5)
    assert content(tmp_path) == "teacher of 19"


def test_a_crash_between_the_two_files_never_leaves_a_record_of_another_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(tmp_path, 9, 0.7)

    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    for where in ("_link_or_copy", "write_text_atomically"):
        with monkeypatch.context() as patch:
            patch.setattr(best_teacher, where, crash)
            with pytest.raises(KeyboardInterrupt):
                keep(tmp_path, 19, 0.9)
        assert read_best(tmp_path / "eval" / "best") is None
    keep(tmp_path, 19, 0.9)
    assert content(tmp_path) == "teacher of 19"


def test_no_figures_no_best_and_a_metric_without_figure_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert keep_best(tmp_path / "eval" / "best", teacher(tmp_path, 9), 9, {}) is None
    assert not caplog.records
    with caplog.at_level("WARNING", logger="dinov2"):
        assert keep(tmp_path, 9, 0.5, metric="part_top5") is None
    assert (
        "evaluation.best_metric=part_top5 names none of the metrics part_auroc_k10, image_accuracy_k10" in caplog.text
    )
    assert not (tmp_path / "eval" / "best").exists()
