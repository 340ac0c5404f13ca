"""The teacher is written whole and scored by k-NN without a trace in the run; the best one is kept, whatever comes."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from train_stand_ins import OPTIONS, Train, evaluation_pairs, make_small, monitors, no_space, records

from dinov2.config import Config, load_config, parse_config, render_config
from dinov2.data.loaders import make_dataset
from dinov2.eval.features import make_eval_transform
from dinov2.eval.knn import eval_knn
from dinov2.eval.learning import score_of
from dinov2.logging import MetricsFile, read_metrics
from dinov2.train import evaluation
from dinov2.train.evaluation import (
    BestTeacher,
    evaluate_teacher,
    evaluation_folder,
    evaluation_is_done,
    evaluation_is_due,
    evaluation_size,
    flat_metrics,
    keep_best,
    mend_best,
    open_evaluation_sets,
    read_best,
    save_teacher,
)
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.utils.files import checksum_fault
from dinov2.utils.seeds import RandomState

CPU = torch.device("cpu")


def config_of(parts: Path, *pairs: str) -> Config:
    return load_config(None, [*OPTIONS, *evaluation_pairs(parts), "evaluation.nb_knn=[1,3]", *pairs])


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> SSLMetaArch:
    make_small(monkeypatch)
    torch.manual_seed(0)
    return SSLMetaArch(load_config(None, OPTIONS)).train()


def test_scores_are_those_of_the_evaluator_alone(model: SSLMetaArch, tmp_path: Path, parts: Path) -> None:
    config = config_of(parts, "evaluation.image_size=24", "evaluation.whole_image=true", "evaluation.temperature=0.2")
    results = evaluate_teacher(config, model, CPU, weights="w")
    assert results is not None
    results.write(tmp_path)
    metrics = flat_metrics(results)
    transform = make_eval_transform(24, whole_image=True)
    sets = [
        make_dataset(dataset_str=f"GroupedJSON:split={split}:root={parts}", transform=transform)
        for split in ("TRAIN", "VAL")
    ]
    results = eval_knn(model.teacher["backbone"].eval(), *sets, nb_knn=(1, 3), temperature=0.2, num_workers=0)
    assert metrics == flat_metrics(results)
    assert metrics.keys() >= {"knn_image_accuracy_k1", "knn_part_balanced_accuracy_k3"}
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["weights"] == {"path": "w"}
    assert (written["settings"]["image_size"], written["settings"]["whole_image"]) == ([24, 24], True)
    assert all("low" not in metric for metric in written["scores"]["k=3"]["part"]["figures"].values())


def test_an_evaluation_leaves_modes_and_random_states(model: SSLMetaArch, parts: Path) -> None:
    """On crops that are not square, which are evaluated in their own shape."""
    config = config_of(parts, "crops.global_crops_size=[32,48]")
    sets = open_evaluation_sets(config.evaluation, evaluation_size(config))
    assert sets is not None
    assert sets[0][0][0].shape == (3, 32, 48)
    before = RandomState().state_dict()
    assert evaluate_teacher(config, model, CPU, weights="")
    after = RandomState().state_dict()
    assert torch.equal(before.pop("torch"), after.pop("torch"))
    assert before == after
    assert model.student.training
    assert not model.teacher.training
    assert not any(parameter.requires_grad for parameter in model.teacher.parameters())
    assert evaluate_teacher(load_config(None, OPTIONS), model, CPU, weights="") is None, "no sets, no scores"


def test_the_teacher_file_is_independent_of_the_teacher(model: SSLMetaArch, tmp_path: Path) -> None:
    config = load_config(None, OPTIONS)
    path = save_teacher(model, tmp_path / "eval" / "training_0", render_config(config))
    content = torch.load(path, weights_only=True)
    assert parse_config(content["config"], "file") == config
    saved = content["teacher"]
    assert saved.keys() == model.teacher.state_dict().keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.teacher.state_dict().items())
    assert sorted(other.name for other in path.parent.iterdir()) == [path.name, f"{path.name}.sha256"]
    assert checksum_fault(path) == ""


@pytest.mark.parametrize(("period", "due"), [(0, [5]), (1, [0, 1, 2, 3, 4, 5]), (4, [3, 5]), (3, [2, 5]), (100, [5])])
def test_evaluations_are_due_every_period_and_at_the_end(period: int, due: list[int]) -> None:
    assert [i for i in range(6) if evaluation_is_due(i, period=period, total_iterations=6)] == due


def test_an_evaluation_is_done_when_a_sound_teacher_and_scores_are_there(
    model: SSLMetaArch, tmp_path: Path, parts: Path
) -> None:
    without, with_sets = load_config(None, OPTIONS).evaluation, config_of(parts).evaluation
    assert not evaluation_is_done(without, tmp_path, 3)
    path = save_teacher(model, evaluation_folder(tmp_path, 3))
    assert evaluation_is_done(without, tmp_path, 3)
    assert not evaluation_is_done(with_sets, tmp_path, 3)
    results = evaluate_teacher(config_of(parts), model, CPU, weights="w")
    assert results is not None
    results.write(path.parent)
    assert evaluation_is_done(with_sets, tmp_path, 3)
    for name in ("results.json", "predictions.csv"):
        file = path.parent / name
        whole = file.read_bytes()
        for damage in (b"", whole[: len(whole) // 2], b"[" * 100_000, b"[]")[: 4 if name == "results.json" else 1]:
            file.write_bytes(damage)
            assert not evaluation_is_done(with_sets, tmp_path, 3), "it is made again"
        file.unlink()
        assert not evaluation_is_done(with_sets, tmp_path, 3)
        file.write_bytes(whole)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert not evaluation_is_done(without, tmp_path, 3)
    path.with_name(f"{path.name}.sha256").unlink()
    assert evaluation_is_done(without, tmp_path, 3), "a file of a version that made no checksums"


@pytest.mark.parametrize("damaged", ["results.json", "teacher_checkpoint.pth"])
def test_an_evaluation_whose_files_are_cut_is_made_again_and_recorded_once(
    train: Train, tmp_path: Path, parts: Path, damaged: str
) -> None:
    pairs = (*evaluation_pairs(parts), "evaluation.nb_knn=[1]", "evaluation.probe_images=0")
    assert train(tmp_path, *pairs) == 0
    file = evaluation_folder(tmp_path, 5) / damaged
    whole, before = file.read_bytes(), (tmp_path / "metrics.jsonl").read_text()
    file.write_bytes(whole[: len(whole) // 2])
    assert train(tmp_path, *pairs) == 0
    assert len(file.read_bytes()) == len(whole)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_teacher_that_cannot_be_written_costs_a_line_and_not_the_run(
    train: Train, tmp_path: Path, parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full at the evaluations after iterations 1 and 5, the last; at that after 3 there is room."""
    pairs = (*evaluation_pairs(parts), "evaluation.eval_period_iterations=2", "evaluation.nb_knn=[1]")
    assert train(tmp_path / "whole", *pairs) == 0
    real, calls = evaluation.write_with_checksum, iter(range(9))

    def write(path: Path, fill: Any) -> str:
        if next(calls) in (0, 2):
            no_space()
        return real(path, fill)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "write_with_checksum", write)
        with pytest.raises(OSError, match=r"the teacher .*training_5/teacher_checkpoint\.pth cannot be written: .*No"):
            train(run, *pairs)
    log = (run / "log" / "log.txt").read_text()
    assert log.count("A TEACHER IS NOT SAVED, training goes on") == 1
    assert [path.parent.name for path in run.glob("eval/training_*/teacher_checkpoint.pth")] == ["training_3"]
    assert len(list(run.glob("eval/training_*/results.json"))) == 2, "it is evaluated all the same"
    assert json.loads((run / "eval" / "best" / "best.json").read_text())["iteration"] == 3
    assert train(run, *pairs) == 0, "there is room again, and the last evaluation is made up for"
    assert checksum_fault(run / "eval" / "training_5" / "teacher_checkpoint.pth") == ""
    assert records(run) == records(tmp_path / "whole")


