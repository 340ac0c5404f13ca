"""Results side by side."""

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dinov2.eval.metrics.classification import LevelScores, MetricValue, Scores
from dinov2.eval.results import RESULTS_FILE, EvaluationResults, compare_results, read_named_results


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


def test_parts_of_one_photo_are_not_shown_twice() -> None:
    assert compare_results({"random": results(4)}).split("\n")[1].split() == ["random", "k=10*", "0.750", "0.500", "-"]


def test_intervals_are_shown_when_asked() -> None:
    (_, row) = compare_results({"random": results(2)}, intervals=True).split("\n")
    assert row.split()[-4:] == ["1.000", "0.250", "[0.125,", "0.500]"]


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
    results(2).write(tmp_path)
    found = read_named_results([f"a={tmp_path}"])
    assert {name: result.as_dict() for name, result in found.items()} == {"a": results(2).as_dict()}


def test_wrong_words_folders_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected name=folder, found 'x'"):
        read_named_results(["x"])
    with pytest.raises(FileNotFoundError, match=RESULTS_FILE):
        read_named_results([f"a={tmp_path}"])
    (tmp_path / RESULTS_FILE).write_text("{}")
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
