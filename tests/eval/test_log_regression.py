"""The whole logistic regression on small sets, with all labels and with a few."""

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval_stand_ins import Backbone, MemoryDataset, make_features, random_set
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler

from dinov2.eval.features import Features, extract_features, few_shot_subset
from dinov2.eval.log_regression import LogRegressionSettings, eval_log_regression, score_features
from dinov2.eval.log_regression_model import load_log_regression
from dinov2.eval.results import EvaluationResults

CLASSES = ("good", "defect")
FAST = LogRegressionSettings(cs=(1e-4, 1e-2, 1.0), num_resamples=20)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("dinov2"), "propagate", True)
    caplog.set_level(logging.INFO, logger="dinov2")
    return caplog


def random_sets(num_classes: int = 2) -> tuple[MemoryDataset, MemoryDataset, MemoryDataset]:
    return (
        random_set(48, num_classes, seed=0, photos_per_part=2, name="train"),
        random_set(20, num_classes, seed=1, photos_per_part=2, name="val"),
        random_set(14, num_classes, seed=2, photos_per_part=2, name="test"),
    )


@pytest.mark.parametrize(("num_classes", "class_weighting"), [(2, "balanced"), (3, "none")])
def test_evaluation_equals_a_plain_pipeline_on_the_features(
    num_classes: int, class_weighting: str, tmp_path: Path
) -> None:
    train, val, test = random_sets(num_classes)
    backbone = Backbone()
    results = eval_log_regression(
        backbone,
        train,
        val,
        replace(FAST, cs=(0.1,), class_weighting=class_weighting),
        test_datasets={"test": test},
        num_workers=0,
        output_dir=tmp_path,
        weights="",
        settings={"image_size": [4, 4]},
    )
    assert (results.evaluator, results.chosen) == ("log_regression", "C=0.1")
    assert list(results.scores) == ["C=0.1", "C=0.1 on test"]
    features = [
        extract_features(backbone, dataset, num_workers=0).embeddings.double() for dataset in (train, val, test)
    ]
    weight = None if class_weighting == "none" else class_weighting
    fit = LogisticRegression(C=0.1, class_weight=weight, max_iter=1000)
    plain = make_pipeline(Normalizer(), StandardScaler(), fit)
    plain.fit(features[0], train.get_targets())
    assert results.predictions is not None
    np.testing.assert_allclose(results.predictions.probabilities, plain.predict_proba(features[1]), atol=1e-6)
    for name, dataset, rows in (("C=0.1", val, features[1]), ("C=0.1 on test", test, features[2])):
        figures = results.scores[name].image.metrics
        assert figures["accuracy"].value == pytest.approx(plain.score(rows, dataset.get_targets()))
        if num_classes == 2:
            expected = roc_auc_score(dataset.get_targets(), plain.predict_proba(rows)[:, 1])
            assert figures["auroc"].value == pytest.approx(expected)
        assert figures["accuracy"].low is not None
        assert results.scores[name].part.count == len(dataset) // 2
    loaded = load_log_regression(tmp_path / "log_regression.npz")
    embeddings = extract_features(backbone, val, num_workers=0).embeddings.numpy()
    np.testing.assert_array_equal(loaded.probabilities(embeddings), results.predictions.probabilities)
    assert loaded.classes == results.classes
    written = json.loads((tmp_path / "results.json").read_text())
    assert EvaluationResults.from_dict(written).as_dict() == results.as_dict()
    assert written["settings"]["image_size"] == [4, 4]
    assert written["settings"]["features"] == "cls"
    assert written["settings"]["chosen_by"] == "being the only one"
    assert written["settings"]["class_weighting"] == class_weighting
    assert (written["extra"]["choice_of_c"]["repeats"], written["extra"]["choice_of_c"]["candidates"]) == (0, [])
    assert list(written["datasets"]) == ["train", "val", "test"]
    assert written["weights"] == {"path": "", "random": True}
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 21
    assert len((tmp_path / "predictions_test.csv").read_text().splitlines()) == 15


def test_one_seed_gives_the_same_bits(tmp_path: Path) -> None:
    train, val, _ = random_sets()
    few = replace(FAST, n_per_class_list=(-1, 4), n_tries=2)
    for name, seed in (("first", 0), ("second", 0), ("other", 1)):
        np.random.seed(len(name))  # noqa: NPY002 - the global generators must not matter
        torch.manual_seed(len(name))
        settings = replace(few, seed=seed)
        eval_log_regression(Backbone(), train, val, settings, num_workers=0, output_dir=tmp_path / name)
    files = ("results.json", "predictions.csv", "log_regression.npz")
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    first, other = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("first", "other"))
    assert first["extra"]["choice_of_c"] != other["extra"]["choice_of_c"]