def test_a_best_teacher_that_cannot_be_kept_costs_a_line(
    train: Train, tmp_path: Path, parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "_link_or_copy", no_space)
    assert train(tmp_path, *evaluation_pairs(parts), "optim.epochs=1") == 0
    assert "THE BEST TEACHER IS NOT KEPT" in (tmp_path / "log" / "log.txt").read_text()
    assert checksum_fault(tmp_path / "eval" / "training_2" / "teacher_checkpoint.pth") == ""


def test_wrong_sets_are_found_when_they_are_opened(parts: Path, tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    content = '{"metainfo": {}, "data_list": [{"img_path": "a.png", "group_id": "a"}]}'
    (tmp_path / "annotations" / "val.json").write_text(content)
    config = config_of(parts, f"evaluation.val_dataset_path=GroupedJSON:split=VAL:root={tmp_path}")
    with pytest.raises(ValueError, match="the classes of the two sets differ"):
        open_evaluation_sets(config.evaluation, (32, 32))


METRICS = {
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
def test_the_metric_that_decides(metric: str, expected: tuple[str, float] | None) -> None:
    assert score_of(METRICS, metric) == (None if expected is None else (expected[0], pytest.approx(expected[1])))
    more_than_two_classes = {name: value for name, value in METRICS.items() if "auroc" not in name}
    assert score_of(more_than_two_classes) == ("part_balanced_accuracy", 0.7)
    assert score_of({}) is None


def teacher(run: Path, iteration: int, *, sidecar: bool = True) -> Path:
    path = run / "eval" / f"training_{iteration}" / "teacher_checkpoint.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"teacher of {iteration}")
    if sidecar:
        path.with_name(f"{path.name}.sha256").write_text(f"digest of {iteration}")
    return path


def keep(run: Path, iteration: int, score: float, *, metric: str = "", sidecar: bool = True) -> BestTeacher | None:
    metrics = {"knn_part_auroc_k10": score, "knn_image_accuracy_k10": 1 - score}
    source = teacher(run, iteration, sidecar=sidecar)
    return keep_best(run / "eval" / "best", source, iteration, metrics, metric=metric)


def content(run: Path) -> str:
    return (run / "eval" / "best" / "teacher_checkpoint.pth").read_text()


def test_the_best_is_kept_and_of_equals_the_later_one(tmp_path: Path) -> None:
    for iteration, score in ((9, 0.7), (19, 0.9), (29, 0.8), (39, 0.9), (49, 0.85)):
        keep(tmp_path, iteration, score)
    teacher(tmp_path, 39).unlink()
    assert content(tmp_path) == "teacher of 39", "it outlives the file that it came from"
    assert json.loads((tmp_path / "eval" / "best" / "best.json").read_text()) == {
        "iteration": 39,
        "metric": "part_auroc",
        "score": 0.9,
        "teacher": "eval/training_39/teacher_checkpoint.pth",
    }
    names = ["best.json", "teacher_checkpoint.pth", "teacher_checkpoint.pth.sha256"]
    assert sorted(os.listdir(tmp_path / "eval" / "best")) == names
    keep(tmp_path, 59, 0.95)
    assert content(tmp_path) == "teacher of 59"


def test_between_equals_the_second_metric_decides(tmp_path: Path) -> None:
    """Also when the best is found anew."""
    (tmp_path / "eval").mkdir()
    seconds = {9: 0.6, 19: 0.8, 29: 0.7, 39: 0.8, 49: 0.5}
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for iteration, second in seconds.items():
            metrics = {"knn_part_auroc_k10": 1.0, "knn_part_balanced_accuracy_k10": second}
            file.write(json.dumps({"iteration": iteration, "evaluation": metrics}) + "\n")
            file.flush()
            keep_best(tmp_path / "eval" / "best", teacher(tmp_path, iteration, sidecar=False), iteration, metrics)
    best = tmp_path / "eval" / "best"
    assert content(tmp_path) == "teacher of 39"
    (best / "best.json").write_text("{")
    found = mend_best(best, read_metrics(tmp_path / "metrics.jsonl"))
    assert found is not None
    assert found.iteration == 39


@pytest.mark.parametrize("can_link", [True, False])
@pytest.mark.parametrize("digests", [(True, True), (True, False), (False, True)])
def test_the_checksum_goes_with_its_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digests: tuple[bool, bool], can_link: bool
) -> None:
    """Also where files must be copied, since they cannot be linked."""
    if not can_link:
        monkeypatch.setattr(os, "link", no_space)
    for number, (score, sidecar) in enumerate(zip((0.7, 0.9), digests, strict=True)):
        keep(tmp_path, number, score, sidecar=sidecar)
        assert content(tmp_path) == f"teacher of {number}"
        kept = tmp_path / "eval" / "best" / "teacher_checkpoint.pth.sha256"
        assert kept.exists() is sidecar, "never that of the former teacher"
        assert not sidecar or kept.read_text() == f"digest of {number}"


@pytest.mark.parametrize("crash_at", range(3))
def test_a_crash_leaves_no_record_and_no_checksum_of_another_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash_at: int
) -> None:
    """The crash comes before the teacher, its checksum, or the record is in its place."""
    keep(tmp_path, 9, 0.7)
    real, calls = os.replace, iter(range(10))

    def crash(source: Any, target: Any) -> None:
        if next(calls) == crash_at:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            keep(tmp_path, 19, 0.9)
    best = tmp_path / "eval" / "best"
    assert read_best(best) is None
    digest = best / "teacher_checkpoint.pth.sha256"
    assert not digest.exists() or digest.read_text().split()[-1] == content(tmp_path).split()[-1]
    keep(tmp_path, 19, 0.5)
    assert content(tmp_path) == "teacher of 19"


