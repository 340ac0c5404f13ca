"""Results of evaluators: files, tables, comparison."""

import json
import runpy
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from eval_stand_ins import read_csv

from dinov2.eval import results as results_module
from dinov2.eval.metrics.classification import LevelScores, MetricValue, Scores, score_predictions
from dinov2.eval.results import (
    PREDICTIONS_FILE,
    RESULTS_FILE,
    Comparison,
    EvaluationResults,
    Predictions,
    compare_results,
    read_named_results,
    spread_table,
)

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
    with pytest.raises(ValueError, match="not JSON compliant"):
        make_results(extra={"loss": float("nan")}).to_json()
    with pytest.raises(ValueError, match=r"chosen variant 'k=2' is not among \['k=1', 'k=3'\]"):
        make_results(chosen="k=2")


def test_what_does_not_apply_is_absent() -> None:
    level = LevelScores(count=2, metrics={"map": MetricValue(value=0.5)})
    results = make_results(scores={"easy": Scores(image=level, part=level)}, chosen="", classes=(), predictions=None)
    assert results.as_dict()["scores"]["easy"]["image"] == {"count": 2, "figures": {"map": {"value": 0.5}}}
    assert EvaluationResults.from_dict(results.as_dict()).scores["easy"].image == level


def test_a_table_says_what_was_counted() -> None:
    """Of every level by itself, and of every variant where they differ, as pixels of images and defects of parts do."""

    def level(count: int, **metrics: float) -> LevelScores:
        return LevelScores(count=count, metrics={name: MetricValue(value=value) for name, value in metrics.items()})

    pixels = Scores(image=level(4, mean_iou=0.5), part=level(4))
    defects = Scores(image=level(4, auroc=0.8), part=level(3, auroc=0.9))
    table = make_results(scores={"segmentation": pixels, "any defect": defects}, chosen="", predictions=None).table()
    assert "per image (4)" in table
    assert "per part (3)" in table
    queries = {
        name: Scores(image=level(n, map=0.5), part=level(n, map=0.5)) for name, n in (("easy", 10), ("hard", 11))
    }
    lines = make_results(scores=queries, chosen="", predictions=None).table().splitlines()
    assert [line.split() for line in lines[1:4]] == [
        ["per", "image", "images", "map"],
        ["easy", "10", "0.5000"],
        ["hard", "11", "0.5000"],
    ]


def test_predictions_are_written_row_by_row(tmp_path: Path) -> None:
    make_results().write(tmp_path / "new" / "folder")
    written = (tmp_path / "new" / "folder" / PREDICTIONS_FILE).read_text()
    first, second, _, last = read_csv(written)
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
    make_results(predictions=None).write(tmp_path / "new" / "folder")  # those of an earlier evaluation do not stay
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == [RESULTS_FILE]


def test_no_spreadsheet_computes_what_a_file_or_class_is_called(tmp_path: Path) -> None:
    paths = ["=1/1.png", "@x/2.png", "y\n/3.png", "y\udcff/4.png"]
    predictions = Predictions(paths=paths, group_ids=["-1", "+a", "c", "d"], labels=LABELS, probabilities=PROBABILITIES)
    make_results(classes=("=good", "-defect"), predictions=predictions).write(tmp_path)
    rows = read_csv((tmp_path / PREDICTIONS_FILE).read_text())
    assert [row["image"] for row in rows] == ["'=1/1.png", "'@x/2.png", r"y\x0a/3.png", r"y\udcff/4.png"]
    assert [row["part"] for row in rows] == ["-1", "'+a", "c", "d"]
    assert [row["prediction"] for row in rows] == ["'=good", "'-defect", "'=good", "'-defect"]


def test_results_of_something_else_are_not_replaced_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_results().publish(tmp_path)
    make_results(settings={"other": "settings"}).publish(tmp_path)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    make_results(evaluator="linear").publish(tmp_path)
    assert (
        "results.json held results of another evaluation (knn, of the same weights), which are replaced" in caplog.text
    )
    make_results(weights={"path": "other.pth"}).publish(tmp_path)
    assert "held results of another evaluation (linear, of other evaluator and weights)" in caplog.text
    (tmp_path / RESULTS_FILE).write_text('{"evaluator": "kn')
    make_results().publish(tmp_path)
    assert "results.json cannot be read and is replaced" in caplog.text
    assert EvaluationResults.from_dict(json.loads((tmp_path / RESULTS_FILE).read_text())).evaluator == "knn"


def test_many_classes_have_the_score_of_the_prediction_and_missing_labels_stay_empty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    predictions = Predictions(
        paths=["1.png", "2.png"],
        group_ids=["a", "b"],
        labels=np.array([-1, 0]),
        probabilities=np.array([[0.2, 0.3, 0.5], [0.7, 0.3, 0.0]]),
    )
    rows = read_csv(predictions.to_csv(("x", "y", "z")))
    assert [(row["label"], row["prediction"], row["score"]) for row in rows] == [("", "z", "0.5"), ("x", "x", "0.7")]
    monkeypatch.setattr(results_module, "MAX_CLASS_COLUMNS", 2)
    assert list(read_csv(predictions.to_csv(("x", "y", "z")))[0])[-1] == "score"


