"""What raises warnings and what does not; real runs: a hundredfold learning rate is flagged, a healthy run is not."""

import json
from pathlib import Path
from typing import Any

import pytest
from train_stand_ins import make_small, run_command

from dinov2.data.prepare.demo_parts import make_demo_parts
from dinov2.train.monitors import SCORE_PATIENCE, TARGET_PATIENCE, CollapseDetector

WARMUP, TOTAL = 20, 200


def watch(num_scored: int = 10_000) -> CollapseDetector:
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


def see(watch: CollapseDetector, *records: dict[str, Any]) -> list[str]:
    """All warnings of some records that follow one another."""
    return [warning for record in records for warning in watch.check_training(record)]


def evaluations(watch: CollapseDetector, *figures: dict[str, float], first: int = -1) -> list[list[str]]:
    """Warnings of evaluations every 50 iterations, the first before the run."""
    return [watch.check_evaluation(first + 50 * number, values, None) for number, values in enumerate(figures)]


FEATURES = {
    "probe_cls_rank": 16.0, "probe_patch_rank": 70.0, "probe_cls_cosine": 0.6, "probe_patch_cosine": 0.6
}  # fmt: skip


def test_a_healthy_course_raises_nothing() -> None:
    # Class tokens are learnt late, the rank of the patches falls to 0.35: a run on solar cells.
    cls = [0.72, 0.5, 0.46, 0.39, 0.28, 0.18, 0.16, 0.13, 0.14, 0.14]
    patch = [1.17, 0.91, 0.95, 1.02, 1.1, 1.08, 1.08, 0.99, 1.05, 0.95]
    seen = watch()
    steps = zip(range(9, 200, 20), cls, patch, strict=True)
    assert see(seen, *(report(i, cls=c, patch=p, entropy=0.95) for i, c, p in steps)) == []
    ranks = zip((16.7, 10.8, 9.5, 8.5, 9.2, 10.1), (70.8, 61.9, 40.7, 30, 26.1, 24.7), strict=True)
    figures = [FEATURES | {"probe_cls_rank": c, "probe_patch_rank": p} for c, p in ranks]
    assert not any(evaluations(seen, *figures))


@pytest.mark.parametrize(
    ("entropy", "words"),
    [
        (0.99, r"COLLAPSE: teacher entropy at its maximum, the targets of class tokens are uniform"),
        (0.01, r"COLLAPSE: teacher entropy at zero, one prototype takes all class tokens"),
        (0.6, r"COLLAPSE: the teacher's targets of class tokens hardly depend on the image any more"),
    ],
)
def test_targets_that_fall_silent_are_named_once_per_episode(entropy: float, words: str) -> None:
    seen = watch()
    silent = {"cls": 0.004, "entropy": entropy}
    assert see(seen, report(9), report(19, **silent), report(29, **silent)) == []
    (warning,) = see(seen, *(report(i, **silent) for i in range(39, 100, 10)))
    assert warning.startswith(f"{words} (entropy {entropy:.3f} of log K, information 0.0040 nats, limit 0.03): try a ")
    assert see(seen, report(109), report(119, **silent), report(129), report(139, **silent), report(149)) == [], (
        "a single good report ends no episode"
    )
    assert see(seen, *(report(159 + 10 * i) for i in range(TARGET_PATIENCE))) == []
    assert len(see(seen, *(report(189 + 10 * i, **silent) for i in range(5)))) == 1, "the next episode"


def test_each_kind_has_its_limit() -> None:
    assert see(watch(), *(report(i, cls=0.05) for i in range(9, 200, 10))) == []
    (warning,) = see(watch(), *(report(i, patch=0.05 if i > 9 else 1.0) for i in range(9, 200, 10)))
    assert "targets of masked patches hardly depend on the image any more" in warning
    assert len(see(watch(), *(report(i, cls=0.02 if i > 9 else 0.2, patch=1.0) for i in range(9, 200, 10)))) == 1


