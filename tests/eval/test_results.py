import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest

from dinov2.eval import results as results_module
from dinov2.eval.metrics.classification import LevelScores, MetricValue, Scores, score_predictions
from dinov2.eval.results import PREDICTIONS_FILE, RESULTS_FILE, EvaluationResults, Predictions, spread_table

POSITIVE = np.array([0.1, 0.8, 0.3, 0.6])
PROBABILITIES = np.stack([1 - POSITIVE, POSITIVE], axis=1)
LABELS = np.array([0, 1, 1, 0])
GROUPS = ["a", "b", "b", "c, with a comma"]
DATASETS = {"train": {"num_images": 8, "num_parts": 4}, "val": {"num_images": 4, "num_parts": 3}}


def make_results(**changes: object) -> EvaluationResults:
    scores = {
        "k=1": score_predictions(1 - PROBABILITIES, LABELS, GROUPS, num_resamples=20),
        "k=3": score_predictions(PROBABILITIES, LABELS, GROUPS, num_resamples=20),
    }
    values: dict[str, object] = {
        "evaluator": "knn",
        "settings": {"features": "cls", "nb_knn": [1, 3], "chosen_by": "a rule"},
        "classes": ("good", "defect"),
        "scores": scores,
        "chosen": "k=3",
        "datasets": DATASETS,
        "weights": {"path": "w.pth", "sha256": "0", "bytes": 1},
        "revision": "abc",
        "extra": {"num_parts_in_both": 0},
        "predictions": Predictions(
            paths=["x/1.png", "x/2.png", "y/3.png", "y/4.png"],
            group_ids=GROUPS,
            labels=LABELS,
            probabilities=PROBABILITIES,
        ),
    }
    return EvaluationResults(**(values | changes))


def test_json_says_everything_and_comes_back() -> None:
    results = make_results()
    values = json.loads(results.to_json())
    assert values == results.as_dict()
    assert list(values["scores"]) == ["k=1", "k=3"]
    part = values["scores"]["k=3"]["part"]
    assert part["count"] == 3
    assert part["figures"]["accuracy"].keys() == {"value", "low", "high"}
    assert part["confusion"] == [[1, 1], [0, 1]]
    again = EvaluationResults.from_dict(values)
    assert again.as_dict() == values
    assert again.scores == results.scores
    assert again.classes == ("good", "defect")


def test_what_does_not_apply_is_absent() -> None:
    level = LevelScores(count=2, metrics={"map": MetricValue(value=0.5)})
    results = make_results(scores={"easy": Scores(image=level, part=level)}, chosen="", classes=(), predictions=None)
    assert results.as_dict()["scores"]["easy"]["image"] == {"count": 2, "figures": {"map": {"value": 0.5}}}
    assert EvaluationResults.from_dict(results.as_dict()).scores["easy"].image == level


def test_numbers_that_json_does_not_know_are_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        make_results(extra={"loss": float("nan")}).to_json()


def test_the_chosen_variant_must_be_there() -> None:
    with pytest.raises(ValueError, match=r"chosen variant 'k=2' is not among \['k=1', 'k=3'\]"):
        make_results(chosen="k=2")


def read(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_predictions_are_written_row_by_row(tmp_path: Path) -> None:
    make_results().write(tmp_path / "new" / "folder")
    written = (tmp_path / "new" / "folder" / PREDICTIONS_FILE).read_text()
    first, second, _, last = read(written)
    assert list(first) == [
        "image", "part", "label", "prediction", "score", "probability of good", "probability of defect",
    ]  # fmt: skip
    assert (first["image"], first["part"], first["label"], first["prediction"]) == ("x/1.png", "a", "good", "good")
    assert (first["score"], first["probability of good"], first["probability of defect"]) == ("0.1", "0.9", "0.1")
    assert (second["label"], second["prediction"], second["score"]) == ("defect", "defect", "0.8")
    assert (last["part"], last["label"], last["prediction"]) == ("c, with a comma", "good", "defect")
    results = json.loads((tmp_path / "new" / "folder" / RESULTS_FILE).read_text())
    assert results == make_results().as_dict()
    assert "predictions" not in results


def test_many_classes_have_the_score_of_the_prediction_and_missing_labels_stay_empty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    predictions = Predictions(
        paths=["1.png", "2.png"],
        group_ids=["a", "b"],
        labels=np.array([-1, 0]),
        probabilities=np.array([[0.2, 0.3, 0.5], [0.7, 0.3, 0.0]]),
    )
    rows = read(predictions.to_csv(("x", "y", "z")))
    assert [(row["label"], row["prediction"], row["score"]) for row in rows] == [("", "z", "0.5"), ("x", "x", "0.7")]
    monkeypatch.setattr(results_module, "MAX_CLASS_COLUMNS", 2)
    assert list(read(predictions.to_csv(("x", "y", "z")))[0])[-1] == "score"


def test_predictions_of_an_earlier_evaluation_do_not_stay(tmp_path: Path) -> None:
    make_results().write(tmp_path)
    make_results(predictions=None).write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [RESULTS_FILE]


def test_table_shows_every_variant_and_the_intervals_of_the_chosen_one() -> None:
    results = make_results()
    lines = results.table().splitlines()
    assert lines[0] == "knn on cls: 2 classes, train: 8 images of 4 parts, val: 4 images of 3 parts"
    assert lines[1].startswith("per image (4)  accuracy  balanced")
    assert [line.split()[0] for line in lines[2:4]] == ["k=1", "k=3*"]
    assert lines[4].startswith("per part (3)")
    figure = results.scores["k=3"].part.metrics["accuracy"]
    text = results.table()
    assert "k=3, chosen by a rule, per part, 95 % intervals over parts" in text
    assert f"{figure.value:.4f}" in lines[6]
    assert f"[{figure.low:.4f}, {figure.high:.4f}]" in text
    assert "k=1, chosen" not in text
    confusion = lines[-3:]
    assert [line.split() for line in confusion] == [
        ["label,", "predicted", "as", "good", "defect"],
        ["good", "1", "1"],
        ["defect", "0", "1"],
    ]


def test_table_shows_parts_only_where_they_differ_and_works_without_figures() -> None:
    alone = score_predictions(PROBABILITIES, LABELS, list("abcd"), num_resamples=0)
    table = make_results(scores={"k=3": alone}).table()
    assert "per part" not in table
    assert "intervals" not in table
    assert make_results(scores={}, chosen="", datasets={}).table() == "knn on cls: 2 classes"


def test_columns_of_the_table_stand_below_each_other() -> None:
    lines = make_results().table().splitlines()
    assert len({len(line) for line in lines[1:4]}) == 1


def test_spread_over_tries_is_shown() -> None:
    spread = {"mean": 0.6, "std": 0.1, "values": [0.5, 0.7]}
    few_shot = {
        "n=1 k=1": {"image": {"accuracy": spread}, "part": {}},
        "n=5 k=5": {"image": {"accuracy": spread, "average_precision": spread}, "part": {"auroc": spread}},
    }
    lines = [line.split() for line in spread_table(few_shot).splitlines()]
    shown = ["0.600", "±", "0.100", "[0.500,", "0.700]"]
    assert lines[1] == ["accuracy", *shown, *shown]
    assert lines[2] == ["ap", "-", *shown]
    assert lines[4] == ["auroc", "-", *shown]
    assert spread_table({}) == ""