def test_another_metric_starts_anew(tmp_path: Path) -> None:
    keep(tmp_path, 9, 0.9)
    best = keep(tmp_path, 19, 0.4, metric="image_accuracy")
    assert best is not None
    assert (best.iteration, best.metric, best.score) == (19, "image_accuracy", 0.6)


def test_what_a_run_that_starts_again_made_void_is_forgotten(tmp_path: Path) -> None:
    keep(tmp_path, 19, 0.9, sidecar=False)
    (tmp_path / "metrics.jsonl").touch()
    for start, known in ((20, True), (19, False)):
        monitors(tmp_path, start=start).begin()
        assert (read_best(tmp_path / "eval" / "best") is not None) is known
    keep(tmp_path, 9, 0.5)
    assert content(tmp_path) == "teacher of 9"


def keep_recorded(run: Path, *scores: float, metric: str = "") -> None:
    """Evaluations after iterations 9, 19, …, with their lines in the run's metrics file."""
    with MetricsFile(run / "metrics.jsonl") as file:
        for number, score in enumerate(scores):
            keep(run, 10 * number + 9, score, metric=metric, sidecar=False)
            metrics = {"knn_part_auroc_k10": score, "knn_image_accuracy_k10": 1 - score}
            file.append({"iteration": 10 * number + 9, "evaluation": metrics})