def test_table_shows_every_variant_and_the_intervals_of_the_chosen_one() -> None:
    results = make_results()
    lines = results.table().splitlines()
    assert lines[0] == "knn on cls: 2 classes, train: 8 images of 4 parts, val: 4 images of 3 parts"
    assert lines[1].startswith("per image (4)  accuracy  balanced")
    assert [line.split()[0] for line in lines[2:4]] == ["k=1", "k=3*"]
    assert len({len(line) for line in lines[1:4]}) == 1  # columns stand below each other
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


def test_table_shows_parts_only_where_they_differ_and_works_without_metrics() -> None:
    alone = score_predictions(PROBABILITIES, LABELS, list("abcd"), num_resamples=0)
    table = make_results(scores={"k=3": alone}).table()
    assert "per part" not in table
    assert "intervals" not in table
    assert make_results(scores={}, chosen="", datasets={}).table() == "knn on cls: 2 classes"


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


def results(part_count: int, chosen: str = "k=10") -> EvaluationResults:
    values = {"accuracy": 0.75, "balanced_accuracy": 0.5}
    image = LevelScores(count=4, metrics={name: MetricValue(value=value) for name, value in values.items()})
    part = LevelScores(
        count=part_count,
        metrics={name: MetricValue(value=1.0) for name in ("accuracy", "balanced_accuracy")}
        | {"auroc": MetricValue(value=0.25, low=0.125, high=0.5)},
    )
    return EvaluationResults(
        evaluator="knn",
        settings={},
        classes=("good", "bad"),
        scores={"k=10": Scores(image=image, part=part)},
        chosen=chosen,
    )


def test_a_row_per_backbone_with_parts_where_they_differ() -> None:
    lines = compare_results({"random": results(2), "mine": results(2, chosen="")}).split("\n")
    assert lines[0].split("  ")[0] == "backbone"
    assert lines[1].split() == ["random", "k=10*", "0.750", "0.500", "-", "1.000", "1.000", "0.250"]
    assert lines[2].split()[:2] == ["mine", "k=10"]
    assert compare_results({"a": results(4)}).split("\n")[1].split() == ["a", "k=10*", "0.750", "0.500", "-"]
    (_, row) = compare_results({"random": results(2)}, intervals=True).split("\n")
    assert row.split()[-4:] == ["1.000", "0.250", "[0.125,", "0.500]"]


def test_yardsticks_stand_below_the_backbone_with_their_verdicts() -> None:
    level = LevelScores(count=2, metrics={"map": MetricValue(value=0.5), "recall@1": MetricValue(value=0.25)})
    scores = Scores(image=level, part=level)
    comparison = partial(Comparison, variant="parts", level="image", value=0.5, reference=0.5)
    found = replace(
        results(2),
        scores={"parts": scores},
        chosen="",
        yardsticks={"chance": scores, "image statistics": scores},
        comparisons=[
            comparison(yardstick="chance", metric="map", low=0.1, high=0.2, verdict="better"),
            comparison(yardstick="image statistics", metric="map", low=-0.1, high=0.2, verdict="not distinguishable"),
            comparison(yardstick="chance", metric="recall@1", low=-0.3, high=-0.2, verdict="worse"),
        ],
    )
    lines = compare_results({"mine": found}, yardsticks=True).split("\n")
    assert lines[0].split() == ["backbone", "variant", "image", "map", "image", "recall@1"]
    assert [line.split() for line in lines[1:4]] == [
        ["mine", "parts", "0.500", "0.250"],
        ["chance", "0.500", "0.250"],
        ["image", "statistics", "0.500", "0.250"],
    ]
    assert lines[4:] == [
        "mine, parts, image map: better than chance, not distinguishable from image statistics",
        "mine, parts, image recall@1: worse than chance",
    ]
    assert len(compare_results({"mine": found}).split("\n")) == 2


def test_a_grid_of_classifiers_is_shown_by_its_best_on_every_set() -> None:
    few = results(2)
    names = [f"lr={number}" for number in range(20)] + ["lr=3 on test", "lr=1 on test"]
    grid = replace(few, scores=dict.fromkeys(names, few.scores["k=10"]), chosen="lr=3")
    lines = compare_results({"knn": few, "linear": grid}).split("\n")
    assert [line.split("  ")[0] for line in lines[1:4]] == ["knn", "linear", "linear"]
    assert "lr=3*" in lines[2]
    assert "lr=3 on test" in lines[3]
    assert lines[4:] == ["(20 variants that were not chosen are left out)"]
    without_choice = replace(grid, chosen="")
    assert len(compare_results({"linear": without_choice}).split("\n")) == 23


def test_results_are_read_from_their_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected name=folder, found 'x'"):
        read_named_results(["x"])
    with pytest.raises(FileNotFoundError, match=RESULTS_FILE):
        read_named_results([f"a={tmp_path}"])
    results(2).write(tmp_path)
    assert read_named_results([f"a={tmp_path}"])["a"].as_dict() == results(2).as_dict()
    for spoilt in ("{}", "[" * 100_000):
        (tmp_path / RESULTS_FILE).write_text(spoilt)
        with pytest.raises(ValueError, match="is not a result"):
            read_named_results([f"a={tmp_path}"])


def test_door_prints_the_table(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results(2).write(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compare_knn.py", f"random={tmp_path}", "--intervals"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(repository / "tools" / "compare_knn.py"), run_name="__main__")
    assert stop.value.code == 0
    assert "[0.125, 0.500]" in capsys.readouterr().out
