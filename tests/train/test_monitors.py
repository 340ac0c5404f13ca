"""What is watched during a run: its metrics, files, resumes, broken images; what raises warnings and what does not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from train_stand_ins import (
    EVERY_TWO,
    OPTIONS,
    Train,
    assert_identical,
    checkpoint,
    damaged,
    evaluation_pairs,
    evaluations,
    iterations,
    make_small,
    monitors,
    records,
    run_command,
    small_vit,
)

from dinov2.config import ConfigError, load_config
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.loaders import make_dataset
from dinov2.data.prepare.demo_parts import make_demo_parts
from dinov2.eval.features import make_eval_transform
from dinov2.eval.representation_measures import effective_rank, mean_cosine_similarity
from dinov2.models.pretrained import load_pretrained_backbone
from dinov2.train import train as loop
from dinov2.train.evaluation import check_best_metric
from dinov2.train.monitors import (
    PATCHES_PER_IMAGE,
    SCORE_PATIENCE,
    TARGET_PATIENCE,
    CollapseDetector,
    ProbeSet,
    feature_metrics,
    probe_features,
)
from dinov2.train.setup import open_evaluation
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.target_measures import TargetMeasures
from dinov2.utils.files import checksum_fault, sidecar

CPU = torch.device("cpu")
TARGETS = {
    f"{name}_{kind}"
    for name in ("teacher_entropy", "teacher_information", "kl", "prototypes_used", "prototypes_won")
    for kind in ("cls", "patch")
}
FEATURES = {f"probe_{name}" for name in ("cls_rank", "patch_rank", "cls_cosine", "patch_cosine", "patch_drift")}


def val(parts: Path) -> str:
    return f"GroupedJSON:split=VAL:root={parts}"


def test_every_record_has_its_measures(evaluated: Path) -> None:
    for record in records(evaluated):
        if "evaluation" not in record:
            assert record.keys() >= TARGETS | {"teacher_cosine"}
            for kind in ("cls", "patch"):
                assert 0 <= record[f"teacher_entropy_{kind}"] <= 1 + 1e-6
                assert record[f"teacher_information_{kind}"] >= -1e-6
                assert record[f"kl_{kind}"] >= -1e-6
                assert 1 / 64 <= record[f"prototypes_won_{kind}"] <= record[f"prototypes_used_{kind}"] + 1 <= 2
    found = evaluations(evaluated)
    assert found.keys() == {-1, 1, 3, 5}
    assert found[-1].keys() == FEATURES
    assert found[-1]["probe_patch_drift"] == 0
    for iteration in (1, 3, 5):
        assert found[iteration].keys() >= FEATURES | {"knn_part_auroc_k10"}
        assert found[iteration]["probe_patch_drift"] > 0


def test_monitors_and_evaluations_are_no_trace_in_the_run(
    train: Train, evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters, moments and random states are those of a run in which nothing is measured, bit for bit."""
    monkeypatch.setattr(TargetMeasures, "observe", lambda *_: None)
    train(tmp_path, "evaluation.probe_images=0")
    assert not evaluations(tmp_path)
    states = [checkpoint(folder) for folder in (evaluated, tmp_path)]
    for part in ("model", "optimizer", "random"):
        assert_identical(states[0][part], states[1][part])