def test_the_evaluated_sets_do_not_reach_the_fit(tmp_path: Path) -> None:
    train, val, test = random_sets()
    permuted = MemoryDataset(val.colours[::-1], val.labels[3:] + val.labels[:3], val.groups, val.classes, name="val")
    models, written = [], []
    for evaluated, tests in ((val, {}), (permuted, {}), (val, {"test": test})):
        sets = {"test_datasets": tests, "num_workers": 0, "output_dir": tmp_path}
        written.append(eval_log_regression(Backbone(), train, evaluated, FAST, **sets).as_dict())
        models.append((tmp_path / "log_regression.npz").read_bytes())
    assert models[0] == models[1] == models[2]
    choices = [results["extra"]["choice_of_c"] for results in written]
    assert choices[0] == choices[1] == choices[2]
    assert written[0]["scores"] != written[1]["scores"]


def test_two_classes_of_three_images() -> None:
    train, val = make_features([0, 0, 0, 1, 1, 1], gap=5), make_features([0, 1, 0, 1, 1, 1], seed=1, gap=5)
    results = score_features(train, val, CLASSES, FAST)[0]
    scores = results.scores[results.chosen]
    assert scores.image.metrics["accuracy"].value == scores.part.metrics["auroc"].value == 1.0
    assert results.settings["chosen_by"] == "auroc on held-out parts of the training set, 5 times"


def test_one_class_only() -> None:
    message = "logistic regression needs training images of at least two classes, found only 'defect'"
    good = MemoryDataset([(0, 0, 0)] * 3, [1, 1, 1], classes=CLASSES)
    unreadable = MemoryDataset([(0, 0, 0)], [0], classes=CLASSES, unreadable=frozenset({0}))
    with pytest.raises(ValueError, match=message):  # before anything is read or computed
        eval_log_regression(Backbone(), good, unreadable)


def test_a_class_that_is_absent_from_val() -> None:
    train = make_features([0, 0, 0, 1, 1, 1, 2, 2, 2], gap=5)
    val = make_features([0, 2, 2], seed=1, gap=5)
    scores = score_features(train, val, ("a", "b", "c"), FAST)[0].scores
    assert next(iter(scores.values())).image.metrics["balanced_accuracy"].value == 1.0
    only_good = score_features(make_features([0] * 4 + [1] * 4), make_features([0, 0], seed=1), CLASSES, FAST)[0]
    figures = only_good.scores[only_good.chosen].image.metrics
    assert "auroc" not in figures
    assert "accuracy" in figures


def test_a_class_that_is_absent_from_train(log: pytest.LogCaptureFixture) -> None:
    train, val = make_features([0, 0, 2, 2], gap=5), make_features([0, 1, 2], seed=1, gap=5)
    results = score_features(train, val, ("a", "b", "c"), FAST)[0]
    assert results.scores[results.chosen].image.metrics["accuracy"].value == pytest.approx(2 / 3)
    assert results.predictions is not None
    assert results.predictions.probabilities[:, 1].sum() == 0
    assert "no training image shows b: it will never be predicted" in log.text


def test_a_class_of_one_part() -> None:
    train = make_features([0] * 12 + [1] * 3, [f"good {row}" for row in range(12)] + ["bad"] * 3, gap=5)
    val = make_features([0, 1] * 5, seed=1, gap=5)
    results = score_features(train, val, CLASSES, replace(FAST, fallback_c=0.5))[0]
    assert results.chosen == "C=0.5"
    assert results.settings["chosen_by"] == "falling back, as fewer than two classes have a part to hold out"
    assert results.scores[results.chosen].image.metrics["auroc"].value == 1.0
    three = make_features([0] * 6 + [1] * 6 + [2] * 3, [str(row) for row in range(12)] + ["bad"] * 3, gap=5)
    judged = make_features([0, 1, 2] * 5, seed=1, gap=5)
    results = score_features(three, judged, ("a", "b", "c"), FAST)[0]
    assert results.settings["chosen_by"] == "log_loss on held-out parts of the training set, 5 times"
    assert results.scores[results.chosen].image.metrics["accuracy"].value == 1.0


@pytest.mark.parametrize("name", ["training", "validation", "line 2"])
def test_features_that_are_not_finite(name: str) -> None:
    sets = {set_name: make_features([0, 0, 1, 1]) for set_name in ("training", "validation", "line 2")}
    sets[name].embeddings[2, 3] = float("nan")
    with pytest.raises(ValueError, match=re.escape(f"features of 1 of 4 images of the {name} set are NaN or infinite")):
        score_features(sets["training"], sets["validation"], CLASSES, FAST, tests={"line 2": sets["line 2"]})


