"""What k-NN has to beat is measured once, by the run itself, and compared on the same resamples."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from train_stand_ins import EVERY_TWO, Train, evaluation_pairs, records

from dinov2.eval.metrics.classification import classification_metrics, draw_parts, levels_of, score_parts
from dinov2.train import baselines
from dinov2.train.baselines import _gain, resample_metric


def test_a_gain_is_that_of_both_on_the_same_draws() -> None:
    """Against resamples that are built row by row."""
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(20) % 2, 2)
    groups = [f"part {number // 2}" for number in range(40)]
    scores = [np.clip(weight * labels + generator.uniform(0, 1, 40), 0.01, 1.99) / 2 for weight in (1.0, 0.3)]
    pairs = [np.stack([1 - row, row], axis=1) for row in scores]
    levels = [levels_of(pair, labels, groups) for pair in pairs]
    own, other = (resample_metric(rows["part"], "auroc") for rows in levels)
    assert own is not None
    assert other is not None
    parts = [score_parts(pair, labels, groups) for pair in pairs]
    gains = []
    for draw in draw_parts(20, baselines.NUM_RESAMPLES, 0):
        rows = np.repeat(np.arange(20), draw)
        first, second = (classification_metrics(one.probabilities[rows], one.labels[rows])["auroc"] for one in parts)
        gains.append(first - second)
    gain = _gain(own, other)
    assert gain["gain"] == own.value - other.value
    assert (gain["low"], gain["high"]) == pytest.approx(np.percentile(gains, (2.5, 97.5)).tolist())
    image = resample_metric(levels[0]["image"], "auroc")
    assert image is not None
    assert image.value == classification_metrics(pairs[0], labels)["auroc"]
    assert resample_metric(levels_of(pairs[0], np.zeros(40, dtype=np.int64), groups)["part"], "auroc") is None
    single = resample_metric(levels_of(pairs[0], labels, ["one"] * 40)["image"], "auroc")
    assert single is not None
    assert "low" not in _gain(single, single), "a single part"


def test_the_random_backbone_is_the_one_of_the_evaluators(
    train: Train, tmp_path: Path, parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose LayerScale keeps it from seeing anything would be beaten by everything."""
    backbones, real = [], baselines.evaluate_backbone
    monkeypatch.setattr(
        baselines, "evaluate_backbone", lambda *args, **options: backbones.append(args[1]) or real(*args, **options)
    )
    pairs = (*evaluation_pairs(parts), "student.layerscale=1e-5", "optim.epochs=1")
    assert train(tmp_path / "run", *pairs) == 0
    assert [name for backbone in backbones for name in backbone.state_dict() if "gamma" in name] == []
    assert len(backbones) == 1


@pytest.mark.parametrize(("name", "chance"), [("accuracy", 0.75), ("balanced_accuracy", 1 / 3)])
def test_naming_one_class_for_all_is_no_learning(name: str, chance: float) -> None:
    assert baselines._chance(np.array([0, 2, 2, 2]), 3, name) == chance


def compared(run: Path) -> list[dict[str, Any]]:
    return [one["evaluation"]["comparison"] for one in records(run) if "comparison" in one.get("evaluation", {})]


def test_a_run_compares_itself_and_measures_once(
    train: Train, tmp_path: Path, parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, real = [], baselines._predict_baselines
    monkeypatch.setattr(baselines, "_predict_baselines", lambda *args: measured.append(args) or real(*args))
    run, pairs = tmp_path / "run", (*evaluation_pairs(parts), EVERY_TWO, "evaluation.nb_knn=[1,3]")
    assert train(run, *pairs) == 0
    assert len(measured) == 1, "of three evaluations the first"
    found = compared(run)
    assert len(found) == 3
    for one in found:
        assert one["metric"] == "part_auroc"
        assert one["chance"] == 0.5
        assert one.get("too_few", "").endswith(" beside the most frequent class"), "there are few parts"
        assert one["random"]["gain"] == pytest.approx(one["score"] - one["random"]["score"])
        assert one["random"]["score"] == found[0]["random"]["score"]
        assert one["image_statistics"].keys() >= {"score", "gain"}
        assert "start" not in one
    log = (run / "log" / "log.txt").read_text().rpartition("Did it learn? ")
    assert "against a random backbone of the same shape" in log[2]
    assert len(log[2].splitlines()) < 20, "it is the end of the log"

    # Complete, it says so again; a damaged file, or other sets, are measured anew, to the same numbers.
    assert train(run, *pairs) == 0
    assert (run / "log" / "log.txt").read_text().count("Did it learn? ") == 2
    path = run / "eval" / "baselines.json"
    content = path.read_text()
    before = json.loads(content)["baselines"]
    path.write_text(content[:200])
    longer = (*pairs, "optim.epochs=3", "evaluation.eval_period_iterations=3")
    assert train(run, *longer) == 0
    assert len(measured) == 2
    assert json.loads(path.read_text())["baselines"] == before
    assert "baselines.json cannot be used, what k-NN has to beat is measured anew" in (run / "log/log.txt").read_text()


def test_weights_that_a_run_began_with_have_to_be_beaten_too(
    train: Train, tmp_path: Path, parts: Path, evaluated: Path
) -> None:
    weights = evaluated / "eval" / "training_5" / "teacher_checkpoint.pth"
    run = tmp_path / "run"
    pairs = (*evaluation_pairs(parts), f"student.pretrained_weights={weights}", "optim.lr=1e-12", "optim.epochs=1")
    assert train(run, *pairs) == 0
    (found,) = compared(run)
    assert found["start"]["score"] == pytest.approx(found["score"], abs=0.05)
    assert "the weights that it started from" in (run / "log" / "log.txt").read_text()


def test_without_labels_nothing_is_compared(whole: Path) -> None:
    assert not (whole / "eval" / "baselines.json").exists()
    assert "Did it learn? " in (whole / "log" / "log.txt").read_text()