def damage_best(best: Path, kind: str) -> None:
    """A fault of ``best.json``, or of the teacher beside it."""
    record = best / "best.json"
    text = record.read_text()
    match kind:
        case "missing":
            record.unlink()
        case "cut":
            record.write_text(text[:40])
        case "another score":
            record.write_text(text.replace("0.9", "0.1"))
        case "another iteration":
            record.write_text(text.replace('"iteration": 19', '"iteration": 18'))
        case "another metric":
            record.write_text(text.replace("part_auroc", "part_aurnc"))
        case "deep":
            record.write_text("[" * 100_000)
        case "teacher missing":
            (best / "teacher_checkpoint.pth").unlink()
        case _:
            record.write_text(kind)


FAULTS_OF_BEST = [
    *("", "{", "[]", '{"iteration": 3}', '{"iteration": "x", "metric": "m"}', "\0" * 99, "deep", "missing", "cut"),
    *("another score", "another iteration", "another metric", "teacher missing"),
]


@pytest.mark.parametrize("at_start", [True, False])
@pytest.mark.parametrize("damage", FAULTS_OF_BEST)
def test_no_worse_teacher_becomes_the_best_because_its_record_is_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str, at_start: bool
) -> None:
    keep_recorded(tmp_path, 0.7, 0.9, 0.8)
    best = tmp_path / "eval" / "best"
    damage_best(best, damage)
    if at_start:
        monitors(tmp_path, start=30).begin()
        assert read_best(best) == BestTeacher(19, "part_auroc", 0.9, "eval/training_19/teacher_checkpoint.pth")
    elif damage.startswith(("another", "teacher")):
        return  # is found at the start of a run, which is when files are not the run's own work of minutes ago
    keep(tmp_path, 39, 0.6, sidecar=False)
    assert content(tmp_path) == "teacher of 19"
    assert "The best teacher is found anew from metrics.jsonl" in caplog.text


