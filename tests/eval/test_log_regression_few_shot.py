import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval_stand_ins import Backbone, random_set
from log_regression_stand_ins import make_features

from dinov2.eval.features import Features, few_shot_subset
from dinov2.eval.log_regression import LogRegressionSettings, eval_log_regression, score_features

CLASSES = ("good", "defect")
FAST = LogRegressionSettings(cs=(1e-4, 1e-2, 1.0), num_resamples=20, n_tries=3)


def sets() -> tuple[Features, Features]:
    groups = [f"part {row // 2}" for row in range(60)]
    labels = [row // 2 % 2 for row in range(60)]
    return make_features(labels, groups, gap=0.5), make_features([0, 1] * 15, seed=1, gap=0.5)


def few_shot_fits(train: Features, val: Features, n: int, settings: LogRegressionSettings) -> dict[str, Any]:
    """What the results say of the fits to ``n`` images per class."""
    results, _ = score_features(train, val, CLASSES, replace(settings, n_per_class_list=(n,)))
    return results.extra["few_shot_fits"][f"n={n}"]


def test_every_try_is_a_fit_to_the_reference_subset() -> None:
    train, val = sets()
    settings = replace(FAST, n_per_class_list=(2, 6))
    results = score_features(train, val, CLASSES, settings)[0]
    assert list(results.scores) == ["n=2", "n=6"]
    for n in (2, 6):
        values = []
        for seed in range(3):
            subset = train.select(few_shot_subset(train.labels, n, seed))
            alone = score_features(subset, val, CLASSES, replace(settings, n_per_class_list=(-1,)))[0]
            values.append(alone.scores[alone.chosen].image.metrics["auroc"].value)
            assert results.extra["few_shot_fits"][f"n={n}"]["c"][seed] == alone.extra["c"]
        spread = results.extra["few_shot"][f"n={n}"]["image"]["auroc"]
        assert spread["values"] == values
        assert spread["mean"] == pytest.approx(np.mean(values))
        assert spread["std"] == pytest.approx(np.std(values, ddof=1))
        figure = results.scores[f"n={n}"].image.metrics["auroc"]
        assert (figure.value, figure.low) == (pytest.approx(np.mean(values)), None)


def test_subsets_of_one_seed_are_nested_as_in_the_reference(reference) -> None:
    values = reference("eval_fixture.pt")["knn"]
    for seed in (0, 1):
        small, large = (few_shot_subset(values["train_labels"], n, seed) for n in (1, 5))
        assert torch.equal(small, values["few_shot_indices"][f"n1_seed{seed}"])
        assert torch.equal(large, values["few_shot_indices"][f"n5_seed{seed}"])
        assert set(small.tolist()) < set(large.tolist())


def test_one_image_per_class_falls_back(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("dinov2"), "propagate", True)
    caplog.set_level(logging.INFO, logger="dinov2")
    train, val = sets()
    assert few_shot_fits(train, val, 1, replace(FAST, fallback_c=0.25)) == {
        "c": [0.25] * 3,
        "chosen_by": ["falling back, as fewer than two classes have a part to hold out"] * 3,
        "num_fits": 3,
        "num_not_converged": 0,
    }
    assert "few-shot n=1: C = 0.25, 0.25, 0.25 (by falling back" in caplog.text
    caplog.clear()
    assert all("held-out parts" in chosen_by for chosen_by in few_shot_fits(train, val, 6, FAST)["chosen_by"])
    assert "falling back" not in caplog.text


def test_parts_of_a_subset_stay_whole() -> None:
    """Both photos of the only defective part are drawn: it cannot be held out, though it has two photos."""
    train = make_features([0] * 6 + [1] * 2, [f"good {row}" for row in range(6)] + ["bad"] * 2)
    assert set(few_shot_fits(train, train, 2, FAST)["c"]) == {FAST.fallback_c}


def test_more_images_than_there_are_take_all() -> None:
    train, val = sets()
    everything = score_features(train, val, CLASSES, replace(FAST, n_per_class_list=(-1, 1000)))[0]
    whole = everything.scores[everything.chosen].image.metrics["auroc"].value
    assert everything.extra["few_shot"]["n=1000"]["image"]["auroc"]["values"] == pytest.approx([whole] * 3)


def test_without_all_labels_there_is_no_chosen_model(tmp_path: Path) -> None:
    train, val = random_set(40, 2, seed=0, name="train"), random_set(12, 2, seed=1, name="val")
    test = random_set(9, 2, seed=2, name="test")
    for numbers in ((-1, 2), (2,)):
        results = eval_log_regression(
            Backbone(),
            train,
            val,
            replace(FAST, n_per_class_list=numbers),
            test_datasets={"test": test},
            num_workers=0,
            output_dir=tmp_path,
        )
        assert bool(results.chosen) == (-1 in numbers)
        assert {"n=2", "n=2 on test"} <= set(results.scores)
        assert results.scores["n=2 on test"].image.count == 9
        for name in ("log_regression.npz", "predictions.csv"):
            assert (tmp_path / name).exists() == (-1 in numbers)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["settings"]["n_per_class_list"] == [2]
    assert "chosen_by" not in written["settings"]