def test_a_teacher_that_starts_near_uniform_has_not_collapsed() -> None:
    """As with LayerScale 1e-5: class tokens start equal and part slowly."""
    seen = watch()
    early = (report(i, cls=1e-6, patch=0.05, entropy=0.999, teacher_cosine=0.9999) for i in range(0, 99, 10))
    assert see(seen, *early) == []
    figures = [FEATURES | {"probe_cls_rank": 1.0, "probe_cls_cosine": cosine} for cosine in (0.99999, 0.9999, 0.998)]
    assert not any(evaluations(seen, *figures))


def test_a_run_that_learns_nothing_by_half_time_is_told() -> None:
    seen = watch()
    warnings = see(seen, *(report(i, cls=1e-4, patch=0.5) for i in range(9, 200, 10)))
    assert len(warnings) == 1
    assert warnings[0].startswith("NOT LEARNING: half of the run is over, and targets of class tokens have hardly")
    assert "information 0.0001 nats, limit 0.03): make crops easier to recognise" in warnings[0]
    (with_match,) = see(watch(), *(report(i, cls=1e-4, patch=0.5, crop_match=0.04) for i in range(9, 200, 10)))
    assert "limit 0.03; 4% of the images' global crops find each other in a batch): make crops" in with_match


def test_class_tokens_that_meet_are_named_by_report_and_by_evaluation() -> None:
    seen = watch()
    assert see(seen, report(29, teacher_cosine=0.7), *(report(i, teacher_cosine=0.998) for i in (39, 49))) == []
    (warning,) = see(seen, report(59, teacher_cosine=0.998))
    assert warning.startswith("COLLAPSE: class tokens of different images are nearly equal (mean cosine 0.998, lowest")
    assert "lowest before 0.700, limit 0.99)" in warning
    start, healthy, collapsed, still = evaluations(
        watch(), FEATURES, FEATURES, FEATURES | {"probe_cls_cosine": 0.998}, FEATURES | {"probe_cls_cosine": 0.999}
    )
    assert (start, healthy, still) == ([], [], [])
    assert collapsed[0].startswith("COLLAPSE: class tokens of different images are nearly equal (mean cosine 0.998")
    *_, flat = evaluations(watch(), FEATURES, FEATURES | {"probe_patch_cosine": 0.995})
    assert flat[0].startswith("COLLAPSE: the patches of an image are nearly equal (mean cosine 0.995")


def test_a_rank_that_falls_is_named_with_its_limit() -> None:
    *_, fallen = evaluations(watch(), FEATURES, FEATURES | {"probe_cls_rank": 2.1, "probe_patch_rank": 4.8})
    assert len(fallen) == 2
    assert fallen[0].startswith(
        "COLLAPSE: effective rank of the class tokens fell to 2.1 of 192 (highest 16.0, limit 5.3)"
    )
    assert fallen[1].startswith("COLLAPSE: effective rank of the patches fell to 4.8 of 192 (highest 70.0, limit 14.0)")
    # A large network: from 300 directions to 60 is compression, to 20 is not.
    large = FEATURES | {"probe_patch_rank": 300.0}
    assert not any(evaluations(watch(), large, large | {"probe_patch_rank": 60.0}))
    assert evaluations(watch(), large, large | {"probe_patch_rank": 20.0})[-1]


def test_features_are_not_judged_before_the_warm_up_is_over() -> None:
    fallen = FEATURES | {"probe_cls_rank": 2.1}
    seen = watch()
    assert seen.check_evaluation(-1, FEATURES, None) == []
    assert seen.check_evaluation(WARMUP - 1, fallen, None) == []
    assert len(seen.check_evaluation(WARMUP, fallen, None)) == 1


def scored(watch: CollapseDetector, *course: tuple[float, float]) -> list[str]:
    """Warnings of a course of loss and score."""
    warnings = []
    for number, (loss, score) in enumerate(course):
        warnings += watch.check_training(report(50 * number + 40, total_loss=loss))
        warnings += watch.check_evaluation(50 * number + 49, {}, ("part_auroc", score))
    return warnings