def test_metrics_are_those_of_the_features(train: Train, tmp_path: Path, parts: Path) -> None:
    """The last metrics against the teacher's file, read back and run over the images of the probe set one by one."""
    probe = f"evaluation.probe_dataset_path={val(parts)}"
    train(tmp_path, probe, "evaluation.whole_image=true", "train.num_workers=1", "optim.epochs=1")
    backbone = small_vit(img_size=32, patch_size=8, init_values=0.1).eval()
    load_pretrained_backbone(backbone, tmp_path / "eval" / "training_2" / "teacher_checkpoint.pth")
    images = make_dataset(dataset_str=val(parts), transform=make_eval_transform(32, whole_image=True))
    with torch.no_grad():
        tokens = [backbone(images[index][0][None], is_training=True) for index in range(len(images))]
    cls = torch.cat([token["x_norm_clstoken"] for token in tokens])
    patches = torch.cat([token["x_norm_patchtokens"] for token in tokens])
    assert patches.shape[1] == 16 <= PATCHES_PER_IMAGE
    found = evaluations(tmp_path)[2]
    assert found["probe_cls_rank"] == pytest.approx(effective_rank(cls), rel=1e-4)
    assert found["probe_patch_rank"] == pytest.approx(effective_rank(patches.flatten(0, 1)), rel=1e-4)
    assert found["probe_cls_cosine"] == pytest.approx(mean_cosine_similarity(cls).item(), rel=1e-5)
    assert found["probe_patch_cosine"] == pytest.approx(mean_cosine_similarity(patches).mean().item(), rel=1e-4)


def test_probe_images_are_spread_evenly_and_large_images_give_some_of_their_patches(parts: Path) -> None:
    source = make_dataset(dataset_str=f"GroupedJSON:split=TRAIN:root={parts}")
    probe = ProbeSet(source, 4, make_eval_transform(64), (64, 64))
    assert len(source) == 14
    assert [probe.get_image_path(i) for i in range(4)] == [source.get_image_path(i) for i in (0, 3, 7, 10)]
    assert len(ProbeSet(source, 99, make_eval_transform(64), (64, 64))) == 14
    backbone = small_vit(img_size=64, patch_size=8)
    features = probe_features(backbone, probe, embed_dim=24, batch_size=3, num_workers=0, device=CPU)
    with torch.no_grad():
        tokens = backbone.eval()(probe[2][0][None], is_training=True)
    torch.testing.assert_close(features.cls[2], tokens["x_norm_clstoken"][0])
    torch.testing.assert_close(features.patches[2], tokens["x_norm_patchtokens"][0, ::2], msg="32 of 64")


def test_plain_images_are_watched_without_any_labels(train: Train, tmp_path: Path, parts: Path) -> None:
    shutil.copytree(parts, tmp_path / "images")
    shutil.rmtree(tmp_path / "images" / "annotations")
    train(tmp_path / "run", f"train.dataset_path=ImageFolder:root={tmp_path / 'images'}:labels=none", "optim.epochs=1")
    assert evaluations(tmp_path / "run")[2].keys() == FEATURES
    assert not (tmp_path / "run" / "eval" / "best").exists(), "which teacher is best takes labels"


def test_drift_counts_from_the_start_across_resumes(train: Train, half: Path, whole: Path) -> None:
    first = torch.load(half / "eval" / "probe_start.pth", weights_only=True)
    assert first.keys() == {"names", "readable", "similarities"}
    assert first["similarities"].shape == (14, 16, 16)
    train(half)
    assert list(evaluations(half)) == [-1, 5]
    assert evaluations(half) == evaluations(whole)


def test_a_damaged_first_measure_is_never_used(train: Train, half: Path, parts: Path) -> None:
    config = load_config(None, [*OPTIONS, f"train.dataset_path=GroupedJSON:split=TRAIN:root={parts}"])
    images = make_dataset(dataset_str=config.train.dataset_path)
    watching = monitors(half, start=3, probe=ProbeSet(images, 99, make_eval_transform(32), (32, 32)))
    path = half / "eval" / "probe_start.pth"
    content = path.read_bytes()
    assert watching._read_first().keys() == {"names", "readable", "similarities"}
    for other in damaged(content):
        path.write_bytes(other)
        assert watching._read_first() == {}
    path.write_bytes(content[:-900])
    sidecar(path).unlink()
    assert watching._read_first() == {}, "also as a file of a version that made no checksums"
    train(half)
    assert "probe_start.pth cannot be read" in (half / "log" / "log.txt").read_text()
    assert watching._read_first(), "it was written anew"