def test_what_cannot_be_told_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The record, all lines of the metrics file, or the files of teachers are gone."""
    keep_recorded(tmp_path, 0.7, 0.9)
    (tmp_path / "eval" / "training_19" / "teacher_checkpoint.pth").unlink()
    damage_best(tmp_path / "eval" / "best", "cut")
    keep(tmp_path, 29, 0.6, sidecar=False)
    assert content(tmp_path) == "teacher of 9", "the best of those that are left"
    assert "training_19/teacher_checkpoint.pth is missing: it cannot be the best" in caplog.text
    (tmp_path / "metrics.jsonl").write_text("")
    damage_best(tmp_path / "eval" / "best", "cut")
    keep(tmp_path, 39, 0.5)
    assert content(tmp_path) == "teacher of 39"
    assert "which teacher was the best cannot be told" in caplog.text


@pytest.mark.parametrize("can_link", [True, False])
@pytest.mark.parametrize("room_for", range(4))
def test_a_disk_that_is_full_at_that_moment_leaves_the_former_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room_for: int, can_link: bool
) -> None:
    """Room for so many of the new files."""
    keep_recorded(tmp_path, 0.7)
    writes = iter(range(10))

    def full(real: Callable[..., Any]) -> Callable[..., Any]:
        def write(*arguments: Any) -> Any:
            if next(writes) >= room_for:
                no_space()
            return real(*arguments)

        return write

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full(os.fsync))
        patch.setattr(shutil, "copyfile", full(shutil.copyfile))
        patch.setattr(os, "link", full(os.link) if can_link else no_space)
        with contextlib.suppress(OSError):
            keep(tmp_path, 19, 0.9)
    best = read_best(tmp_path / "eval" / "best")
    assert best is not None
    assert content(tmp_path) == f"teacher of {best.iteration}"
    assert not list((tmp_path / "eval" / "best").glob("*.tmp*"))
    keep(tmp_path, 29, 0.6)
    assert content(tmp_path) == f"teacher of {best.iteration}"


def test_a_best_that_is_done_again_gives_way_to_the_one_before(tmp_path: Path) -> None:
    keep_recorded(tmp_path, 0.7, 0.9)
    monitors(tmp_path, start=15).begin()
    keep(tmp_path, 19, 0.5)
    assert content(tmp_path) == "teacher of 9"


def test_another_metric_is_looked_up_in_what_was_recorded(tmp_path: Path) -> None:
    keep_recorded(tmp_path, 0.2, 0.9)
    run = monitors(tmp_path, start=20)
    run.best_metric = "image_accuracy"
    run.begin()
    keep(tmp_path, 29, 0.5, metric="image_accuracy")
    assert content(tmp_path) == "teacher of 9"


def test_no_metrics_no_best_and_a_metric_that_is_missing_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert keep_best(tmp_path / "eval" / "best", teacher(tmp_path, 9), 9, {}) is None
    assert not caplog.records
    with caplog.at_level("WARNING", logger="dinov2"):
        assert keep(tmp_path, 9, 0.5, metric="part_top5") is None
    assert "best_metric=part_top5 names none of the metrics part_auroc_k10, image_accuracy_k10" in caplog.text
    assert not (tmp_path / "eval" / "best").exists()