def test_overfitting_is_a_score_that_falls_while_the_loss_falls() -> None:
    falling = [(6.0, 0.7), (5.0, 0.9), (4.8, 0.8), (4.6, 0.8), (4.4, 0.78), (4.2, 0.7)]
    (warning,) = scored(watch(), *falling)
    assert warning.startswith(
        "OVERFITTING: probe k-NN falls while the loss falls (part_auroc 0.780, more than 0.030 below its best 0.900"
    )
    assert "loss 4.4, at the best 5" in warning
    assert scored(watch(), *falling[:-2]) == [], f"fewer than {SCORE_PATIENCE} in a row"
    assert scored(watch(), *((6.0 - loss, score) for loss, score in falling)) == [], "the loss rises"
    assert scored(watch(num_scored=10), *falling) == [], "ten parts say nothing so exactly"
    assert scored(watch(), (6, 0.7), (5, 0.9), (4.9, 0.8), (4.8, 0.89), (4.7, 0.8), (4.6, 0.8), (4.5, 0.88)) == []


def test_values_that_are_missing_or_null_are_passed_over() -> None:
    seen = watch()
    assert see(seen, {"iteration": 3}, report(9, cls=None, patch=None, total_loss=None, teacher_cosine=None)) == []
    assert seen.check_evaluation(49, {"probe_cls_rank": None, "probe_cls_cosine": float("nan")}, None) == []


@pytest.fixture(scope="module")
def plates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plates") / "set"
    make_demo_parts(folder, parts=24, photos=4, image_size=48)
    return folder


def warnings_of_a_run(plates: Path, output: Path, seed: int, base_lr: float, *pairs: str) -> list[tuple[int, str]]:
    """Iteration and text of the warnings of a run of 100 steps."""
    run_command(
        plates,
        output,
        "student.drop_path_rate=0",
        "student.layerscale=1.0",
        "dino.head_hidden_dim=64",
        "dino.head_bottleneck_dim=32",
        "train.batch_size_per_gpu=16",
        "train.OFFICIAL_EPOCH_LENGTH=10",
        "train.log_period=5",
        "train.saveckp_freq=10",
        f"train.seed={seed}",
        "optim.epochs=10",
        "optim.warmup_epochs=1",
        f"optim.base_lr={base_lr}",
        "optim.layerwise_decay=1.0",
        "optim.patch_embed_lr_mult=1.0",
        "teacher.momentum_teacher=0.97",
        "teacher.final_momentum_teacher=0.999",
        "teacher.teacher_temp=0.05",
        "teacher.warmup_teacher_temp_epochs=1",
        "evaluation.eval_period_iterations=25",
        *pairs,
    )
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    found = [(record["iteration"], text) for record in records for text in record.get("warnings", ())]
    log = (output / "log" / "log.txt").read_text()
    assert all(text in log for _, text in found)
    assert log.count("COLLAPSE: ") == sum(text.startswith("COLLAPSE") for _, text in found)
    return found


def check_runs(plates: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int, *pairs: str) -> None:
    make_small(monkeypatch)
    collapsed = warnings_of_a_run(plates, folder / "hot", seed, 0.4, *pairs)
    assert any(text.startswith("COLLAPSE") and iteration < 99 for iteration, text in collapsed)
    assert warnings_of_a_run(plates, folder / "healthy", seed, 0.004, *pairs) == []


def test_a_hundredfold_learning_rate_is_flagged_before_the_end_and_health_is_not(
    plates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_runs(plates, tmp_path, monkeypatch, 1)


@pytest.mark.slow
@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
@pytest.mark.parametrize("seed", [0, 2, 3, 4])
def test_so_it_is_with_other_seeds_and_both_ways_of_centring(
    plates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, centering: str
) -> None:
    check_runs(plates, tmp_path, monkeypatch, seed, f"train.centering={centering}")