def test_without_the_first_measure_drift_counts_from_the_resume(train: Train, half: Path) -> None:
    (half / "eval" / "probe_start.pth").unlink()
    train(half)
    evaluated = [record for record in records(half) if "evaluation" in record]
    drifts = [(record["iteration"], record["evaluation"]["probe_patch_drift"]) for record in evaluated]
    assert [iteration for iteration, _ in drifts] == [-1, 2, 5]
    assert drifts[1] == (2, 0.0)
    assert "patch_drift counts from iteration 3" in (half / "log" / "log.txt").read_text()


def test_a_run_that_starts_anew_measures_its_start_anew(train: Train, half: Path) -> None:
    train(half, "--no-resume", "train.seed=1")
    assert list(evaluations(half)) == [-1, 5]
    assert [record["iteration"] for record in records(half)].count(-1) == 1


def test_an_image_that_cannot_be_read_is_left_out_and_kills_no_run(train: Train, tmp_path: Path, parts: Path) -> None:
    shutil.copytree(parts, tmp_path / "parts")
    images = sorted((tmp_path / "parts" / "val").rglob("*.jpeg"))
    images[1].write_bytes(b"no image")
    broken, clean = (f"evaluation.probe_dataset_path={val(folder)}" for folder in (tmp_path / "parts", parts))
    train(tmp_path / "broken", broken, "optim.epochs=1")
    train(tmp_path / "clean", clean, "optim.epochs=1")
    found, expected = evaluations(tmp_path / "broken")[2], evaluations(tmp_path / "clean")[2]
    assert found.keys() == expected.keys()
    assert all(found[name] == pytest.approx(expected[name], rel=0.5) for name in FEATURES)
    assert found["probe_cls_rank"] != expected["probe_cls_rank"]
    for image in images:
        image.unlink()
    train(tmp_path / "none", broken, "optim.epochs=1")
    assert not evaluations(tmp_path / "none")
    assert "0 of its images can be read" in (tmp_path / "none" / "log" / "log.txt").read_text()


def test_a_labelled_image_that_cannot_be_read_costs_the_scores_and_not_the_run(
    train: Train, tmp_path: Path, parts: Path
) -> None:
    shutil.copytree(parts, tmp_path / "parts")
    broken = sorted((tmp_path / "parts" / "val").rglob("*.jpeg"))[1]
    broken.write_bytes(b"no image")
    assert train(tmp_path / "run", *evaluation_pairs(tmp_path / "parts"), EVERY_TWO, "optim.epochs=1") == 0
    found = evaluations(tmp_path / "run")
    assert not any(name.startswith("knn") for metrics in found.values() for name in metrics)
    assert found[2].keys() >= {"probe_cls_rank"}
    log = (tmp_path / "run" / "log" / "log.txt").read_text()
    assert log.count("THE TEACHER IS NOT EVALUATED by k-NN, training goes on") == 2
    assert str(broken) in log