def test_a_part_in_two_sets(log: pytest.LogCaptureFixture) -> None:
    groups = ["a", "b", "c", "d"]
    train, val = make_features([0, 0, 1, 1], groups), make_features([0, 1], ["a", "z"], seed=1)
    results = score_features(train, val, CLASSES, FAST, tests={"line 2": train})[0]
    assert results.extra["num_parts_in_both"] == 1
    assert "1 parts are in both the training and the validation set, so the scores are too good: a" in log.text
    assert "4 parts are in both the training set and line 2, so the scores are too good: a, b, c, d" in log.text


def test_fits_that_do_not_converge_are_counted(log: pytest.LogCaptureFixture) -> None:
    train, val = make_features([0, 1] * 10, gap=0.2), make_features([0, 1], seed=1)
    settings = replace(FAST, cs=(1e-4, 1e5), max_iter=2, metric="accuracy")
    results = score_features(train, val, CLASSES, settings)[0]
    extra = results.extra
    candidates = extra["choice_of_c"]["candidates"]
    assert candidates[1]["not_converged"] == 5
    assert extra["num_fits"] in (11, 12)
    stopped = sum(candidate["not_converged"] for candidate in candidates)
    assert extra["num_not_converged"] >= stopped + (not extra["converged"])
    assert f"{extra['num_not_converged']} of {extra['num_fits']} fits did not converge within 2 iterations" in log.text
    assert log.text.count("converge") == 1


def test_a_final_fit_that_is_stopped_is_told(log: pytest.LogCaptureFixture) -> None:
    train, val = make_features([0, 1] * 10, gap=0.2), make_features([0, 1], seed=1)
    fitted = score_features(train, val, CLASSES, replace(FAST, cs=(1e5,), max_iter=2))[1]
    assert fitted is not None
    assert not fitted.converged
    assert (fitted.num_fits, fitted.num_not_converged) == (1, 1)
    assert "nor did the final one with C=100000: try a larger max_iter" in log.text


def test_sets_that_do_not_fit() -> None:
    train, val, _ = random_sets()
    with pytest.raises(ValueError, match="'line 2' cannot be evaluated like a validation set: the classes of the two"):
        eval_log_regression(Backbone(), train, val, FAST, test_datasets={"line 2": random_sets(3)[2]})
    unnamed = [MemoryDataset(rows.colours, rows.labels) for rows in (train, val, random_sets(3)[2])]
    with pytest.raises(ValueError, match="'line 2' has labels outside the 2 classes of the other sets"):
        eval_log_regression(Backbone(), *unnamed[:2], FAST, test_datasets={"line 2": unnamed[2]})
    with pytest.raises(ValueError, match="auroc exists for two classes"):
        eval_log_regression(Backbone(), *random_sets(3)[:2], replace(FAST, metric="auroc"))


FEW = LogRegressionSettings(cs=(1e-4, 1e-2, 1.0), num_resamples=20, n_tries=3)


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
    settings = replace(FEW, n_per_class_list=(2, 6))
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


def test_one_image_per_class_falls_back(log: pytest.LogCaptureFixture) -> None:
    train, val = sets()
    assert few_shot_fits(train, val, 1, replace(FEW, fallback_c=0.25)) == {
        "c": [0.25] * 3,
        "chosen_by": ["falling back, as fewer than two classes have a part to hold out"] * 3,
        "num_fits": 3,
        "num_not_converged": 0,
    }
    assert "few-shot n=1: C = 0.25, 0.25, 0.25 (by falling back" in log.text
    log.clear()
    assert all("held-out parts" in chosen_by for chosen_by in few_shot_fits(train, val, 6, FEW)["chosen_by"])
    assert "falling back" not in log.text


def test_parts_of_a_subset_stay_whole() -> None:
    """Both images of the only defective part are drawn: it cannot be held out, though it has two images."""
    train = make_features([0] * 6 + [1] * 2, [f"good {row}" for row in range(6)] + ["bad"] * 2)
    assert set(few_shot_fits(train, train, 2, FEW)["c"]) == {FEW.fallback_c}


def test_without_all_labels_there_is_no_chosen_model(tmp_path: Path) -> None:
    train, val = random_set(40, 2, seed=0, name="train"), random_set(12, 2, seed=1, name="val")
    test = random_set(9, 2, seed=2, name="test")
    for numbers in ((-1, 2), (2,)):
        results = eval_log_regression(
            Backbone(),
            train,
            val,
            replace(FEW, n_per_class_list=numbers),
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