def test_features_that_are_not_finite_are_told_and_kill_no_run(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = SSLMetaArch.train

    def poison(self: SSLMetaArch, mode: bool = True) -> SSLMetaArch:
        self.teacher["backbone"].norm.register_forward_hook(lambda module, inputs, output: output * float("nan"))
        return real(self, mode)

    with monkeypatch.context() as patch:
        patch.setattr(SSLMetaArch, "train", poison)
        patch.setattr(loop, "agree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path)
    log = (tmp_path / "log" / "log.txt").read_text()
    assert "the probe set could not be measured: features of 14 of 14 images are NaN" in log


def test_the_best_teacher_is_kept_and_outlives_a_resume(train: Train, tmp_path: Path, parts: Path) -> None:
    pairs = (*evaluation_pairs(parts), "evaluation.eval_period_iterations=1", "evaluation.nb_knn=[1,3]")
    metric = "evaluation.best_metric=image_accuracy_k3"
    train(tmp_path, *pairs, metric, "optim.epochs=1")
    train(tmp_path, *pairs, metric)
    scores = {i: found["knn_image_accuracy_k3"] for i, found in evaluations(tmp_path).items() if i >= 0}
    best = json.loads((tmp_path / "eval" / "best" / "best.json").read_text())
    assert best["score"] == max(scores.values())
    equal = [i for i, score in scores.items() if score == best["score"]]
    alike = [i for i in equal if evaluations(tmp_path)[i] == evaluations(tmp_path)[best["iteration"]]]
    assert best["iteration"] == max(alike), "of equal ones the last, which has learnt most"
    kept, source = (tmp_path / name for name in ("eval/best/teacher_checkpoint.pth", best["teacher"]))
    assert kept.read_bytes() == source.read_bytes()
    assert checksum_fault(kept) == checksum_fault(source) == ""


def test_warnings_stand_in_log_and_metrics_and_are_not_raised_again_by_a_resume(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, bool]] = []
    real = CollapseDetector.check_training

    def check(self: CollapseDetector, record: dict[str, Any]) -> list[str]:
        real(self, record)
        return self._warn("always", 2, f"COLLAPSE: in a test ({record['iteration']})")

    monkeypatch.setattr(CollapseDetector, "check_training", check)
    monkeypatch.setattr(
        CollapseDetector, "check_evaluation", lambda self, i, metrics, score: seen.append((i, bool(metrics))) or []
    )
    train(tmp_path, EVERY_TWO, "optim.epochs=1")
    assert seen == [(-1, True), (1, True), (2, True)]
    seen.clear()
    train(tmp_path, EVERY_TWO)
    assert seen == [(-1, True), (1, True), (2, True), (3, True), (5, True)], "the first three are replayed"
    warned = {record["iteration"]: record["warnings"] for record in records(tmp_path) if "warnings" in record}
    assert warned == {1: ["COLLAPSE: in a test (1)"]}
    assert (tmp_path / "log" / "log.txt").read_text().count("COLLAPSE: in a test") == 1
    assert iterations(tmp_path) == list(range(6))


@pytest.mark.parametrize("metric", ["auroc", "part", "part_f1", "part_auroc_k", "part_auroc_10", "whole_auroc"])
def test_metrics_that_do_not_exist_are_refused(metric: str) -> None:
    with pytest.raises(ConfigError, match="such as part_auroc or image_accuracy_k10"):
        check_best_metric(metric)
    for right in ("part_auroc", "image_balanced_accuracy_k20", ""):
        check_best_metric(right)


def probe_of(images: ImageDataset, *pairs: str) -> ProbeSet | None:
    return open_evaluation(load_config(None, [*OPTIONS, *pairs]), images)[1]


def test_one_image_cannot_be_compared(parts: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = make_dataset(dataset_str=val(parts))
    with caplog.at_level("WARNING", logger="dinov2"):
        assert probe_of(images, "evaluation.probe_images=1") is None
    assert "takes two images at least" in caplog.text
    caplog.clear()
    assert probe_of(images, "evaluation.probe_images=0") is None
    assert not caplog.records
    probe = probe_of(images, "crops.global_crops_size=[32,48]")
    assert probe is not None
    assert probe[0][0].shape == (3, 32, 48)


def test_one_patch_has_no_similarities() -> None:
    cls, patches = torch.randn(5, 8), torch.randn(5, 1, 8)
    similarities: Tensor = torch.ones(5, 1, 1)
    assert feature_metrics(cls, patches, similarities, similarities).keys() == {
        "probe_cls_rank", "probe_patch_rank", "probe_cls_cosine"
    }  # fmt: skip


WARMUP, TOTAL = 20, 200


def new_detector(num_scored: int = 10_000) -> CollapseDetector:
    return CollapseDetector(WARMUP, TOTAL, embed_dim=192, num_scored=num_scored)


def report(
    iteration: int, *, cls: float = 0.4, patch: float = 1.2, entropy: float = 0.6, **more: Any
) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "total_loss": 5.0,
        "teacher_information_cls": cls,
        "teacher_information_patch": patch,
        "teacher_entropy_cls": entropy,
        "teacher_entropy_patch": entropy,
        "teacher_cosine": 0.4,
        **more,
    }


def check_reports(detector: CollapseDetector, *records: dict[str, Any]) -> list[str]:
    """All warnings of some records that follow one another."""
    return [warning for record in records for warning in detector.check_training(record)]


def check_evaluations(detector: CollapseDetector, *metrics: dict[str, float], first: int = -1) -> list[list[str]]:
    """Warnings of evaluations every 50 iterations, the first before the run."""
    return [detector.check_evaluation(first + 50 * number, values, None) for number, values in enumerate(metrics)]


HEALTHY = {
    "probe_cls_rank": 16.0, "probe_patch_rank": 70.0, "probe_cls_cosine": 0.6, "probe_patch_cosine": 0.6
}  # fmt: skip


def test_a_healthy_course_raises_nothing() -> None:
    # Class tokens are learnt late, the rank of the patches falls to 0.35: a run on solar cells.
    cls = [0.72, 0.5, 0.46, 0.39, 0.28, 0.18, 0.16, 0.13, 0.14, 0.14]
    patch = [1.17, 0.91, 0.95, 1.02, 1.1, 1.08, 1.08, 0.99, 1.05, 0.95]
    detector = new_detector()
    steps = zip(range(9, 200, 20), cls, patch, strict=True)
    assert check_reports(detector, *(report(i, cls=c, patch=p, entropy=0.95) for i, c, p in steps)) == []
    ranks = zip((16.7, 10.8, 9.5, 8.5, 9.2, 10.1), (70.8, 61.9, 40.7, 30, 26.1, 24.7), strict=True)
    metrics = [HEALTHY | {"probe_cls_rank": c, "probe_patch_rank": p} for c, p in ranks]
    assert not any(check_evaluations(detector, *metrics))


@pytest.mark.parametrize(
    ("entropy", "words"),
    [
        (0.99, r"COLLAPSE: teacher entropy at its maximum, the targets of class tokens are uniform"),
        (0.01, r"COLLAPSE: teacher entropy at zero, one prototype takes all class tokens"),
        (0.6, r"COLLAPSE: the teacher's targets of class tokens hardly depend on the image any more"),
    ],
)
def test_targets_that_fall_silent_are_named_once_per_episode(entropy: float, words: str) -> None:
    detector = new_detector()
    silent = {"cls": 0.004, "entropy": entropy}
    assert check_reports(detector, report(9), report(19, **silent), report(29, **silent)) == []
    (warning,) = check_reports(detector, *(report(i, **silent) for i in range(39, 100, 10)))
    assert warning.startswith(f"{words} (entropy {entropy:.3f} of log K, information 0.0040 nats, limit 0.03): try a ")
    assert (
        check_reports(detector, report(109), report(119, **silent), report(129), report(139, **silent), report(149))
        == []
    ), "a single good report ends no episode"
    assert check_reports(detector, *(report(159 + 10 * i) for i in range(TARGET_PATIENCE))) == []
    assert len(check_reports(detector, *(report(189 + 10 * i, **silent) for i in range(5)))) == 1, "the next episode"


def test_each_kind_has_its_limit() -> None:
    assert check_reports(new_detector(), *(report(i, cls=0.05) for i in range(9, 200, 10))) == []
    (warning,) = check_reports(new_detector(), *(report(i, patch=0.05 if i > 9 else 1.0) for i in range(9, 200, 10)))
    assert "targets of masked patches hardly depend on the image any more" in warning
    assert (
        len(
            check_reports(
                new_detector(), *(report(i, cls=0.02 if i > 9 else 0.2, patch=1.0) for i in range(9, 200, 10))
            )
        )
        == 1
    )


def test_a_teacher_that_starts_near_uniform_has_not_collapsed() -> None:
    """As with LayerScale 1e-5: class tokens start equal and part slowly."""
    detector = new_detector()
    early = (report(i, cls=1e-6, patch=0.05, entropy=0.999, teacher_cosine=0.9999) for i in range(0, 99, 10))
    assert check_reports(detector, *early) == []
    metrics = [HEALTHY | {"probe_cls_rank": 1.0, "probe_cls_cosine": cosine} for cosine in (0.99999, 0.9999, 0.998)]
    assert not any(check_evaluations(detector, *metrics))


def test_a_run_that_learns_nothing_by_half_time_is_told() -> None:
    detector = new_detector()
    warnings = check_reports(detector, *(report(i, cls=1e-4, patch=0.5) for i in range(9, 200, 10)))
    assert len(warnings) == 1
    assert warnings[0].startswith("NOT LEARNING: half of the run is over, and targets of class tokens have hardly")
    assert "information 0.0001 nats, limit 0.03): make crops easier to recognise" in warnings[0]
    (with_match,) = check_reports(
        new_detector(), *(report(i, cls=1e-4, patch=0.5, crop_match=0.04) for i in range(9, 200, 10))
    )
    assert "limit 0.03; 4% of the images' global crops find each other in a batch): make crops" in with_match


def test_class_tokens_that_meet_are_named_by_report_and_by_evaluation() -> None:
    detector = new_detector()
    assert (
        check_reports(detector, report(29, teacher_cosine=0.7), *(report(i, teacher_cosine=0.998) for i in (39, 49)))
        == []
    )
    (warning,) = check_reports(detector, report(59, teacher_cosine=0.998))
    assert warning.startswith("COLLAPSE: class tokens of different images are nearly equal (mean cosine 0.998, lowest")
    assert "lowest before 0.700, limit 0.99)" in warning
    meeting = [HEALTHY | {"probe_cls_cosine": cosine} for cosine in (0.998, 0.999)]
    start, healthy, collapsed, still = check_evaluations(new_detector(), HEALTHY, HEALTHY, *meeting)
    assert (start, healthy, still) == ([], [], [])
    assert collapsed[0].startswith("COLLAPSE: class tokens of different images are nearly equal (mean cosine 0.998")
    *_, flat = check_evaluations(new_detector(), HEALTHY, HEALTHY | {"probe_patch_cosine": 0.995})
    assert flat[0].startswith("COLLAPSE: the patches of an image are nearly equal (mean cosine 0.995")


def test_a_rank_that_falls_is_named_with_its_limit() -> None:
    *_, fallen = check_evaluations(new_detector(), HEALTHY, HEALTHY | {"probe_cls_rank": 2.1, "probe_patch_rank": 4.8})
    assert len(fallen) == 2
    assert fallen[0].startswith(
        "COLLAPSE: effective rank of the class tokens fell to 2.1 of 192 (highest 16.0, limit 5.3)"
    )
    assert fallen[1].startswith("COLLAPSE: effective rank of the patches fell to 4.8 of 192 (highest 70.0, limit 14.0)")
    # A large network: from 300 directions to 60 is compression, to 20 is not.
    large = HEALTHY | {"probe_patch_rank": 300.0}
    assert not any(check_evaluations(new_detector(), large, large | {"probe_patch_rank": 60.0}))
    assert check_evaluations(new_detector(), large, large | {"probe_patch_rank": 20.0})[-1]


def test_features_are_not_judged_before_the_warm_up_is_over() -> None:
    fallen = HEALTHY | {"probe_cls_rank": 2.1}
    detector = new_detector()
    assert detector.check_evaluation(-1, HEALTHY, None) == []
    assert detector.check_evaluation(WARMUP - 1, fallen, None) == []
    assert len(detector.check_evaluation(WARMUP, fallen, None)) == 1


def scored(detector: CollapseDetector, *course: tuple[float, float]) -> list[str]:
    """Warnings of a course of loss and score."""
    warnings = []
    for number, (loss, score) in enumerate(course):
        warnings += detector.check_training(report(50 * number + 40, total_loss=loss))
        warnings += detector.check_evaluation(50 * number + 49, {}, ("part_auroc", score))
    return warnings


def test_overfitting_is_a_score_that_falls_while_the_loss_falls() -> None:
    falling = [(6.0, 0.7), (5.0, 0.9), (4.8, 0.8), (4.6, 0.8), (4.4, 0.78), (4.2, 0.7)]
    (warning,) = scored(new_detector(), *falling)
    assert warning.startswith(
        "OVERFITTING: probe k-NN falls while the loss falls (part_auroc 0.780, more than 0.030 below its best 0.900"
    )
    assert "loss 4.4, at the best 5" in warning
    assert scored(new_detector(), *falling[:-2]) == [], f"fewer than {SCORE_PATIENCE} in a row"
    assert scored(new_detector(), *((6.0 - loss, score) for loss, score in falling)) == [], "the loss rises"
    assert scored(new_detector(num_scored=10), *falling) == [], "ten parts say nothing so exactly"
    assert (
        scored(new_detector(), (6, 0.7), (5, 0.9), (4.9, 0.8), (4.8, 0.89), (4.7, 0.8), (4.6, 0.8), (4.5, 0.88)) == []
    )


def test_values_that_are_missing_or_null_are_passed_over() -> None:
    detector = new_detector()
    assert (
        check_reports(detector, {"iteration": 3}, report(9, cls=None, patch=None, total_loss=None, teacher_cosine=None))
        == []
    )
    assert detector.check_evaluation(49, {"probe_cls_rank": None, "probe_cls_cosine": float("nan")}, None) == []


@pytest.fixture(scope="module")
def plates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plates") / "set"
    make_demo_parts(folder, parts=24, photos=4, image_size=48)
    return folder


RECIPE = (
    *("student.drop_path_rate=0", "student.layerscale=1.0", "dino.head_hidden_dim=64", "dino.head_bottleneck_dim=32"),
    *("train.batch_size_per_gpu=16", "train.OFFICIAL_EPOCH_LENGTH=10", "train.log_period=5", "train.saveckp_freq=10"),
    *("optim.epochs=10", "optim.warmup_epochs=1", "optim.layerwise_decay=1.0", "optim.patch_embed_lr_mult=1.0"),
    *("teacher.momentum_teacher=0.97", "teacher.final_momentum_teacher=0.999", "teacher.teacher_temp=0.05"),
    *("teacher.warmup_teacher_temp_epochs=1", "evaluation.eval_period_iterations=25"),
)


def warnings_of_a_run(plates: Path, output: Path, seed: int, base_lr: float, *pairs: str) -> list[tuple[int, str]]:
    """Iteration and text of the warnings of a run of 100 steps."""
    run_command(plates, output, *RECIPE, f"train.seed={seed}", f"optim.base_lr={base_lr}", *pairs)
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    found = [(record["iteration"], text) for record in records for text in record.get("warnings", ())]
    log = (output / "log" / "log.txt").read_text()
    assert all(text in log for _, text in found)
    assert log.count("COLLAPSE: ") == sum(text.startswith("COLLAPSE") for _, text in found)
    return found


@pytest.mark.parametrize(
    ("seed", "centering"),
    [
        (1, "centering"),
        *(
            pytest.param(seed, name, marks=pytest.mark.slow)
            for seed, name in ((0, "centering"), (2, "sinkhorn_knopp"), (3, "sinkhorn_knopp"), (4, "centering"))
        ),
    ],
)
def test_a_hundredfold_learning_rate_is_flagged_before_the_end_and_health_is_not(
    plates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, centering: str
) -> None:
    make_small(monkeypatch)
    pair = f"train.centering={centering}"
    collapsed = warnings_of_a_run(plates, tmp_path / "hot", seed, 0.4, pair)
    assert any(text.startswith("COLLAPSE") and iteration < 99 for iteration, text in collapsed)
    assert warnings_of_a_run(plates, tmp_path / "healthy", seed, 0.004, pair) == []
